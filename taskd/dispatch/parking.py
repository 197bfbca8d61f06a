"""Parks what nobody serves, so that it neither blocks nor is tried over and over; and brings it back."""

from __future__ import annotations

from collections.abc import Callable, Collection

import structlog

from taskd.activation.lifecycle import Status
from taskd.dispatch.roster import Roster
from taskd.inflight.known import KnownTasks
from taskd.inflight.sqlite import Changes
from taskd.inflight.writer import Inflight

MAX_REPORTED = 1_000  # names of unknown tasks remembered as told
EVERYTHING = KnownTasks(everything=True)

log = structlog.get_logger("taskd.dispatch")


class PushParking:
    """`served` names the applications that have somewhere to go now."""

    def __init__(self, inflight: Inflight, served: Callable[[], Collection[str]], *, limit: int) -> None:
        self._inflight = inflight
        self._served = served
        self._limit = limit
        self._reported: set[str] = set()

    async def round(self) -> int:
        """A duty of upkeep: park and bring back at most `limit` rows; returns how many."""
        served = self._served()
        depths = self._inflight.depths()
        unserved = {
            depth.application
            for depth in depths
            if depth.status in (Status.PENDING, Status.PARKED) and depth.application not in served
        }
        self._report(unserved, served)
        out_of_place = any(
            depth.status is (Status.PENDING if depth.application in unserved else Status.PARKED)
            for depth in depths
        )
        return await self._inflight.sort_parked(served, self._limit) if out_of_place else 0

    def _report(self, unserved: set[str], served: Collection[str]) -> None:
        for application in sorted(unserved - self._reported):
            log.warning(
                "no worker is mapped for this application: its activations are parked; "
                "add it to push.worker_map",
                application=application,
            )
        if len(self._reported) > MAX_REPORTED:
            self._reported &= unserved  # nothing is left of the others
        self._reported |= unserved
        for application in sorted(self._reported):
            if application in served:
                log.info("application is served again", application=application)
                self._reported.discard(application)


class UnknownTasks:
    """Brings back what claims parked, because no connected worker knew the task, once one knows it.

    `parks` False: claims park nothing any more, so whatever was parked before comes back.
    """

    def __init__(self, inflight: Inflight, roster: Roster, *, limit: int, parks: bool = True) -> None:
        self._inflight = inflight
        self._roster = roster
        self._limit = limit
        self._parks = parks
        self._looked_for: object = None  # all that is parked is unknown to these
        self._reported: set[tuple[str, str, str]] = set()
        inflight.observers.append(self._parked)

    async def round(self) -> int:
        """A duty of upkeep: bring back at most `limit` rows; returns how many."""
        known = self._roster.anyone() if self._parks else EVERYTHING
        if known is self._looked_for:
            return 0
        self._looked_for = known
        handled = await self._inflight.bring_back(known, self._limit)
        if handled == self._limit:
            self._looked_for = None
        self._forget_known()
        return handled

    def _parked(self, changes: Changes) -> None:
        if not changes.unknown:
            return
        self._looked_for = None  # somebody who knows them may have come in between
        for task in sorted(changes.unknown - self._reported):
            log.warning(
                "no connected worker knows this task: its activations are parked until one does",
                application=task[0],
                namespace=task[1],
                taskname=task[2],
            )
            if len(self._reported) < MAX_REPORTED:
                self._reported.add(task)

    def _forget_known(self) -> None:
        anyone = self._roster.anyone()
        for application, namespace, taskname in sorted(self._reported):
            names = anyone.in_lane(application, namespace)
            if names is None or taskname in names:
                log.info("task is known again", namespace=namespace, taskname=taskname)
                self._reported.discard((application, namespace, taskname))
