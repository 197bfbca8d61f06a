"""Topics, writers and readers of the logs that live in this process, over a small `Storage`.

`memory` and `embedded` differ only in the storage. Readers wait on events, never by polling, so an
idle log costs nothing and a batch is returned as soon as one record is there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from typing import Protocol

import structlog
import trio

from taskd.errors import ConfigError, LogUnavailable, StoreError
from taskd.log.base import Assigned, Assignment, Outgoing, Partition, Position, Record, Revoked
from taskd.log.groups import Group
from taskd.log.limits import MAX_RECORD_BYTES, READ_MAX_BYTES, is_topic, refusal
from taskd.log.scope import open_background

REVOKE_WITHIN_S = 15.0  # half of what a member of a Kafka group is given here, so that both feel alike
READ_AGAIN_S = 1.0  # after the disk failed

log = structlog.get_logger("taskd.log")


class Storage(Protocol):
    """Where the records and the committed offsets are. Offsets of a partition have no gaps.

    What is not `async` answers from memory. Coroutines raise StoreError when the disk failed; then
    nothing of that call happened.
    """

    on_appended: Callable[[Iterable[Partition]], None]
    """Called in the Trio thread when records are readable, before `append` returns."""

    @property
    def topics(self) -> Mapping[str, int]: ...

    async def create(self, topics: Mapping[str, int]) -> None: ...

    async def append(self, records: Sequence[tuple[Partition, Outgoing]]) -> list[int]:
        """The offsets of the records, once they are durable."""
        ...

    def first(self, partition: Partition) -> int: ...

    def end(self, partition: Partition) -> int: ...

    def recent(
        self, partition: Partition, offset: int, max_records: int, max_bytes: int
    ) -> list[Record] | None:
        """Records from `offset` on when they are at hand; None: ask `read`."""
        ...

    async def read(
        self, partition: Partition, offset: int, max_records: int, max_bytes: int
    ) -> list[Record]: ...

    async def first_at(self, partition: Partition, timestamp_ms: int) -> int:
        """Offset of the first record at or after that time; the end when there is none."""
        ...

    async def join(self, group: str, topics: Collection[str]) -> None:
        """Remember that `group` reads `topics`: what it has not committed past is kept from now on."""
        ...

    def committed(self, group: str, partition: Partition) -> int | None: ...

    async def commit(self, group: str, offsets: Mapping[Partition, int], metadata: str) -> None: ...


class LocalLog:
    """A `Log` over a `Storage`. Topics that are written or read before they exist are created."""

    def __init__(
        self,
        storage: Storage,
        *,
        partitions: int = 1,
        max_record_bytes: int = MAX_RECORD_BYTES,
        revoke_within_s: float = REVOKE_WITHIN_S,
    ) -> None:
        self._storage = storage
        self._partitions = partitions
        self._max_record_bytes = max_record_bytes
        self._revoke_within_s = revoke_within_s
        self._groups: dict[str, Group] = {}
        self._turn = count()
        storage.on_appended = self._wake_readers

    def open_reader(
        self, topics: Collection[str], group: str, *, offset_reset: str = "earliest"
    ) -> AbstractAsyncContextManager[LocalReader]:
        return self._open_reader(frozenset(topics), group, offset_reset)

    @asynccontextmanager
    async def _open_reader(
        self, topics: frozenset[str], group: str, offset_reset: str
    ) -> AsyncIterator[LocalReader]:
        await self._ensure(topics)
        await self._storage.join(group, topics)
        members = self._groups.setdefault(group, Group(self._storage.topics))
        async with open_background() as nursery:
            reader = LocalReader(
                self._storage, members, group, topics, offset_reset, self._revoke_within_s, nursery
            )
            try:
                yield reader
            finally:
                reader.leave()

    @asynccontextmanager
    async def open_writer(self) -> AsyncIterator[LocalLog]:
        yield self

    async def ensure_topics(self, topics: Mapping[str, int]) -> None:
        for topic in topics:
            if not is_topic(topic):
                raise ConfigError(
                    f"expected a topic name of at most 249 letters, digits, '.', '_' and '-', found {topic!r}"
                )
        missing = {topic: number for topic, number in topics.items() if topic not in self._storage.topics}
        if missing:
            await self._storage.create(missing)
            for group in self._groups.values():
                group.rebalance()
        await trio.lowlevel.checkpoint()

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        answers: list[Position | Exception | None] = [refusal(r, self._max_record_bytes) for r in records]
        taken = [record for record, answer in zip(records, answers, strict=True) if answer is None]
        try:
            await self._ensure({record.topic for record in taken})
            placed = [(self._partition(record), record) for record in taken]
            offsets = await self._storage.append(placed)
        except StoreError as error:
            # Each its own object: answers are raised, and a traceback belongs to one of them.
            return [answer or LogUnavailable(f"the log's disk failed: {error}") for answer in answers]
        positions = iter([Position(p, offset) for (p, _), offset in zip(placed, offsets, strict=True)])
        return [answer if answer is not None else next(positions) for answer in answers]

    async def _ensure(self, topics: Iterable[str]) -> None:
        if any(topic not in self._storage.topics for topic in topics):
            await self.ensure_topics(dict.fromkeys(topics, self._partitions))

    def _partition(self, record: Outgoing) -> Partition:
        number = next(self._turn) if record.key is None else zlib.crc32(record.key)
        return Partition(record.topic, number % self._storage.topics[record.topic])

    def _wake_readers(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            for group in self._groups.values():
                owner = group.owner(partition)
                if isinstance(owner, LocalReader):
                    owner.wake()


class LocalReader:
    """A member of a group; a `Reader`. Closed by the block that opened it."""

    def __init__(
        self,
        storage: Storage,
        members: Group,
        group: str,
        topics: frozenset[str],
        offset_reset: str,
        revoke_within_s: float,
        nursery: trio.Nursery,
    ) -> None:
        # Unbounded, because a group changes hands in one synchronous step; a few events per change.
        self._events, self.assignments = trio.open_memory_channel[Assignment](math.inf)
        self.topics = topics
        self.healthy = True
        self._storage = storage
        self._members = members
        self._group = group
        self._offset_reset = offset_reset
        self._revoke_within_s = revoke_within_s
        self._nursery = nursery
        self._positions: dict[Partition, int] = {}
        self._paused: set[Partition] = set()
        self._ready = trio.Event()
        self._id = members.join(self)

    def leave(self) -> None:
        self._members.leave(self._id)
        self._positions.clear()
        self._events.close()

    # The group's side.

    def given(self, partitions: frozenset[Partition]) -> None:
        for partition in partitions:
            committed = self._storage.committed(self._group, partition)
            self._positions[partition] = self._reset(partition) if committed is None else committed
        self._events.send_nowait(Assigned(partitions))
        self.wake()

    def taken(self, partitions: frozenset[Partition], acknowledge: Callable[[], None]) -> None:
        for partition in partitions:
            self._positions.pop(partition, None)
            self._paused.discard(partition)
        acknowledged = trio.Event()

        def once() -> None:
            acknowledged.set()
            acknowledge()

        self._events.send_nowait(Revoked(partitions, once))
        self._nursery.start_soon(self._release_in_time, partitions, acknowledged, acknowledge)

    async def _release_in_time(
        self, partitions: frozenset[Partition], acknowledged: trio.Event, acknowledge: Callable[[], None]
    ) -> None:
        with trio.move_on_after(self._revoke_within_s):
            await acknowledged.wait()
            return
        log.warning(
            "a revoked partition was taken away without acknowledgement",
            partitions=sorted(map(str, partitions)),
            within_s=self._revoke_within_s,
        )
        acknowledge()

    def wake(self) -> None:
        self._ready.set()

    # The caller's side.

    async def read_batch(self, max_records: int, within_s: float) -> list[Record]:
        deadline = trio.current_time() + within_s
        await trio.lowlevel.checkpoint()
        while True:
            self._ready = trio.Event()
            records = await self._read_ready(max_records)
            if records:
                return records
            with trio.move_on_at(deadline) as scope:
                await self._ready.wait()
            if scope.cancelled_caught:
                return []

    async def _read_ready(self, max_records: int) -> list[Record]:
        """What can be had now. Positions move only where no await follows, so cancelling loses nothing."""
        records: list[Record] = []
        left_bytes = READ_MAX_BYTES
        for partition in list(self._positions):
            position = self._readable(partition)
            if position is None:
                continue
            batch = self._storage.recent(partition, position, max_records - len(records), left_bytes)
            if batch is None:
                if records:
                    break  # rather answer with what is at hand than wait for the disk
                batch = await self._from_disk(partition, position, max_records)
            self._took(partition, batch)
            records += batch
            left_bytes -= sum(len(record.value) for record in batch)
            if len(records) >= max_records or left_bytes <= 0:
                break
        return records

    async def _from_disk(self, partition: Partition, position: int, max_records: int) -> list[Record]:
        try:
            batch = await self._storage.read(partition, position, max_records, READ_MAX_BYTES)
            self.healthy = True
        except StoreError as error:
            self.healthy = False
            log.warning("cannot read", partition=str(partition), offset=position, error=str(error))
            await trio.sleep(READ_AGAIN_S)
            batch = []
            self.wake()
        # The partition may have been revoked, paused or moved by a seek while the disk was busy.
        if self._positions.get(partition) == position and partition not in self._paused:
            return batch
        self.wake()
        return []

    def _readable(self, partition: Partition) -> int | None:
        if partition in self._paused or partition not in self._positions:
            return None
        position = self._positions[partition]
        end = self._storage.end(partition)
        if not self._storage.first(partition) <= position <= end:
            position = self._positions[partition] = self._reset(partition)
        return position if position < end else None

    def _took(self, partition: Partition, batch: list[Record]) -> None:
        if batch:
            # To the end of the line: next time the other partitions come first.
            self._positions.pop(partition)
            self._positions[partition] = batch[-1].offset + 1

    def _reset(self, partition: Partition) -> int:
        storage = self._storage
        return storage.end(partition) if self._offset_reset == "latest" else storage.first(partition)

    async def commit(self, offsets: Mapping[Partition, int], metadata: str = "") -> None:
        lost = [partition for partition in offsets if not self._members.holds(self._id, partition)]
        if lost:
            raise LogUnavailable(
                f"{', '.join(map(str, lost))} no longer belongs to this reader of group {self._group}; "
                "whoever has it now reads again from the last commit"
            )
        try:
            await self._storage.commit(self._group, offsets, metadata)
        except StoreError as error:
            raise LogUnavailable(f"offsets were not committed: {error}") from error

    async def committed(self, partition: Partition) -> int | None:
        await trio.lowlevel.checkpoint()
        return self._storage.committed(self._group, partition)

    def pause(self, partitions: Collection[Partition]) -> None:
        self._paused |= self._positions.keys() & set(partitions)

    def resume(self, partitions: Collection[Partition]) -> None:
        self._paused -= set(partitions)
        self.wake()

    async def seek(self, partition: Partition, offset: int) -> None:
        await trio.lowlevel.checkpoint()
        self._move(partition, offset)

    async def seek_to_time(self, partition: Partition, timestamp_ms: int) -> None:
        try:
            offset = await self._storage.first_at(partition, timestamp_ms)
        except StoreError as error:
            raise LogUnavailable(f"cannot look up a time in {partition}: {error}") from error
        self._move(partition, offset)

    def _move(self, partition: Partition, offset: int) -> None:
        if partition not in self._positions:
            raise LogUnavailable(f"cannot seek in {partition}: it is not assigned to this reader now")
        self._positions[partition] = offset
        self.wake()

    async def lag(self) -> dict[Partition, int]:
        await trio.lowlevel.checkpoint()
        return {p: max(0, self._storage.end(p) - offset) for p, offset in self._positions.items()}

    @property
    def assigned(self) -> frozenset[Partition]:
        return frozenset(self._positions)
