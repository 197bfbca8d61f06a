"""Delivery over the stream of `taskd.v1`: one session for each connected worker.

A worker says how much it can take, the broker sends that much in batches, the worker says what it
started and what became of it. Every frame of the worker keeps its leases alive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import structlog
import trio

from taskd.dispatch.roster import Roster, by_kind
from taskd.errors import PeerUnavailable, Refused, StoreError, Undecodable
from taskd.inflight.base import ClaimRequest, Lease, LeaseKind, Ref, Report, ReportStatus, Verdict
from taskd.inflight.heartbeats import Heartbeat
from taskd.inflight.presence import Presence
from taskd.inflight.standing import StandingClaim
from taskd.inflight.wake import Wake
from taskd.inflight.writer import Inflight
from taskd.locks import take
from taskd.rpc.base import Duplex, Services, Stream
from taskd.telemetry import metrics
from taskd.wire import frames, frames_codec
from taskd.wire.frames import LeaseRef, StopReason

METHOD = "/taskd.v1.DispatchService/Work"
HELLO_WITHIN_S = 10.0
FRAMES_IN_WORK = 16  # frames of one worker whose commits are awaited at once
NAMED_AT_MOST = 20  # ids in a log line

log = structlog.get_logger("taskd.dispatch")

_REPORT_STATUSES = {
    frames.ResultStatus.COMPLETE: ReportStatus.COMPLETE,
    frames.ResultStatus.FAILURE: ReportStatus.FAILURE,
    frames.ResultStatus.RETRY: ReportStatus.RETRY,
    frames.ResultStatus.CRASHED: ReportStatus.CRASHED,
    frames.ResultStatus.INTERRUPTED: ReportStatus.INTERRUPTED,
}


_TOO_LATE = (Verdict.SUPERSEDED, Verdict.UNKNOWN)


class StreamDispatch:
    """`taskd.v1.DispatchService`. Once `draining` is set, nothing is handed out; results are taken.

    `hands_out` False: delivery is push. Workers may connect, to report what they still hold.
    `parks_unknown`: a task that no connected worker knows waits; else it is handed out, and fails.
    """

    def __init__(
        self,
        inflight: Inflight,
        presence: Presence,
        roster: Roster,
        draining: trio.Event,
        *,
        lease_ms: int,
        max_assignments_per_frame: int,
        hands_out: bool = True,
        parks_unknown: bool = True,
    ) -> None:
        self.inflight = inflight
        self.presence = presence
        self.roster = roster
        self.parks_unknown = parks_unknown
        self.draining = draining
        self.lease_ms = lease_ms
        self.max_assignments_per_frame = max_assignments_per_frame
        self.hands_out = hands_out
        self._sessions: dict[str, Session] = {}

    @property
    def services(self) -> Services:
        return {METHOD: Stream(self.work)}

    @property
    def connected_workers(self) -> int:
        return len(self._sessions)

    def stop_leases(self, held: Sequence[tuple[str, Ref]]) -> None:
        """An operator wants these to end: tell the workers that are connected, each named by its id."""
        for worker_id, ref in held:
            session = self._sessions.get(worker_id)
            if session is not None:
                session.stop([ref], StopReason.CANCELLED)

    async def work(self, stream: Duplex) -> None:
        """Serve one worker until it goes, or until a newer stream of the same worker takes over."""
        hello = await _hello(stream)
        while (older := self._sessions.get(hello.worker_id)) is not None:  # again: others may wait here too
            await older.close()
        session = Session(self, stream, hello)
        self._sessions[hello.worker_id] = session
        metrics.connected_workers.set(len(self._sessions))
        try:
            await session.run()
        finally:
            if self._sessions.get(hello.worker_id) is session:
                del self._sessions[hello.worker_id]
                self.roster.leave(hello.worker_id)
            metrics.connected_workers.set(len(self._sessions))
            session.closed.set()


async def _hello(stream: Duplex) -> frames.Hello:
    with trio.move_on_after(HELLO_WITHIN_S):
        frame = _decoded(await stream.receive())
        if not isinstance(frame, frames.Hello) or not frame.worker_id:
            raise Refused("INVALID_ARGUMENT", "the first frame of a worker must be hello, with its worker_id")
        if not frame.version_min <= frames.VERSION <= frame.version_max:
            raise Refused(
                "FAILED_PRECONDITION",
                f"the worker speaks versions {frame.version_min} to {frame.version_max} of the stream, "
                f"this broker {frames.VERSION}; upgrade the older of the two",
            )
        return frame
    raise Refused("DEADLINE_EXCEEDED", f"no hello within {HELLO_WITHIN_S:.0f} s")


def _decoded(raw: bytes | None) -> frames.WorkerFrame | None:
    if raw is None:
        return None
    try:
        return frames_codec.decode_worker_frame(raw)
    except Undecodable as error:
        raise Refused("INVALID_ARGUMENT", f"a frame cannot be read: {error}") from None


class Session:
    """One worker's stream."""

    def __init__(self, dispatch: StreamDispatch, stream: Duplex, hello: frames.Hello) -> None:
        self._dispatch = dispatch
        self._inflight = dispatch.inflight
        self._stream = stream
        self._hello = hello
        self._credit = frames.Credit(0, 0)  # the newest
        self._sent = 0  # assignments on this stream
        self._recalled = False  # the worker waits to hear that its smaller credit is seen
        self._sending = trio.Lock()
        self._in_work = trio.Semaphore(FRAMES_IN_WORK)
        self._scope = trio.CancelScope()
        self._to_stop: dict[Ref, StopReason] = {}
        self._stops = Wake()
        self._knows = dispatch.roster.join(hello.worker_id, hello.tasks, hello.application)
        self._knows_of_kind = by_kind(hello.tasks, hello.async_tasks)
        self._idle = False  # waits for rows
        self._along = self._credit  # under which its standing claim was made
        self.closed = trio.Event()

    async def close(self) -> None:
        """End the session and wait until it is over."""
        self._scope.cancel()
        await self.closed.wait()

    def stop(self, refs: Iterable[Ref], reason: StopReason) -> None:
        """Tell the worker to end these leases, together with others soon."""
        self._to_stop |= dict.fromkeys(refs, reason)
        self._stops.set()

    async def run(self) -> None:
        hello, inflight = self._hello, self._inflight
        worker = log.bind(worker=hello.worker_id, pool=hello.pool)
        self._dispatch.presence.seen(hello.worker_id)
        # A worker that speaks of another store, or of none, says nothing of what it has from this one: it
        # finds out by the welcome, and comes again if there is anything.
        knows_us = hello.store_id == inflight.store_id
        holding = hello.holding if knows_us else ()
        wake = inflight.watch_claimable()
        standing = inflight.standing.add(self._request_along, wake.set)
        said_goodbye = False
        with self._scope:
            try:
                lost = await inflight.reconcile(hello.worker_id, holding) if knows_us else 0
                worker.info("worker connected", holding=len(holding), lost_on_the_way=lost)
                self.stop(await inflight.lost(holding), StopReason.LOST)
                if not self._dispatch.hands_out:
                    worker.warning("this worker gets nothing: dispatch.mode is push")
                await self._send(
                    frames.Welcome(
                        frames.VERSION,
                        inflight.store_id,
                        self._dispatch.lease_ms,
                        inflight.policy.max_processing_deadline_ms or 0,
                    )
                )
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._assign, wake, standing)
                    await self._receive(nursery, wake)
                    said_goodbye = True
                    for _ in range(FRAMES_IN_WORK):  # what it said last is to count
                        await self._in_work.acquire()
                    nursery.cancel_scope.cancel()
            except* PeerUnavailable:
                pass
            finally:
                inflight.unwatch(wake)
                await self._give_up(standing)
                if said_goodbye:
                    await self._end_unheard()
                worker.info("worker disconnected")

    async def _end_unheard(self) -> None:
        """What was still on its way when the worker left in an orderly way need not wait for its lease."""
        with trio.CancelScope(shield=True):
            ended = await self._inflight.reconcile(self._hello.worker_id, ())
        if ended:
            log.info("leases of a worker that left end", worker=self._hello.worker_id, leases=ended)

    # ---- to the worker

    async def _send(self, frame: frames.BrokerFrame) -> None:
        await take(self._sending)
        try:
            await self._stream.send(frames_codec.encode_broker_frame(frame))
        finally:
            self._sending.release()

    async def _assign(self, wake: Wake, standing: StandingClaim) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce_drain)
            nursery.start_soon(self._announce_stops)
            while True:
                credit, recalled = self._credit, self._recalled
                if standing.made:
                    along = self._along
                    if leases := await standing.take():
                        await self._hand_out(leases, along)
                elif leases := await self._claim(credit):
                    await self._hand_out(leases, credit)
                elif recalled:
                    self._recalled = self._credit is not credit
                    await self._send(frames.Assignments((), credit.number))
                else:
                    await self._until(wake)

    async def _until(self, wake: Wake) -> None:
        self._idle = True
        try:
            await wake.wait()
        finally:
            self._idle = False

    async def _claim(self, credit: frames.Credit) -> list[Lease]:
        request = self._request(credit)
        if request is None or not self._inflight.claimable(
            request.application, request.namespaces, request.knows, request.known_to_any, request.pool
        ):
            return []
        return await self._inflight.claim(request)

    def _request(self, credit: frames.Credit) -> ClaimRequest | None:
        """What to claim under this credit; None when that is nothing."""
        limit = min(credit.total - self._sent, self._dispatch.max_assignments_per_frame)
        if limit <= 0 or not self._dispatch.hands_out or self._dispatch.draining.is_set():
            return None
        parks = self._dispatch.parks_unknown
        knows, anyones = (self._knows, self._dispatch.roster.anyone()) if parks else (None, None)
        return ClaimRequest(
            limit,
            LeaseKind.STREAM,
            holder=self._hello.worker_id,
            application=self._hello.application,
            namespaces=self._hello.namespaces,
            at_most_once_limit=max(credit.idle_total - self._sent, 0),
            pool=self._hello.pool,
            knows=self._knows_of_kind.get(credit.kind, knows),
            known_to_any=anyones,
        )

    def _request_along(self) -> ClaimRequest | None:
        """What to claim together with what comes in, while this session waits for it."""
        if not self._idle or self._recalled:
            return None
        self._along = self._credit
        return self._request(self._credit)

    async def _give_up(self, standing: StandingClaim) -> None:
        self._inflight.standing.remove(standing)
        if standing.made:
            with trio.CancelScope(shield=True):
                if leases := await standing.take():
                    await self._inflight.hand_back([lease.ref for lease in leases])

    async def _hand_out(self, leases: list[Lease], credit: frames.Credit) -> None:
        sent = False
        try:
            await take(self._sending)
            # From here on the worker may have it; what it never got, its next hello tells.
            sent = True
            try:
                self._sent += len(leases)
                await self._stream.send(
                    frames_codec.encode_broker_frame(frames.Assignments(tuple(leases), credit.number))
                )
            finally:
                self._sending.release()
            metrics.claims.labels("stream").inc(len(leases))
        finally:
            if not sent:
                with trio.CancelScope(shield=True):
                    await self._inflight.hand_back([lease.ref for lease in leases])

    async def _announce_stops(self) -> None:
        while True:
            await self._stops.wait()
            to_stop, self._to_stop = self._to_stop, {}
            for reason in sorted(set(to_stop.values())):
                refs = tuple(ref for ref, why in to_stop.items() if why is reason)
                await self._send(frames.Stop(refs, reason))

    async def _announce_drain(self) -> None:
        await self._dispatch.draining.wait()
        await self._send(frames.Draining())

    # ---- from the worker

    async def _receive(self, nursery: trio.Nursery, wake: Wake) -> None:
        while (frame := _decoded(await self._stream.receive())) is not None:
            self._dispatch.presence.seen(self._hello.worker_id)
            match frame:
                case frames.Credit() as credit:
                    if credit.number > self._credit.number:
                        self._recalled |= credit.total < self._credit.total
                        self._credit = credit
                        wake.set()
                case frames.Started(leases=leases):
                    await self._in_work.acquire()
                    nursery.start_soon(self._started, leases)
                case frames.Results(results=results):
                    await self._in_work.acquire()
                    nursery.start_soon(self._results, results)
                case frames.HandBack(leases=leases):
                    await self._inflight.hand_back(leases)
                case frames.Heartbeat(tasks=tasks):
                    if tasks:
                        await self._in_work.acquire()
                        nursery.start_soon(self._heartbeats, tasks)
                case frames.Hello():
                    raise Refused("INVALID_ARGUMENT", "a second hello on one stream")

    async def _started(self, leases: tuple[LeaseRef, ...]) -> None:
        try:
            await self._end_lost(leases, await self._inflight.start(leases))
        finally:
            self._in_work.release()

    async def _heartbeats(self, tasks: tuple[frames.TaskProgress, ...]) -> None:
        try:
            beats = [Heartbeat(Ref(task.id, task.fence), task.permille, task.message) for task in tasks]
            await self._end_lost([beat.ref for beat in beats], await self._inflight.heartbeat(beats))
        except StoreError as error:  # the next heartbeat may come through, or these leases end
            log.warning("heartbeats of tasks were lost", worker=self._hello.worker_id, error=str(error))
        finally:
            self._in_work.release()

    async def _end_lost(self, refs: Sequence[Ref], verdicts: Sequence[Verdict]) -> None:
        """Tell the worker which of these it runs in vain."""
        if late := [ref for ref, verdict in zip(refs, verdicts, strict=True) if verdict in _TOO_LATE]:
            self.stop(await self._inflight.lost(late), StopReason.LOST)

    async def _results(self, results: tuple[frames.Result, ...]) -> None:
        try:
            leases = [frames.lease_ref(result[:2]) for result in results]
            if all(result.status is frames.ResultStatus.COMPLETE for result in results):
                verdicts = await self._inflight.complete(leases)
                metrics.results.labels("stream", "complete").inc(len(results))
            else:
                verdicts = await self._inflight.report([_report(result) for result in results])
                for status, count in Counter(result.status for result in results).items():
                    metrics.results.labels("stream", status.name.lower()).inc(count)
            if verdicts.count(Verdict.APPLIED) < len(verdicts):
                late = [
                    result.id
                    for result, verdict in zip(results, verdicts, strict=True)
                    if verdict is not Verdict.APPLIED
                ]
                metrics.superseded_results.inc(len(late))
                worker = self._hello.worker_id
                log.info("late results refused", worker=worker, count=len(late), ids=late[:NAMED_AT_MOST])
            await self._send(frames.Taken(tuple(leases)))
        finally:
            self._in_work.release()


def _report(result: frames.Result) -> Report:
    id_, fence, status, reason, error, max_attempts, delay_s = result
    return Report(id_, fence, _REPORT_STATUSES[status], reason, error, max_attempts, delay_s)
