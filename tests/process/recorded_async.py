"""An async task beside those of recorded_tasks.py, which writes down the same."""

from __future__ import annotations

import trio
from recorded_tasks import record, recorded


@recorded.register("awaits")
async def awaits(key: str) -> None:
    record("START", key)
    await trio.sleep(0.05)
    record("END", key)
