"""Read, decode, store, commit - in that order. An offset is committed only after its rows are durable.

Nobody waits for the commit, so it comes a little later, for many batches at once: an offset that the log did
not take before a crash costs duplicates, which are known by their ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import structlog
import trio

from taskd.clock import Clock
from taskd.errors import LogUnavailable, StoreError
from taskd.inflight.base import Arrival, Inserted
from taskd.inflight.writer import Inflight
from taskd.ingest.backpressure import REASONS, Limits, full, room, too_many_delayed
from taskd.ingest.decode import arrival_of
from taskd.ingest.overflow import Overflow
from taskd.ingest.raw import Decode
from taskd.locks import take
from taskd.log.base import Partition, Reader, Record, Revoked
from taskd.telemetry import metrics

READ_WAIT_S = 5.0  # how long one read waits for records; bounds how stale `last_progress` gets
NAMED_AT_MOST = 5  # ids in a log line
GO_BACK_RETRY_S = 0.5
COMMIT_AFTER_S = 0.05  # after the first of the rows is durable: until then, other batches share the commit
COMMIT_RETRY_S = (0.2, 1.0)  # first and longest pause after the log took no offsets
LAST_TRIES = 4  # before offsets are given up, at a stop or a revocation
LAST_TRIES_WITHIN_S = 1.0  # not for a log that is away
STORE_RETRY_S = (0.1, 5.0)  # first and longest pause after the store failed

log = structlog.get_logger("taskd.ingest")


class Ingest:
    """Feeds one store from one reader. Cancelling `run` loses nothing; `stop` lets it finish its batch."""

    def __init__(
        self,
        reader: Reader,
        inflight: Inflight,
        clock: Clock,
        *,
        limits: Limits,
        batch_max_records: int,
        decode: Decode = arrival_of,
        overflow: Overflow | None = None,
    ) -> None:
        self._reader = reader
        self._inflight = inflight
        self._clock = clock
        self._limits = limits
        self._batch_max_records = batch_max_records
        self._decode = decode
        self._overflow = overflow
        self._flushing = trio.Lock()  # a batch is being stored
        self._committing = trio.Lock()  # offsets are on their way: none may arrive after later ones
        self._revoked: Counter[Partition] = Counter()  # how often each was taken away
        self._left: dict[Partition, int] = {}  # read, but not stored since it was revoked: first offsets
        self._owed: dict[Partition, int] = {}  # offsets of durable rows that the log has not taken yet
        self._owes = trio.Event()
        self._stopped = False
        self._waiting = trio.CancelScope()
        self.paused: dict[str, str] = {}
        self.failing = ""
        self.last_progress_mono_ms = clock.now().mono_ms

    async def run(self) -> None:
        """Feed until `stop`; what was read by then is stored and committed first."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_assignments)
            nursery.start_soon(self._commit_owed)
            while not self._stopped:
                await self._read_once()
            await self._commit_at_last()
            nursery.cancel_scope.cancel()

    def set_limits(self, limits: Limits) -> None:
        """From the next batch on; a pause ends within a second when they leave room."""
        self._limits = limits

    def stop(self) -> None:
        self._stopped = True
        self._waiting.cancel()

    def _unless_stopped(self) -> trio.CancelScope:
        """For what may take long: `stop` cuts it short."""
        self._waiting = trio.CancelScope()
        if self._stopped:
            self._waiting.cancel()
        return self._waiting

    async def _read_once(self) -> None:
        self._progress()
        if self._left:
            await self._commit()  # or it would go back to what is stored already
            await self._go_back()
        records: list[Record] = []
        arrivals = None
        revoked_before: dict[Partition, int] = {}
        ends: dict[Partition, int] = {}
        with self._unless_stopped():
            limit = await self._wait_for_room()
            records = await self._reader.read_batch(min(limit, self._batch_max_records), READ_WAIT_S)
            ends = {record.partition: record.offset + 1 for record in records}
            revoked_before = {partition: self._revoked[partition] for partition in ends}
            if records:
                # Not while flushing: a revocation need not wait until there is room.
                arrivals = await self._admitted([self._decode(record) for record in records])
        if arrivals is None:
            return  # nothing came, or stopped while there was no room: not committed, so it is read again
        await take(self._flushing)
        try:
            # What was revoked since it was read is read again by whoever has it now, be it this reader
            # again: others may have gone on meanwhile, so it begins where the group is.
            assigned = self._reader.assigned
            mine = {p for p, times in revoked_before.items() if p in assigned and times == self._revoked[p]}
            if len(mine) < len(ends):
                for record in records:
                    if record.partition not in mine:
                        self._left.setdefault(record.partition, record.offset)
                records = [record for record in records if record.partition in mine]
                arrivals = [a for a in arrivals if Partition(a.topic, a.partition) in mine]
            if records:
                await self._store(records, arrivals, {partition: ends[partition] for partition in mine})
        finally:
            self._flushing.release()

    async def _store(
        self, records: Sequence[Record], arrivals: Sequence[Arrival], ends: Mapping[Partition, int]
    ) -> None:
        inserted = await self._insert(arrivals)
        self._count(records, arrivals, inserted)
        self._owed.update(ends)
        self._owes.set()
        if any(arrival.at_most_once for arrival in arrivals):
            await self._commit()  # now: read again by another broker, they would run a second time there
        self._progress()

    async def _go_back(self) -> None:
        """Read what was left out from where the group is; where it is nowhere yet, from what was left out."""
        for partition, offset in list(self._left.items()):
            if partition in self._reader.assigned:
                try:
                    committed = await self._reader.committed(partition)
                    await self._reader.seek(partition, offset if committed is None else committed)
                except LogUnavailable as error:
                    log.warning("cannot go back, trying again", partition=str(partition), error=str(error))
                    await trio.sleep(GO_BACK_RETRY_S)
                    continue
            del self._left[partition]

    async def _commit_owed(self) -> None:
        """Commit what is owed soon after it is, and again what was refused: without a next batch nobody else
        would, until the tombstones are gone."""
        pause_s, longest_s = COMMIT_RETRY_S
        while True:
            await self._owes.wait()
            await trio.sleep(COMMIT_AFTER_S)
            if await self._commit():
                pause_s = COMMIT_RETRY_S[0]
            else:
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)

    async def _commit_at_last(self, partitions: Collection[Partition] | None = None) -> None:
        """Commit what is owed before it is too late: whoever reads on from before it does all of it again."""
        until = trio.current_time() + LAST_TRIES_WITHIN_S
        for _ in range(LAST_TRIES):
            if await self._commit(partitions) or trio.current_time() > until:
                return
            await trio.sleep(COMMIT_RETRY_S[0])

    async def _commit(self, partitions: Collection[Partition] | None = None) -> bool:
        """Commit what is owed of these partitions, None: of all. False: the log did not take it."""
        async with self._committing:
            owed = {p: end for p, end in self._owed.items() if partitions is None or p in partitions}
            if owed:
                try:
                    await self._reader.commit(owed)
                except LogUnavailable as error:
                    # The rows are stored; read again they are known by id.
                    offsets = {str(partition): offset for partition, offset in owed.items()}
                    log.warning("offsets not committed, trying again", error=str(error), offsets=offsets)
                    return False
            for partition, end in owed.items():
                if self._owed.get(partition) == end:  # else more of it was stored meanwhile
                    del self._owed[partition]
            if not self._owed and self._owes.is_set():
                self._owes = trio.Event()
            return True

    async def _admitted(self, arrivals: list[Arrival]) -> list[Arrival]:
        """Wait until the store has room for these; some may be sent elsewhere instead."""
        if self._overflow is not None:
            arrivals = await self._overflow.divert(arrivals, self._show, self._progress)
        await self._wait_for_delayed(arrivals)
        return arrivals

    async def _insert(self, arrivals: Sequence[Arrival]) -> Inserted:
        pause_s, longest_s = STORE_RETRY_S
        while True:
            try:
                inserted = await self._inflight.insert(arrivals)
            except StoreError as error:
                self.failing = f"the store took no rows: {error}"
                log.error("store failed, trying again", error=str(error), pause_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)
            else:
                self.failing = ""
                return inserted

    async def _follow_assignments(self) -> None:
        async for change in self._reader.assignments:
            log.info(
                "partitions revoked" if isinstance(change, Revoked) else "partitions assigned",
                partitions=sorted(str(partition) for partition in change.partitions),
            )
            if isinstance(change, Revoked):
                self._revoked.update(change.partitions)
                async with self._flushing:  # what was read before is stored now
                    await self._commit_at_last(change.partitions)
                    for partition in change.partitions:
                        self._owed.pop(partition, None)
                    change.acknowledge()

    # ---- backpressure

    async def _wait_for_room(self) -> int:
        """Wait until a limit leaves room; returns for how many records."""
        reasons = full(self._inflight.counts(), self._inflight.size_bytes(), self._limits)
        if reasons:
            wake = self._inflight.watch_all()
            try:
                while reasons:
                    self._show(reasons)
                    with trio.move_on_after(1):
                        await wake.wait()
                    self._progress()  # waiting for others is not being stuck
                    reasons = full(self._inflight.counts(), self._inflight.size_bytes(), self._limits)
            finally:
                self._inflight.unwatch(wake)
        self._show({})
        return room(self._inflight.counts(), self._limits)

    async def _wait_for_delayed(self, arrivals: Sequence[Arrival]) -> None:
        with_delay = [arrival for arrival in arrivals if arrival.delay_s]
        if not with_delay:
            return
        wall_ms = self._clock.now().wall_ms
        delayed = sum((a.received_at_ms or wall_ms) + (a.delay_s or 0) * 1000 > wall_ms for a in with_delay)
        while reasons := too_many_delayed(self._inflight.counts(), delayed, self._limits):
            self._show(reasons)
            self._progress()
            await trio.sleep(0.2)
        self._show({})

    def _show(self, reasons: dict[str, str]) -> None:
        if reasons.keys() == self.paused.keys():
            self.paused = reasons
            return
        for reason in REASONS:
            metrics.backpressure.labels(reason).set(reason in reasons)
        if reasons:
            log.warning("reading pauses", **reasons)
        else:
            log.info("reading goes on")
        self.paused = reasons

    def _count(self, records: Sequence[Record], arrivals: Sequence[Arrival], inserted: Inserted) -> None:
        topic = records[0].partition.topic
        for result, count in (
            ("pending", inserted.pending),
            ("delayed", inserted.delayed),
            ("duplicate", inserted.duplicate),
            ("expired", inserted.expired),
            ("undecodable", inserted.undecodable),
            ("dropped", inserted.dropped),
            ("forwarded", inserted.forwarded),
        ):
            if count:
                metrics.ingest_records.labels(topic, result).inc(count)
        self._tell_producers_faults(inserted)
        if inserted.undecodable:
            reasons = Counter(arrival.undecodable for arrival in arrivals if arrival.undecodable)
            log.warning(
                "undecodable records are dead-lettered", count=inserted.undecodable, reasons=dict(reasons)
            )

    def _tell_producers_faults(self, inserted: Inserted) -> None:
        """Our own producer refuses such calls; these came from elsewhere."""
        if ids := inserted.shortened:
            metrics.shortened_delays.inc(len(ids))
            log.warning("delays beyond max_delay_s are shortened", count=len(ids), ids=ids[:NAMED_AT_MOST])
        if ids := inserted.beyond_expiry:
            metrics.delay_beyond_expiry.inc(len(ids))
            log.warning("records expire before their delay is over", count=len(ids), ids=ids[:NAMED_AT_MOST])

    def _progress(self) -> None:
        self.last_progress_mono_ms = self._clock.now().mono_ms
