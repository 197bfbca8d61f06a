"""The embedded log, for installations without Kafka: topics in one SQLite file in the data directory.

Appends and commits of all callers are gathered into transactions by one thread and answered when
they are on the disk. What was appended lately is also kept in memory, so a reader that keeps up never
touches the disk; one that is behind reads batches off the Trio thread. One process owns the file.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw
import outcome
import structlog
import trio

from taskd.clock import Clock, Now
from taskd.database import apply_in_one_transaction, hold_lock
from taskd.errors import StartupError, StoreError
from taskd.groupcommit import Committer, Write, open_group_commit
from taskd.log.base import Outgoing, Partition, Record
from taskd.log.limits import MAX_RECORD_BYTES
from taskd.log.local import REVOKE_WITHIN_S, LocalLog
from taskd.log.stretch import Stretch
from taskd.log.tables import Tables

RECENT_MAX_BYTES = 64_000_000  # of all partitions together
TRIM_EVERY_MS = 10_000
TRIM_SLICE = 4_096  # rows deleted in one write: some ten milliseconds that appends may have to wait

T = TypeVar("T")
log = structlog.get_logger("taskd.log")


@asynccontextmanager
async def open_embedded(
    data_dir: Path,
    *,
    partitions: int = 1,
    retention_s: float = 86_400,
    max_record_bytes: int = MAX_RECORD_BYTES,
    clock: Clock,
    lock: bool = True,
    revoke_within_s: float = REVOKE_WITHIN_S,
) -> AsyncIterator[EmbeddedLog]:
    """Open or create `log.sqlite` in `data_dir` and serve it while the block lasts.

    `partitions`: of a topic that is created by writing to it or reading from it. `retention_s`: how long
    records stay that every group has read; unread ones stay. `lock`: take `data_dir/broker.lock`;
    False when the caller holds it already. On leaving, what was submitted is committed first.

    Raises StartupError: exit 75 when another process holds the lock, 73 when the folder cannot be
    written or the file was written by a newer taskd.
    """
    with contextlib.ExitStack() as stack:
        if lock:
            stack.enter_context(hold_lock(data_dir / "broker.lock"))
        path = data_dir / "log.sqlite"
        writing = Tables(path)
        stack.callback(writing.db.close)
        try:
            writing.prepare()
            reading = Tables(path)
            stack.callback(reading.db.close)
            storage = _SqliteStorage(writing, reading, clock, retention_s)
        except apsw.Error as error:
            raise StartupError(
                f"cannot read the log {path}: {error}. Free the disk, or restore the file.", exit_code=73
            ) from error
        async with open_group_commit(
            storage.apply, name="taskd-log", on_batch=storage.publish
        ) as storage.committer:
            yield EmbeddedLog(
                storage,
                partitions=partitions,
                max_record_bytes=max_record_bytes,
                revoke_within_s=revoke_within_s,
            )


class EmbeddedLog(LocalLog):
    """A durable log in one file. Opened by `open_embedded`."""

    def __init__(
        self, storage: _SqliteStorage, *, partitions: int, max_record_bytes: int, revoke_within_s: float
    ) -> None:
        super().__init__(
            storage,
            partitions=partitions,
            max_record_bytes=max_record_bytes,
            revoke_within_s=revoke_within_s,
        )
        self._sqlite = storage

    async def trim(self, now: Now) -> int:
        """Drop what every group has read and what is older than the retention; returns how many records.

        It also happens by itself, a slice at a time, when offsets are committed. Raises StoreError.
        """
        return await self._sqlite.trim(now)


class _SqliteStorage:
    """Names ending in `_in_thread` belong to the committing thread, everything else to Trio's."""

    on_appended: Callable[[Iterable[Partition]], None]
    committer: Committer

    def __init__(self, writing: Tables, reading: Tables, clock: Clock, retention_s: float) -> None:
        self._writing = writing
        self._reading = reading
        self._one_read = trio.CapacityLimiter(1)
        self._clock = clock
        self._retention_ms = int(retention_s * 1000)
        self._next_trim_mono_ms = 0
        self.topics: dict[str, int] = {}
        self._ids: dict[Partition, int] = {}
        self._first: dict[Partition, int] = {}
        self._recent: dict[Partition, Stretch] = {}
        self._committed: dict[str, dict[Partition, int | None]] = {}
        self._ends_in_thread: dict[Partition, int] = {}
        self._staged_in_thread: list[list[Record]] = []  # each of one partition, its offsets without gaps
        # Filled by the thread and emptied here; deque's ends are safe to share.
        self._durable: deque[list[list[Record]]] = deque()
        self._learn(reading.partitions())
        for group, partition, offset in reading.commits():
            self._committed.setdefault(group, {})[partition] = offset

    def _learn(self, partitions: Iterable[tuple[Partition, int, int, int]]) -> None:
        for partition, partition_id, first, end in partitions:
            if partition not in self._ids:
                self._ids[partition] = partition_id
                self._first[partition] = first
                self._recent[partition] = Stretch(end)
                self._ends_in_thread[partition] = end
                self.topics[partition.topic] = max(self.topics.get(partition.topic, 0), partition.number + 1)

    # In the committing thread.

    def apply(self, writes: Sequence[Write]) -> list[outcome.Outcome[object]]:
        ends = dict(self._ends_in_thread)
        self._staged_in_thread = []
        try:
            results = apply_in_one_transaction(self._writing.db, writes)
        except BaseException:
            self._ends_in_thread = ends
            raise
        self._durable.append(self._staged_in_thread)
        return results

    def _append_in_thread(self, records: Sequence[tuple[Partition, Outgoing]], now_ms: int) -> list[int]:
        made: dict[Partition, list[Record]] = {}
        offsets: list[int] = []
        for partition, (_, value, key, headers) in records:
            its = made.get(partition)
            if its is None:
                its = made[partition] = []
            offset = self._ends_in_thread[partition] + len(its)
            its.append(Record(partition, offset, now_ms, key, value, headers))
            offsets.append(offset)
        with _own_errors():
            for partition, its in made.items():
                self._writing.insert(self._ids[partition], its)
        for partition, its in made.items():
            self._ends_in_thread[partition] += len(its)
        self._staged_in_thread += made.values()
        return offsets

    # In the Trio thread.

    def publish(self, _size: int = 0, _seconds: float = 0) -> None:
        """Make what was committed readable, in the order of the offsets; called before appends return."""
        touched: set[Partition] = set()
        while self._durable:
            for records in self._durable.popleft():
                partition = records[0].partition
                self._recent[partition].extend(records)
                touched.add(partition)
        if touched:
            for partition in touched:
                self._recent[partition].shrink(RECENT_MAX_BYTES // len(self._recent))
            self.on_appended(touched)

    async def append(self, records: Sequence[tuple[Partition, Outgoing]]) -> list[int]:
        if not records:
            await trio.lowlevel.checkpoint()
            return []
        now_ms = self._clock.now().wall_ms
        offsets = await self.committer.submit(partial(self._append_in_thread, records, now_ms))
        # The readers that `publish` woke go first: what they read is on its way to a worker while the
        # answer is written, not after it.
        await trio.lowlevel.cancel_shielded_checkpoint()
        return offsets

    async def create(self, topics: Mapping[str, int]) -> None:
        def create() -> list[tuple[Partition, int, int, int]]:
            with _own_errors():
                self._writing.create(topics)
                return list(self._writing.partitions())

        self._learn(await self.committer.submit(create))

    def first(self, partition: Partition) -> int:
        return self._first[partition]

    def end(self, partition: Partition) -> int:
        return self._recent[partition].end

    def recent(
        self, partition: Partition, offset: int, max_records: int, max_bytes: int
    ) -> list[Record] | None:
        recent = self._recent[partition]
        return recent.read(offset, max_records, max_bytes) if offset >= recent.start else None

    async def read(self, partition: Partition, offset: int, max_records: int, max_bytes: int) -> list[Record]:
        # Committed and already readable are not the same moment: what lies beyond `end` is left for later.
        max_records = min(max_records, self.end(partition) - offset)
        return await self._off_thread(
            partial(self._reading.read, self._ids[partition], partition, offset, max_records, max_bytes)
        )

    async def first_at(self, partition: Partition, timestamp_ms: int) -> int:
        look_up = partial(self._reading.first_at, self._ids[partition], timestamp_ms)
        offset = await self._off_thread(look_up)
        return self.end(partition) if offset is None else offset

    async def _off_thread(self, fn: Callable[[], T]) -> T:
        def mapped() -> T:
            with _own_errors():
                return fn()

        return await trio.to_thread.run_sync(mapped, limiter=self._one_read)

    async def join(self, group: str, topics: Collection[str]) -> None:
        known = self._committed.setdefault(group, {})
        new = {p: self._ids[p] for p in self._ids if p.topic in topics and p not in known}
        if new:
            await self._write(partial(self._writing.join, group, new.values()))
            for partition in new:
                known.setdefault(partition, None)
        else:
            await trio.lowlevel.checkpoint()

    def committed(self, group: str, partition: Partition) -> int | None:
        return self._committed.get(group, {}).get(partition)

    async def commit(self, group: str, offsets: Mapping[Partition, int], metadata: str) -> None:
        rows = [(self._ids[partition], offset) for partition, offset in offsets.items()]
        await self._write(partial(self._writing.commit, group, rows, metadata))
        self._committed.setdefault(group, {}).update(offsets)
        now = self._clock.now()
        if now.mono_ms >= self._next_trim_mono_ms:
            self._next_trim_mono_ms = now.mono_ms + TRIM_EVERY_MS
            await self._trim_some(offsets, now)

    async def _trim_some(self, partitions: Iterable[Partition], now: Now) -> None:
        try:
            for partition in partitions:
                if await self._trim_slice(partition, now) == TRIM_SLICE:
                    self._next_trim_mono_ms = now.mono_ms  # there is more: go on with the next commit
        except StoreError as error:  # the commit that led here is done all the same
            log.warning("cannot drop old records", error=str(error))

    async def trim(self, now: Now) -> int:
        total = 0
        for partition in list(self._ids):
            while dropped := await self._trim_slice(partition, now):
                total += dropped
        return total

    async def _trim_slice(self, partition: Partition, now: Now) -> int:
        read_by_all = self._read_by_all(partition)
        if read_by_all <= self._first[partition] or not now.may_expire:
            await trio.lowlevel.checkpoint()
            return 0
        before_ms = now.wall_ms - self._retention_ms
        first = await self._write(
            partial(self._writing.trim, self._ids[partition], read_by_all, before_ms, TRIM_SLICE)
        )
        dropped = first - self._first[partition]
        self._first[partition] = max(first, self._first[partition])
        return max(0, dropped)

    def _read_by_all(self, partition: Partition) -> int:
        """The offset below which every group has read; 0 as long as nobody has: unread records stay."""
        offsets = [known[partition] for known in self._committed.values() if partition in known]
        return min((offset or 0 for offset in offsets), default=0)

    async def _write(self, fn: Callable[[], T]) -> T:
        def mapped() -> T:
            with _own_errors():
                return fn()

        return await self.committer.submit(mapped)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except apsw.Error as error:
        raise StoreError(f"{type(error).__name__}: {error}") from error
