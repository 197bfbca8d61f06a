"""Rows whose topic we may not write to: set aside, looked at every minute, published once that is allowed.

Meanwhile they hold up no others. One row of each reason is tried; when it is taken, all of them are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import structlog

from taskd.inflight.wake import Wake
from taskd.inflight.writer import Inflight
from taskd.upkeep.duties import Duty

TRY_EVERY_S = 60.0

log = structlog.get_logger("taskd.upkeep")


class ForbiddenRows:
    """`duty` belongs to upkeep; who publishes says what was refused and what was taken."""

    def __init__(self, inflight: Inflight, *, limit: int) -> None:
        self._inflight = inflight
        self._limit = limit
        self._reasons: set[str] = set()
        self._tried: dict[str, str] = {}  # reason by id
        self._allowed: set[str] = set()  # reasons that hold no more; their rows are being taken back
        self._wake = Wake()

    @property
    def duty(self) -> Duty:
        return Duty(
            "forbidden", self.round, self._limit, lambda: TRY_EVERY_S, self._wake, trouble=self.trouble
        )

    def trouble(self) -> str:
        """Why rows are kept that should be published, for whoever can allow it."""
        return "; ".join(sorted(self._reasons))

    async def refused(self, rows: Mapping[str, str]) -> None:
        """Set these aside: the reason by id."""
        if not rows:
            return
        await self._inflight.set_aside(rows)
        for why in set(rows.values()) - self._reasons:
            log.error("may not be published; kept, and tried again every minute", why=why)
        self._reasons.update(rows.values())

    def taken(self, ids: Collection[str]) -> None:
        """These are published. If one of them was refused before, the others of its reason can follow."""
        for id_ in self._tried.keys() & ids:
            self._allowed.add(self._tried.pop(id_))
            self._wake.set()

    async def round(self) -> int:
        """Take back what may be published by now, else one row of each reason."""
        if not self._allowed:
            self._tried = await self._inflight.first_set_aside()
            self._reasons = set(self._tried.values())
            return 0
        why = next(iter(self._allowed))
        rows = await self._inflight.take_back(why, self._limit)
        if rows < self._limit:
            self._allowed.discard(why)
            self._reasons.discard(why)
            log.info("may be published again", was=why)
        return self._limit if rows or self._allowed else 0
