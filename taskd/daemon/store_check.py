"""Damage in a store that is in use: looked for where the start had no time to, or met by SQLite."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import structlog
import trio

from taskd.clock import monotonic_s
from taskd.database import damage
from taskd.errors import StartupError, StoreDamaged
from taskd.inflight.quarantine import Check, Checked, set_aside_at_next_start
from taskd.inflight.writer import Inflight

CHECKING = "is being checked for damage while it is in use"

log = structlog.get_logger("taskd.broker")


class StoreCheck:
    """`checked`: what the start found out."""

    def __init__(self, path: Path, check: Check, checked: Checked, inflight: Inflight) -> None:
        self._path = path
        self._check = check
        self._checked = checked
        self._inflight = inflight

    async def run(self) -> None:
        """Finish what the start began, then wait for the store to meet damage, until cancelled.

        Raises StoreDamaged; then the process should end, and its next start sets the file aside.
        """
        if not self._checked.complete:
            await self._look()
        await self._inflight.damaged.wait()
        self._condemn(self._inflight.trouble)

    async def _look(self) -> None:
        """Raises StoreDamaged. It reads beside the writer, which goes on; it may take seconds for each GB."""
        full = self._check == "full"
        log.info("looking for damage in the store beside the work", file=str(self._path), full=full)
        began_s, before, self._inflight.notice = monotonic_s(), self._inflight.notice, CHECKING
        given_up = threading.Event()
        try:
            found = await trio.to_thread.run_sync(
                partial(damage, self._path, full=full, give_up=given_up.is_set), abandon_on_cancel=True
            )
        except StartupError as error:
            log.error("the store cannot be checked", problem=str(error))
        else:
            if found:
                self._condemn(found)
            log.info("no damage found in the store", seconds=round(monotonic_s() - began_s, 1))
        finally:
            given_up.set()
            self._inflight.notice = before

    def _condemn(self, found: str) -> None:
        advice = "this process ends; its next start sets the file aside and begins with an empty one"
        try:
            set_aside_at_next_start(self._path, found)
        except OSError as error:
            advice = (
                f"stop the broker, move the file away and run `taskd recover` (no mark: {error.strerror})"
            )
        log.critical("the store is damaged", file=str(self._path), damage=found, next=advice)
        raise StoreDamaged(f"the store {self._path} is damaged: {found}; {advice}")
