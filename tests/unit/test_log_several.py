"""Several logs behave as one: nobody waits for one that is away, and each record goes where its topic is."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from taskd.errors import LogUnavailable
from taskd.log.base import Assigned, Outgoing, Partition, Position, Revoked
from taskd.log.memory import MemoryLog
from taskd.log.several import SeveralReaders, SeveralWriters
from taskd.testing.clock import TrioClock


@asynccontextmanager
async def several(logs: Mapping[str, MemoryLog]) -> AsyncIterator[SeveralReaders]:
    """One reader of the topic of each log's name."""
    reader = SeveralReaders(list(logs))
    async with trio.open_nursery() as nursery:
        for name, log in logs.items():
            nursery.start_soon(follow, reader, name, log)
        for _ in logs:
            change = await reader.assignments.receive()
            assert isinstance(change, Assigned)
        yield reader
        nursery.cancel_scope.cancel()


async def follow(reader: SeveralReaders, name: str, log: MemoryLog) -> None:
    async with log.open_reader([name], "g") as opened:
        await reader.follow(name, [name], opened)


async def append(log: MemoryLog, topic: str, *values: bytes) -> None:
    async with log.open_writer() as writer:
        await writer.append([Outgoing(topic, value) for value in values])


@pytest.fixture
def logs(autojump_clock: Any) -> dict[str, MemoryLog]:
    return {name: MemoryLog(clock=TrioClock()) for name in ("a", "b")}


async def test_what_any_has_is_read_at_once(logs, autojump_clock):
    async with several(logs) as reader:
        for name in ("a", "b", "a"):
            await append(logs[name], name, name.encode())
            before = trio.current_time()
            (record,) = await reader.read_batch(10, 5)
            assert (record.value, trio.current_time()) == (name.encode(), before)
        assert await reader.read_batch(10, 5) == []
        assert trio.current_time() == before + 5


async def test_never_more_than_was_asked_for(logs, autojump_clock):
    for name, log in logs.items():
        await append(log, name, *[b"x"] * 20)
    async with several(logs) as reader:
        found = {}
        for most in (1, 1, 1, 3, 7, 2, 2):
            records = await reader.read_batch(most, 1)
            assert 0 < len(records) <= most
            for record in records:
                assert record.offset == found.get(record.partition, -1) + 1
                found[record.partition] = record.offset
        assert set(found) == {Partition("a", 0), Partition("b", 0)}


async def test_offsets_lag_and_seeks_go_to_whom_they_concern(logs, autojump_clock):
    for name, log in logs.items():
        await append(log, name, b"1", b"2")
    a, b = Partition("a", 0), Partition("b", 0)
    async with several(logs) as reader:
        assert reader.assigned == {a, b}
        assert reader.healthy
        assert await reader.lag() == {a: 2, b: 2}
        await reader.commit({a: 1, b: 2})
        assert (await reader.committed(a), await reader.committed(b)) == (1, 2)
        reader.pause([a])
        assert {record.partition for record in await reader.read_batch(10, 1)} == {b}
        reader.resume([a])
        await reader.seek(b, 1)
        offsets = []
        while records := await reader.read_batch(10, 1):
            offsets += [(record.partition, record.offset) for record in records]
        assert sorted(offsets) == [(a, 0), (a, 1), (b, 1)]


async def test_a_source_that_is_away_holds_nobody_up(logs, autojump_clock):
    reader = SeveralReaders(["a", "b"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, reader, "a", logs["a"])
        await append(logs["a"], "a", b"1")
        (record,) = await reader.read_batch(10, 60)
        assert (record.value, trio.current_time()) == (b"1", 0)
        assert not reader.healthy
        with pytest.raises(LogUnavailable, match="b/0 is not connected"):
            await reader.commit({Partition("b", 0): 1, Partition("a", 0): 1})
        await append(logs["b"], "b", b"2")

        async def come_later() -> None:
            await trio.sleep(7)
            await follow(reader, "b", logs["b"])

        nursery.start_soon(come_later)
        (record,) = await reader.read_batch(10, 60)
        assert (record.value, trio.current_time()) == (b"2", 7)
        assert reader.healthy
        nursery.cancel_scope.cancel()


async def test_a_revocation_comes_through_to_be_acknowledged(autojump_clock):
    logs = {"a": MemoryLog(partitions=2, clock=TrioClock())}
    async with several(logs) as reader, logs["a"].open_reader(["a"], "g") as other:
        with trio.fail_after(60):
            change = await reader.assignments.receive()
            assert isinstance(change, Revoked)
            change.acknowledge()
            assert isinstance(await other.assignments.receive(), Assigned)


class Broken:
    async def commit(self, offsets, metadata=""):
        raise LogUnavailable("broken")

    async def lag(self):
        raise LogUnavailable("broken")

    def __init__(self) -> None:
        _, self.assignments = trio.open_memory_channel(math.inf)
        self.assigned = frozenset({Partition("c", 0)})
        self.healthy = False


async def test_one_that_fails_fails_alone(logs, autojump_clock):
    async with several({"a": logs["a"]}) as reader, trio.open_nursery() as nursery:
        nursery.start_soon(reader.follow, "c", ["c"], Broken())
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LogUnavailable, match="broken"):
            await reader.commit({Partition("c", 0): 1, Partition("a", 0): 1})
        assert await reader.committed(Partition("a", 0)) == 1
        assert await reader.lag() == {Partition("a", 0): 0}
        nursery.cancel_scope.cancel()


async def test_each_record_goes_where_its_topic_is(logs, autojump_clock):
    async with logs["a"].open_writer() as a, logs["b"].open_writer() as b:
        writer = SeveralWriters({"a": a, "b": b}, lambda topic: topic[0])
        answers = await writer.append([Outgoing(topic, b"x") for topic in ("b1", "a", "b1", "a", "b2")])
    assert answers == [
        Position(Partition(topic, 0), offset)
        for topic, offset in (("b1", 0), ("a", 0), ("b1", 1), ("a", 1), ("b2", 0))
    ]
