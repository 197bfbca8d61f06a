"""Ends leases that are over: deadlines passed, claims that were never confirmed, workers that are silent."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from taskd.clock import Clock
from taskd.inflight.presence import Presence
from taskd.inflight.writer import Inflight

log = structlog.get_logger("taskd.upkeep")


class Overdue:
    """Nothing is judged in the first `quiet_ms`: workers that outlived the broker may still report."""

    def __init__(
        self,
        inflight: Inflight,
        presence: Presence,
        clock: Clock,
        *,
        quiet_ms: int,
        lease_ms: Callable[[], int],
        limit: int,
    ) -> None:
        self._inflight = inflight
        self._presence = presence
        self._clock = clock
        self._quiet_until_mono_ms = clock.now().mono_ms + quiet_ms
        self._lease_ms = lease_ms
        self._limit = limit

    def _quiet(self) -> bool:
        return self._clock.now().mono_ms < self._quiet_until_mono_ms

    async def end_leases(self) -> int:
        return 0 if self._quiet() else await self._inflight.end_overdue(self._limit)

    async def end_claims(self) -> int:
        return 0 if self._quiet() else await self._inflight.end_overdue_claims(self._limit)

    async def end_silent(self) -> int:
        """The leases of workers that said nothing for the life of a lease."""
        if self._quiet():
            return 0
        ended, lease_ms = 0, self._lease_ms()
        for worker in self._presence.silent(await self._inflight.holders(), lease_ms):
            if not self._presence.is_silent(worker, lease_ms):
                continue  # it came back while the leases of others ended
            leases = await self._inflight.reconcile(worker, ())
            log.warning("worker is silent, its leases end", worker=worker, leases=leases)
            ended += leases
        return min(ended, self._limit - 1)
