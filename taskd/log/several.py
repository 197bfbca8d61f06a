"""Several logs as one: a reader over readers, a writer over writers. Topics have different names in each."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import trio

from taskd.errors import LogUnavailable
from taskd.log.base import Assignment, Outgoing, Partition, Position, Reader, Record, Writer


class SeveralReaders:
    """A `Reader` over the readers that `follow` adds. `sources`: their names, for messages.

    A source that is away holds up none of the others.
    """

    def __init__(self, sources: Collection[str]) -> None:
        self._events, self.assignments = trio.open_memory_channel[Assignment](math.inf)
        self._missing = set(sources)
        self._readers: list[Reader] = []
        self._of_topic: dict[str, Reader] = {}
        self._turns = 0
        self._added = trio.Event()

    async def follow(self, source: str, topics: Collection[str], reader: Reader) -> None:
        """Take part from now on, until cancelled. The caller closes `reader` after that."""
        self._readers.append(reader)
        self._of_topic.update(dict.fromkeys(topics, reader))
        self._missing.discard(source)
        self._added.set()
        try:
            async for change in reader.assignments:
                self._events.send_nowait(change)
        finally:
            self._readers.remove(reader)
            self._missing.add(source)

    async def read_batch(self, max_records: int, within_s: float) -> list[Record]:
        """What the first of the readers has; of several that have something, a share each."""
        deadline = trio.current_time() + within_s
        records: list[Record] = []
        await trio.lowlevel.checkpoint()
        while not records:
            left_s = max(0.0, deadline - trio.current_time())
            self._added = trio.Event()
            if len(self._readers) == 1 and not self._missing:
                return await self._readers[0].read_batch(max_records, left_s)
            turn = self._turn(max_records)
            share = max_records // max(1, len(turn))
            async with trio.open_nursery() as nursery:

                async def read(
                    reader: Reader, scope: trio.CancelScope = nursery.cancel_scope, share: int = share
                ) -> None:
                    found = await reader.read_batch(share, max(0.0, deadline - trio.current_time()))
                    if found:
                        records.extend(found)
                        scope.cancel()

                for reader in turn:
                    nursery.start_soon(read, reader)
                nursery.start_soon(self._wait_for_more, left_s, nursery.cancel_scope)
            if trio.current_time() >= deadline:
                break
        return records

    def _turn(self, most: int) -> list[Reader]:
        """Who is asked now: all, unless there is room for fewer records than there are readers."""
        if len(self._readers) <= most:
            return list(self._readers)
        self._turns += most
        return [self._readers[(self._turns + n) % len(self._readers)] for n in range(most)]

    async def _wait_for_more(self, within_s: float, scope: trio.CancelScope) -> None:
        with trio.move_on_after(within_s):
            await self._added.wait()
        scope.cancel()

    async def commit(self, offsets: Mapping[Partition, int], metadata: str = "") -> None:
        by_reader: dict[int, tuple[Reader, dict[Partition, int]]] = {}
        for partition, offset in offsets.items():
            reader = self._reader_of(partition)
            by_reader.setdefault(id(reader), (reader, {}))[1][partition] = offset
        if len(by_reader) == 1:
            (only,) = by_reader.values()
            await only[0].commit(only[1], metadata)
            return
        await _all([(reader.commit, (part, metadata)) for reader, part in by_reader.values()])

    async def committed(self, partition: Partition) -> int | None:
        return await self._reader_of(partition).committed(partition)

    def pause(self, partitions: Collection[Partition]) -> None:
        for reader in self._readers:
            reader.pause(reader.assigned & set(partitions))

    def resume(self, partitions: Collection[Partition]) -> None:
        for reader in self._readers:
            reader.resume(reader.assigned & set(partitions))

    async def seek(self, partition: Partition, offset: int) -> None:
        await self._reader_of(partition).seek(partition, offset)

    async def seek_to_time(self, partition: Partition, timestamp_ms: int) -> None:
        await self._reader_of(partition).seek_to_time(partition, timestamp_ms)

    async def lag(self) -> dict[Partition, int]:
        """Of every reader that can tell; LogUnavailable when none can. Who does not answer is not asked."""
        lags: dict[Partition, int] = {}

        async def measure(reader: Reader) -> None:
            lags.update(await reader.lag())

        try:
            asked = [reader for reader in self._readers if reader.healthy]
            if not asked:
                raise LogUnavailable("no log can be reached")
            await _all([(measure, (reader,)) for reader in asked])
        except LogUnavailable:
            if not lags:
                raise
        return lags

    @property
    def assigned(self) -> frozenset[Partition]:
        return frozenset().union(*(reader.assigned for reader in self._readers))

    @property
    def healthy(self) -> bool:
        return not self._missing and all(reader.healthy for reader in self._readers)

    def _reader_of(self, partition: Partition) -> Reader:
        reader = self._of_topic.get(partition.topic)
        if reader is None:
            raise LogUnavailable(f"the log of {partition} is not connected yet")
        return reader


class SeveralWriters:
    """A `Writer` that sends each record to the writer of its topic's place."""

    def __init__(self, writers: Mapping[str, Writer], place_of: Callable[[str], str]) -> None:
        self._writers = writers
        self._place_of = place_of

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        places = [self._place_of(record.topic) for record in records]
        answers: dict[str, list[Position | Exception]] = {}

        async def append_there(place: str) -> None:
            part = [record for record, its in zip(records, places, strict=True) if its == place]
            answers[place] = await self._writers[place].append(part)

        await _all([(append_there, (place,)) for place in dict.fromkeys(places)])
        following = {place: iter(part) for place, part in answers.items()}
        return [next(following[place]) for place in places]


async def _all(calls: Sequence[tuple[Callable[..., Awaitable[None]], tuple[Any, ...]]]) -> None:
    """Do all at once. Raises LogUnavailable after all have ended, when one or more did."""
    troubles: list[str] = []

    async def do(fn: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        try:
            await fn(*arguments)
        except LogUnavailable as error:
            troubles.append(str(error))

    async with trio.open_nursery() as nursery:
        for fn, arguments in calls:
            nursery.start_soon(do, fn, arguments)
    if troubles:
        raise LogUnavailable("; ".join(troubles))
