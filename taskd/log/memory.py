"""The log in memory: the double that is shipped for tests and simulations. Nothing survives the process.

It starts no thread and opens no file, so it runs on the autojump clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import trio

from taskd.clock import Clock, SystemClock
from taskd.log.base import Outgoing, Partition, Record
from taskd.log.limits import MAX_RECORD_BYTES
from taskd.log.local import REVOKE_WITHIN_S, LocalLog
from taskd.log.stretch import Stretch


class MemoryLog(LocalLog):
    """A log in memory. `partitions`: of a topic that is created by writing to it or reading from it."""

    def __init__(
        self,
        partitions: int = 1,
        *,
        clock: Clock | None = None,
        max_record_bytes: int = MAX_RECORD_BYTES,
        revoke_within_s: float = REVOKE_WITHIN_S,
    ) -> None:
        super().__init__(
            _MemoryStorage(clock or SystemClock()),
            partitions=partitions,
            max_record_bytes=max_record_bytes,
            revoke_within_s=revoke_within_s,
        )


class _MemoryStorage:
    on_appended: Callable[[Iterable[Partition]], None]

    def __init__(self, clock: Clock) -> None:
        self.topics: dict[str, int] = {}
        self._clock = clock
        self._stretches: defaultdict[Partition, Stretch] = defaultdict(Stretch)
        self._committed: dict[tuple[str, Partition], int] = {}

    async def create(self, topics: Mapping[str, int]) -> None:
        self.topics.update(topics)
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def append(self, records: Sequence[tuple[Partition, Outgoing]]) -> list[int]:
        await trio.lowlevel.checkpoint_if_cancelled()
        now_ms = self._clock.now().wall_ms
        offsets = []
        for partition, out in records:
            stretch = self._stretches[partition]
            offsets.append(stretch.end)
            stretch.extend([Record(partition, stretch.end, now_ms, out.key, out.value, out.headers)])
        self.on_appended({partition for partition, _ in records})
        await trio.lowlevel.cancel_shielded_checkpoint()
        return offsets

    def first(self, partition: Partition) -> int:
        return self._stretches[partition].start

    def end(self, partition: Partition) -> int:
        return self._stretches[partition].end

    def recent(self, partition: Partition, offset: int, max_records: int, max_bytes: int) -> list[Record]:
        return self._stretches[partition].read(offset, max_records, max_bytes)

    async def read(self, partition: Partition, offset: int, max_records: int, max_bytes: int) -> list[Record]:
        await trio.lowlevel.checkpoint()
        return self.recent(partition, offset, max_records, max_bytes)

    async def first_at(self, partition: Partition, timestamp_ms: int) -> int:
        await trio.lowlevel.checkpoint()
        stretch = self._stretches[partition]
        later = (record.offset for record in stretch if record.timestamp_ms >= timestamp_ms)
        return next(later, stretch.end)

    async def join(self, group: str, topics: Collection[str]) -> None:
        await trio.lowlevel.checkpoint()

    def committed(self, group: str, partition: Partition) -> int | None:
        return self._committed.get((group, partition))

    async def commit(self, group: str, offsets: Mapping[Partition, int], metadata: str) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._committed.update({(group, partition): offset for partition, offset in offsets.items()})
        await trio.lowlevel.cancel_shielded_checkpoint()
