"""Parks what nobody serves, so that it neither blocks nor is tried over and over; and brings it back."""

from __future__ import annotations

from collections.abc import Callable, Collection

import structlog

from taskd.activation.lifecycle import Status
from taskd.inflight.writer import Inflight

log = structlog.get_logger("taskd.dispatch")


class Parking:
    """`served` names the applications that have somewhere to go now; None: every one has."""

    def __init__(
        self, inflight: Inflight, served: Callable[[], Collection[str] | None], *, limit: int
    ) -> None:
        self._inflight = inflight
        self._served = served
        self._limit = limit
        self._reported: set[str] = set()

    async def round(self) -> int:
        """A duty of upkeep: park and unpark at most `limit` rows; returns how many."""
        served = self._served()
        depths = self._inflight.depths()
        unserved = {
            depth.application
            for depth in depths
            if depth.status in (Status.PENDING, Status.PARKED)
            and served is not None
            and depth.application not in served
        }
        self._report(unserved, served)
        out_of_place = any(
            depth.status is (Status.PENDING if depth.application in unserved else Status.PARKED)
            for depth in depths
        )
        return await self._inflight.park(served, self._limit) if out_of_place else 0

    def _report(self, unserved: set[str], served: Collection[str] | None) -> None:
        for application in sorted(unserved - self._reported):
            log.warning(
                "no worker is mapped for this application: its activations are parked; "
                "add it to push.worker_map",
                application=application,
            )
        self._reported |= unserved
        for application in sorted(self._reported):
            if served is None or application in served:
                log.info("application is served again", application=application)
                self._reported.discard(application)
