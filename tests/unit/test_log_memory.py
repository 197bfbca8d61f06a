"""The log in memory on virtual time: what the contract suite cannot ask of a real clock."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from taskd.errors import ConfigError, LogUnavailable
from taskd.log.base import Assigned, Outgoing, Partition, Revoked
from taskd.log.memory import MemoryLog

HOUR_S = 3_600


async def test_a_reader_that_does_not_acknowledge_loses_its_partition_all_the_same(
    autojump_clock: trio.testing.MockClock,
) -> None:
    log = MemoryLog(partitions=2, revoke_within_s=15)
    async with log.open_reader(["t"], "g") as first:
        async with log.open_reader(["t"], "g") as second:
            began = trio.current_time()
            event = await second.assignments.receive()
            assert trio.current_time() - began == pytest.approx(15)
            assert isinstance(event, Assigned)
            assert first.assigned.isdisjoint(event.partitions)
            with pytest.raises(LogUnavailable, match="no longer belongs"):
                await first.commit(dict.fromkeys(event.partitions, 1))
            assert isinstance(first.assignments.receive_nowait(), Assigned)
            revoked = first.assignments.receive_nowait()
            assert isinstance(revoked, Revoked)
            revoked.acknowledge()  # too late, and harmless
            assert second.assigned == event.partitions
        assert len(first.assigned) == 2


async def test_a_batch_comes_as_soon_as_one_record_is_there(autojump_clock: trio.testing.MockClock) -> None:
    log = MemoryLog()

    async def append_later() -> None:
        await trio.sleep(HOUR_S)
        await log.append([Outgoing("t", b"v")])

    async with log.open_reader(["t"], "g") as reader, trio.open_nursery() as nursery:
        began = trio.current_time()
        nursery.start_soon(append_later)
        assert [record.value for record in await reader.read_batch(1_000, 10 * HOUR_S)] == [b"v"]
        assert trio.current_time() - began == pytest.approx(HOUR_S)
        assert await reader.read_batch(1_000, HOUR_S) == []
        assert trio.current_time() - began == pytest.approx(2 * HOUR_S)


async def test_nothing_to_wait_for_still_answers_what_is_ready(
    autojump_clock: trio.testing.MockClock,
) -> None:
    log = MemoryLog()
    async with log.open_reader(["t"], "g") as reader:
        await log.append([Outgoing("t", b"v")])
        assert len(await reader.read_batch(1_000, 0)) == 1
        assert await reader.read_batch(1_000, 0) == []


async def test_busy_partitions_do_not_starve_the_others(autojump_clock: trio.testing.MockClock) -> None:
    log = MemoryLog()
    await log.ensure_topics({"a": 1, "b": 1})
    async with log.open_reader(["a", "b"], "g") as reader:
        await log.append([Outgoing("a", b"v") for _ in range(100)] + [Outgoing("b", b"v")])
        topics = [(await reader.read_batch(10, 1))[0].partition.topic for _ in range(2)]
    assert sorted(topics) == ["a", "b"]


async def test_a_committed_offset_out_of_range_is_reset(autojump_clock: trio.testing.MockClock) -> None:
    log = MemoryLog()
    await log.append([Outgoing("t", b"1"), Outgoing("t", b"2")])
    for offset_reset, expected in (("earliest", [b"1", b"2"]), ("latest", [])):
        async with log.open_reader(["t"], offset_reset, offset_reset=offset_reset) as reader:
            await reader.commit({Partition("t", 0): 99})
        async with log.open_reader(["t"], offset_reset, offset_reset=offset_reset) as reader:
            assert [record.value for record in await reader.read_batch(10, 1)] == expected


async def test_an_error_of_the_block_is_not_wrapped(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with MemoryLog().open_reader(["t"], "g"):
            raise ValueError("mine")


async def test_a_batch_is_bounded_in_bytes(autojump_clock: trio.testing.MockClock) -> None:
    log = MemoryLog()
    async with log.open_reader(["t"], "g") as reader:
        await log.append([Outgoing("t", bytes(9_000_000)) for _ in range(3)])
        assert [len(await reader.read_batch(100, 1)) for _ in range(2)] == [2, 1]


async def test_an_impossible_topic_is_a_matter_of_configuration(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(ConfigError, match="at most 249 letters"):
        await MemoryLog().ensure_topics({"a b": 1})
