"""Waking one task for many reasons."""

from __future__ import annotations

import trio


class Wake:
    """Wakes one task; a hundred wake-ups before it looks make one."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        """Return once it was set since the last return."""
        await self._event.wait()
        self._event = trio.Event()
