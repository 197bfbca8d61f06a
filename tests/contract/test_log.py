"""What every log does. One suite for the log in memory, the embedded one and Kafka."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from uuid import uuid4

import pytest
import trio
import trio.testing

from taskd import aio
from taskd.clock import SystemClock
from taskd.errors import LogUnavailable
from taskd.log.base import (
    Assigned,
    Log,
    Outgoing,
    Partition,
    Position,
    Reader,
    Record,
    Rejected,
    Revoked,
    Writer,
)
from taskd.log.embedded import open_embedded
from taskd.log.kafka import KafkaLog
from taskd.log.memory import MemoryLog
from taskd.testing.kafka import is_real_cluster

WITHIN_S = 30  # far more than anything takes; only a hang reaches it
MAX_BYTES = 200_000


@dataclass
class Rig:
    """One kind of log. `open` may be entered again and again and finds what was there."""

    kind: str
    open: Callable[[], AbstractAsyncContextManager[Log]]
    names: Iterator[str] = field(default_factory=lambda: (f"t{n}-{uuid4().hex[:12]}" for n in count()))

    def name(self) -> str:
        return next(self.names)


def memory() -> Rig:
    log = MemoryLog(max_record_bytes=MAX_BYTES)

    @asynccontextmanager
    async def open_() -> AsyncIterator[Log]:
        yield log

    return Rig("memory", open_)


def embedded(data_dir: Path) -> Rig:
    return Rig("embedded", lambda: open_embedded(data_dir, max_record_bytes=MAX_BYTES, clock=SystemClock()))


def kafka(address: str) -> Rig:
    @asynccontextmanager
    async def open_() -> AsyncIterator[Log]:
        async with aio.open_loop():
            yield KafkaLog(
                address,
                # Tansu lets half of it pass at each join; a real cluster takes no less than 6 s.
                session_timeout_ms=6_000 if is_real_cluster() else 1_000,
                max_message_bytes=MAX_BYTES,
                idempotent=is_real_cluster(),  # Tansu answers UnknownError to it
            )

    return Rig("kafka", open_)


@pytest.fixture(params=["memory", "embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    if request.param == "kafka":
        return kafka(request.getfixturevalue("kafka_address"))
    return memory() if request.param == "memory" else embedded(tmp_path)


@pytest.fixture
def exact_rig(rig: Rig) -> Rig:
    """A log that tells the truth about latest offsets and times."""
    if rig.kind == "kafka" and not is_real_cluster():
        pytest.skip("Tansu reports wrong latest offsets and knows no times; name a cluster to check this")
    return rig


async def positions(writer: Writer, *records: Outgoing) -> list[Position]:
    answers = await writer.append(records)
    assert all(isinstance(answer, Position) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, Position)]


async def read(reader: Reader, number: int) -> list[Record]:
    """Exactly so many records, in the order they came."""
    records: list[Record] = []
    with trio.fail_after(WITHIN_S):
        while len(records) < number:
            records += await reader.read_batch(number - len(records), 5)
    return records


async def given(reader: Reader, number: int) -> frozenset[Partition]:
    """Follow the assignments, acknowledging at once, until the reader has so many partitions."""
    with trio.fail_after(WITHIN_S):
        while len(reader.assigned) != number or reader.assignments.statistics().current_buffer_used:
            event = await reader.assignments.receive()
            if isinstance(event, Revoked):
                event.acknowledge()
    return reader.assigned


def values(records: list[Record]) -> list[bytes]:
    return [record.value for record in records]


async def test_order_in_a_partition_and_positions(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 3})
        async with log.open_writer() as writer, log.open_reader([topic], group) as reader:
            sent = [
                Outgoing(
                    topic, b"%d" % number, key=b"key %d" % (number % 7), headers=(("n", b"%d" % number),)
                )
                for number in range(100)
            ]
            lay = await positions(writer, *sent)
            records = await read(reader, 100)
    by_place = {(record.partition, record.offset): record for record in records}
    assert len(by_place) == 100
    for out, place in zip(sent, lay, strict=True):
        found = by_place[place.partition, place.offset]
        assert (found.key, found.value, found.headers) == (out.key, out.value, out.headers)
        assert found.timestamp_ms > 1_600_000_000_000
    for partition in {place.partition for place in lay}:
        offsets = [record.offset for record in records if record.partition == partition]
        assert offsets == sorted(offsets)
    for key in {out.key for out in sent}:
        assert len({record.partition for record in records if record.key == key}) == 1
    assert len({place.partition for place in lay}) > 1


async def test_bytes_come_back_identical(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    odd = [
        Outgoing(topic, b"", key=None),
        Outgoing(topic, b"", key=b""),
        Outgoing(topic, bytes(range(256)), key=b"\x00\xff"),
        Outgoing(topic, b"v", key=b"k", headers=(("h", b"\x00\xff"), ("h", b""), ("é", b"2"))),
    ]
    async with rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer, log.open_reader([topic], group) as reader:
            await positions(writer, *odd)
            records = await read(reader, len(odd))
    assert [(r.key, r.value, r.headers) for r in records] == [(o.key, o.value, o.headers) for o in odd]


async def test_records_without_key_are_spread(rig: Rig) -> None:
    topic = rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 2})
        async with log.open_writer() as writer:
            lay = await positions(writer, *(Outgoing(topic, b"v") for _ in range(64)))
    assert {place.partition for place in lay} == {Partition(topic, 0), Partition(topic, 1)}


async def test_what_was_committed_is_not_read_again(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    partition = Partition(topic, 0)
    async with rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer:
            await positions(writer, *(Outgoing(topic, b"%d" % number) for number in range(5)))
        async with log.open_reader([topic], group) as reader:
            await given(reader, 1)
            assert await reader.committed(partition) is None
            await read(reader, 5)
            await reader.commit({partition: 3}, metadata="a word, é")
            assert await reader.committed(partition) == 3
    async with rig.open() as log, log.open_reader([topic], group) as reader:
        await given(reader, 1)
        assert await reader.committed(partition) == 3
        assert values(await read(reader, 2)) == [b"3", b"4"]


async def test_groups_do_not_know_each_other(rig: Rig) -> None:
    topic = rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer:
            await positions(writer, Outgoing(topic, b"for both"))
        async with log.open_reader([topic], rig.name()) as one, log.open_reader([topic], rig.name()) as other:
            assert values(await read(one, 1)) == values(await read(other, 1)) == [b"for both"]


async def test_one_reader_of_several_topics(rig: Rig) -> None:
    topics = sorted([rig.name(), rig.name()])
    async with rig.open() as log:
        await log.ensure_topics(dict.fromkeys(topics, 1))
        async with log.open_writer() as writer, log.open_reader(topics, rig.name()) as reader:
            await positions(writer, *(Outgoing(topic, topic.encode()) for topic in topics))
            assert sorted(values(await read(reader, 2))) == [topic.encode() for topic in topics]
            assert reader.assigned == {Partition(topic, 0) for topic in topics}


async def test_revoke_share_and_take_over(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    everything = {Partition(topic, number) for number in range(4)}
    async with rig.open() as log:
        await log.ensure_topics({topic: 4})
        async with log.open_writer() as writer, log.open_reader([topic], group) as second:
            async with log.open_reader([topic], group) as first:
                await given_all(first, second, everything)
                assert first.assigned
                assert second.assigned
            assert await given(second, 4) == everything
            await positions(
                writer, *(Outgoing(topic, b"%d" % number, b"%d" % number) for number in range(40))
            )
            assert len(await read(second, 40)) == 40


async def given_all(first: Reader, second: Reader, everything: set[Partition]) -> None:
    """Both follow their assignments until they share everything and nothing twice."""
    with trio.fail_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            shared = trio.Event()

            async def follow(reader: Reader) -> None:
                async for event in reader.assignments:
                    if isinstance(event, Revoked):
                        event.acknowledge()
                    both = first.assigned | second.assigned
                    if both == everything and first.assigned and second.assigned:
                        shared.set()

            nursery.start_soon(follow, first)
            nursery.start_soon(follow, second)
            await shared.wait()
            nursery.cancel_scope.cancel()
    assert not first.assigned & second.assigned


async def test_a_revoke_waits_for_its_acknowledgement(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 2})
        async with log.open_writer() as writer, log.open_reader([topic], group) as first:
            assert len(await given(first, 2)) == 2
            await positions(
                writer, *(Outgoing(topic, b"%d" % number, b"%d" % number) for number in range(20))
            )
            records = await read(first, 20)
            async with log.open_reader([topic], group) as second:
                with trio.fail_after(WITHIN_S):
                    event = await first.assignments.receive()
                assert isinstance(event, Revoked)
                assert not first.assigned & event.partitions
                assert await second.read_batch(10, 0.3) == []
                assert not second.assigned & event.partitions
                # Time to flush and commit; whoever comes after goes on behind it.
                ends = {r.partition: r.offset + 1 for r in records if r.partition in event.partitions}
                await first.commit(ends)
                event.acknowledge()
                mine = await given(second, 1)
                assert mine <= event.partitions
                await positions(writer, *(Outgoing(topic, b"new", b"%d" % number) for number in range(20)))
                fresh = await read(second, 1)
                assert values(fresh) == [b"new"]


async def test_pause_keeps_the_position(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 2})
        async with log.open_writer() as writer, log.open_reader([topic], group) as reader:
            await given(reader, 2)
            (place, *_) = await positions(writer, Outgoing(topic, b"1", b"k"))
            paused = {place.partition}
            assert values(await read(reader, 1)) == [b"1"]
            reader.pause(paused)
            await positions(writer, Outgoing(topic, b"2", b"k"))
            assert await reader.read_batch(10, 0.3) == []
            reader.pause(reader.assigned)
            assert await reader.read_batch(10, 0) == []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(resume_when_blocked, reader)
                assert values(await read(reader, 1)) == [b"2"]
            assert reader.assigned == {Partition(topic, 0), Partition(topic, 1)}


async def resume_when_blocked(reader: Reader) -> None:
    await trio.testing.wait_all_tasks_blocked()
    reader.resume(reader.assigned)


async def test_seek_to_an_offset(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    partition = Partition(topic, 0)
    async with rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer, log.open_reader([topic], group) as reader:
            await positions(writer, *(Outgoing(topic, b"%d" % number) for number in range(10)))
            await read(reader, 4)
            await reader.seek(partition, 8)
            assert values(await read(reader, 2)) == [b"8", b"9"]
            await reader.seek(partition, 0)
            assert values(await read(reader, 10)) == [b"%d" % number for number in range(10)]
            with pytest.raises(LogUnavailable):
                await reader.seek(Partition(topic, 77), 0)


async def test_seek_to_a_time(exact_rig: Rig) -> None:
    topic, group = exact_rig.name(), exact_rig.name()
    partition = Partition(topic, 0)
    async with exact_rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer, log.open_reader([topic], group) as reader:
            await positions(writer, Outgoing(topic, b"first"))
            (first,) = await read(reader, 1)
            last = first
            while last.timestamp_ms == first.timestamp_ms:
                await positions(writer, Outgoing(topic, b"later"))
                (last,) = await read(reader, 1)
            await reader.seek_to_time(partition, last.timestamp_ms)
            assert await read(reader, 1) == [last]
            await reader.seek_to_time(partition, 0)
            assert await read(reader, 1) == [first]
            await reader.seek_to_time(partition, last.timestamp_ms + 3_600_000)
            assert await reader.read_batch(10, 0.2) == []
            await positions(writer, Outgoing(topic, b"after"))
            assert values(await read(reader, 1)) == [b"after"]


async def test_lag_and_latest(exact_rig: Rig) -> None:
    topic, group = exact_rig.name(), exact_rig.name()
    partition = Partition(topic, 0)
    async with exact_rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer:
            await positions(writer, *(Outgoing(topic, b"old") for _ in range(5)))
            async with log.open_reader([topic], group) as reader:
                await given(reader, 1)
                assert await reader.lag() == {partition: 5}
                await read(reader, 2)
                assert await reader.lag() == {partition: 3}
            async with log.open_reader([topic], exact_rig.name(), offset_reset="latest") as reader:
                await given(reader, 1)
                assert await reader.lag() == {partition: 0}
                await positions(writer, Outgoing(topic, b"new"))
                assert values(await read(reader, 1)) == [b"new"]


@pytest.mark.parametrize("key", [None, b"k"])
async def test_a_large_batch(rig: Rig, key: bytes | None) -> None:
    topic, group = rig.name(), rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer, log.open_reader([topic], group) as reader:
            lay = await positions(writer, *(Outgoing(topic, b"%d" % number, key) for number in range(5_000)))
            assert [place.offset for place in lay] == list(range(5_000))
            with trio.fail_after(WITHIN_S):
                assert len(await reader.read_batch(100, 20)) <= 100
            await reader.seek(Partition(topic, 0), 0)
            records = await read(reader, 5_000)
    assert values(records) == [b"%d" % number for number in range(5_000)]


async def test_many_records_of_all_sizes_lie_where_it_is_said(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 3})
        async with log.open_writer() as writer, log.open_reader([topic], group) as reader:
            sent = [
                Outgoing(
                    topic, b"%d " % number + bytes(150_000 if number % 20 == 7 else number), b"%d" % number
                )
                for number in range(300)
            ]
            lay = await positions(writer, *sent)
            records = {(record.partition, record.offset): record for record in await read(reader, 300)}
    assert [records[place.partition, place.offset].value for place in lay] == [out.value for out in sent]
    for number in range(3):
        own = [place.offset for place in lay if place.partition.number == number]
        assert own == list(range(len(own)))


async def test_what_never_fits_is_rejected_alone(rig: Rig) -> None:
    topic = rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer:
            before, large, nameless, after = await writer.append(
                [
                    Outgoing(topic, b"before"),
                    Outgoing(topic, bytes(MAX_BYTES + 1)),
                    Outgoing("no topic has blanks", b"v"),
                    Outgoing(topic, b"after"),
                ]
            )
            assert await writer.append([]) == []
    assert isinstance(before, Position)
    assert isinstance(after, Position)
    assert isinstance(large, Rejected)
    assert str(MAX_BYTES) in str(large)
    assert isinstance(nameless, Rejected)


async def test_topics_are_ensured_once(rig: Rig) -> None:
    topic, later = rig.name(), rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 2})
        await log.ensure_topics({topic: 3, later: 1})
        async with log.open_reader([topic], rig.name()) as reader:
            with trio.fail_after(WITHIN_S):
                event = await reader.assignments.receive()
            assert event == Assigned(frozenset({Partition(topic, 0), Partition(topic, 1)}))
            assert reader.healthy


async def test_cancelling_a_read_loses_nothing(rig: Rig) -> None:
    topic, group = rig.name(), rig.name()
    async with rig.open() as log:
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer, log.open_reader([topic], group) as reader:
            await given(reader, 1)
            got: list[Record] = []
            for number in range(20):
                await positions(writer, Outgoing(topic, b"%d" % number))
                with trio.move_on_after(0.001 * (number % 5)):
                    got += await reader.read_batch(10, 5)
            got += await read(reader, 20 - len(got))
    assert values(got) == [b"%d" % number for number in range(20)]
