"""Push delivery: the broker calls workers that wait to be called, one sender for each of their addresses.

A row is claimed before its call and processing once a worker said yes. A call that failed gives the
row back only when it surely reached nobody; else the row stays claimed until the claim is over, so
that a worker which has it can report (at most once: it counts as started). A status of OK proves
less than it seems: a worker that refuses our signature may answer OK and run nothing, which is then
found by the deadline.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import structlog
import trio

from taskd.dispatch.pace import LONGEST_BUSY_PAUSE_S, LONGEST_PAUSE_S, Pace
from taskd.errors import PeerError, PeerUnreachable, Refused, StoreError
from taskd.inflight.base import ClaimRequest, Lease, LeaseKind, Report, ReportStatus
from taskd.inflight.writer import Inflight
from taskd.telemetry import metrics
from taskd.wire.pushing import MAX_PUSH_BYTES, PUSH_TASK, encode_push

log = structlog.get_logger("taskd.dispatch")


class PushClient(Protocol):
    """Calls to one address; `taskd.rpc.client.Client` is one."""

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes: ...


Connect = Callable[[str], AbstractAsyncContextManager[PushClient]]
"""A client for the URL of a worker. Opening it must not need the worker: it connects when called."""


class Answer(Enum):
    """What is known of a row after its call; the value is the word on the metrics page."""

    TAKEN = "taken"
    BUSY = "busy"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    TOO_LARGE = "too_large"
    NOT_BEGUN = "not_begun"  # the broker stops
    UNKNOWN = "unknown"  # cut off in the middle, or the worker failed: it may have the row


# These say that the worker, or something before it, did not take the row, whichever row it was. Any
# other status may be about the row, or come from a worker that has it by then.
_REFUSALS = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "FAILED_PRECONDITION"})
_NOT_DELIVERED = frozenset({Answer.BUSY, Answer.UNREACHABLE, Answer.REFUSED, Answer.NOT_BEGUN})


@dataclass(slots=True)
class PushSettings:
    """How long one call may take, and how many go to one address at a time."""

    timeout_s: float
    max_in_flight: int


class PushDispatch:
    """Pushes until `draining` is set; then calls under way end, and nothing more is claimed.

    `worker_map`: application → URL. Several applications may share one; each gets its turn.
    """

    def __init__(
        self,
        inflight: Inflight,
        connect: Connect,
        draining: trio.Event,
        worker_map: Mapping[str, str],
        settings: PushSettings,
    ) -> None:
        self.inflight = inflight
        self.connect = connect
        self.settings = settings
        self._draining = draining
        self._worker_map = dict(worker_map)
        self._remapped = trio.Event()
        self._senders: dict[str, Sender] = {}

    def served(self) -> Collection[str]:
        """The applications that have a worker."""
        return self._worker_map.keys()

    def remap(self, worker_map: Mapping[str, str]) -> None:
        """Send elsewhere from now on; calls to an address that is no longer named run to their end."""
        self._worker_map = dict(worker_map)
        self._remapped.set()

    def troubles(self) -> list[str]:
        """Addresses that do not take pushes at the moment, and why."""
        return [f"{url}: {sender.trouble}" for url, sender in self._senders.items() if sender.trouble]

    async def run(self) -> None:
        """Push until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_with_drain)
            while True:
                self._follow_map(nursery)
                await self._remapped.wait()
                self._remapped = trio.Event()

    def _follow_map(self, nursery: trio.Nursery) -> None:
        wanted: dict[str, list[str]] = defaultdict(list)
        for application, url in self._worker_map.items():
            wanted[url].append(application)
        for url in self._senders.keys() - wanted.keys():
            self._senders.pop(url).stop()
        for url, applications in wanted.items():
            if url in self._senders:
                self._senders[url].serve(applications)
            elif not self._draining.is_set():
                sender = self._senders[url] = Sender(self, url, applications)
                nursery.start_soon(sender.run)

    async def _end_with_drain(self) -> None:
        await self._draining.wait()
        for sender in self._senders.values():
            sender.stop()


class Sender:
    """Pushes to one address."""

    def __init__(self, dispatch: PushDispatch, url: str, applications: Iterable[str]) -> None:
        self.trouble = ""
        self._inflight = dispatch.inflight
        self._connect = dispatch.connect
        self._settings = dispatch.settings
        self._url = url
        self._turns = deque(applications)
        self._pace = Pace(dispatch.settings.max_in_flight)
        self._in_flight = 0
        self._stopping = trio.Event()
        self._wake = dispatch.inflight.watch_claimable()

    def serve(self, applications: Iterable[str]) -> None:
        self._turns = deque(applications)
        self._wake.set()

    def stop(self) -> None:
        """Claim nothing more, and end once the calls under way have ended."""
        self._stopping.set()
        self._wake.set()

    async def run(self) -> None:
        try:
            async with self._connect(self._url) as client, trio.open_nursery() as calls:
                while not self._stopping.is_set():
                    pause_s = self._pace.pause_s(trio.current_time())
                    if pause_s:
                        with trio.move_on_after(pause_s):
                            await self._stopping.wait()
                        continue
                    leases = await self._claim()
                    await self._begin(calls, client, leases)
                    if not leases and not self._pace.pause_s(trio.current_time()):
                        await self._wake.wait()
        finally:
            self._inflight.unwatch(self._wake)

    async def _claim(self) -> list[Lease]:
        """Up to as much as may be under way, shared by the applications that have something."""
        room = self._pace.room(self._in_flight)
        ready = [application for application in self._turns if self._inflight.claimable(application, ())]
        leases: list[Lease] = []
        for number, application in enumerate(ready):
            limit = -(-(room - len(leases)) // (len(ready) - number))
            if limit <= 0:
                break
            request = ClaimRequest(limit, LeaseKind.PUSH, application=application)
            try:
                leases += await self._inflight.claim(request)
            except StoreError as error:
                self._failed(str(error), LONGEST_PAUSE_S)
                break
            if application in self._turns:  # the map may have changed meanwhile
                self._turns.remove(application)
                self._turns.append(application)
        return leases

    async def _begin(self, calls: trio.Nursery, client: PushClient, leases: Iterable[Lease]) -> None:
        """Begin the calls one after the other, so that they leave in the order of the claim."""
        left = deque(leases)
        try:
            while left:
                self._in_flight += 1
                await calls.start(self._push, client, left.popleft())
        finally:
            if left:
                with trio.CancelScope(shield=True):
                    await self._inflight.unclaim([lease.ref for lease in left])

    async def _push(self, client: PushClient, lease: Lease, task_status: trio.TaskStatus[None]) -> None:
        """One row, to its end. Cancelled, it counts as cut off, unless the call had not begun."""
        answer, why = Answer.NOT_BEGUN, ""
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            answer, why = Answer.UNKNOWN, "cut off: the broker stops"
            task_status.started()
            answer, why = await self._call(client, lease)
        finally:
            with trio.CancelScope(shield=True):
                await self._settle(lease, answer, why)
            self._in_flight -= 1
            self._wake.set()

    async def _call(self, client: PushClient, lease: Lease) -> tuple[Answer, str]:
        body = encode_push(lease.activation)
        if len(body) > MAX_PUSH_BYTES:
            return Answer.TOO_LARGE, f"{len(body)} bytes, workers take {MAX_PUSH_BYTES}"
        try:
            await client.call(PUSH_TASK, body, timeout_s=self._settings.timeout_s)
        except PeerUnreachable as error:
            return Answer.UNREACHABLE, str(error)
        except Refused as error:
            return _judged(error), str(error)
        except PeerError as error:
            return Answer.UNKNOWN, str(error)
        except Exception as error:  # nothing that a worker does to its connection may end the broker
            log.exception("a push failed in an unknown way", worker=self._url, id=lease.id)
            return Answer.UNKNOWN, repr(error)
        return Answer.TAKEN, ""

    async def _settle(self, lease: Lease, answer: Answer, why: str) -> None:
        metrics.pushes.labels(self._url, answer.value).inc()
        if answer is Answer.TAKEN:
            metrics.claims.labels("push").inc()
            self._took()
        elif answer not in (Answer.TOO_LARGE, Answer.NOT_BEGUN):
            busy = answer is Answer.BUSY
            self._failed(why, LONGEST_BUSY_PAUSE_S if busy else LONGEST_PAUSE_S)
        try:
            await self._record(lease, answer, why)
        except StoreError as error:  # the claim ends by itself, and the row waits again
            log.error("the outcome of a push could not be stored", id=lease.id, error=str(error))

    async def _record(self, lease: Lease, answer: Answer, why: str) -> None:
        if answer is Answer.TAKEN:
            await self._inflight.pushed([lease.ref])
        elif answer in _NOT_DELIVERED:
            await self._inflight.unclaim([lease.ref])
        elif answer is Answer.TOO_LARGE:
            report = Report(lease.id, lease.fence, ReportStatus.FAILURE, "too_large", why)
            await self._inflight.report([report])
        else:
            await self._inflight.maybe_pushed([lease.ref])
            log.info("a worker may have taken an activation", worker=self._url, id=lease.id, why=why)

    def _took(self) -> None:
        self._pace.succeeded()
        if self.trouble:
            log.info("worker takes pushes again", worker=self._url)
        self.trouble = ""

    def _failed(self, why: str, longest_s: float) -> None:
        self._pace.failed(trio.current_time(), longest_s)
        if not self.trouble:
            log.warning("worker does not take pushes, trying again", worker=self._url, why=why)
        self.trouble = why


def _judged(error: Refused) -> Answer:
    if error.code == "RESOURCE_EXHAUSTED":
        # A gRPC server with a smaller limit than ours says so; it would say so for ever.
        return Answer.TOO_LARGE if "larger than max" in error.message else Answer.BUSY
    return Answer.REFUSED if error.code in _REFUSALS else Answer.UNKNOWN
