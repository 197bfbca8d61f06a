"""What only a real coordinator knows: static members, outages that the group outlives, a fleet restarted."""

from __future__ import annotations

from uuid import uuid4

import pytest
import trio
from real_kafka import Unavailable, open_apache_kafka
from torture_rebalance import Plan, torture

from taskd import aio
from taskd.log import kept
from taskd.log.base import Assigned, Outgoing, Position, Reader, Record, Revoked
from taskd.log.kafka import KafkaLog
from taskd.testing.kafka import is_real_cluster

WITHIN_S = 60
SEED = 20_260_101

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.slow,
    pytest.mark.skipif(not is_real_cluster(), reason="needs Apache Kafka: run `make test-kafka`"),
]


async def follow(reader: Reader, seen: list[Assigned | Revoked]) -> None:
    async for change in reader.assignments:
        seen.append(change)
        if isinstance(change, Revoked):
            change.acknowledge()


async def all_of(reader: Reader, number: int) -> None:
    with trio.fail_after(WITHIN_S):
        while len(reader.assigned) < number:
            await reader.read_batch(1, 0.05)


async def test_a_static_member_that_restarts_moves_no_partitions(kafka_address: str) -> None:
    topic = f"t-{uuid4().hex}"
    async with aio.open_loop():
        log = KafkaLog(kafka_address)
        await log.ensure_topics({topic: 4})
        async with (
            log.open_reader([topic], topic, group_instance_id="one") as one,
            trio.open_nursery() as nursery,
        ):
            changes: list[Assigned | Revoked] = []
            nursery.start_soon(follow, one, changes)
            await all_of(one, 4)
            async with log.open_reader([topic], topic, group_instance_id="two") as two:
                await all_of(two, 2)
                await all_of(one, 2)
                shares = one.assigned, two.assigned
                del changes[:]
            async with log.open_reader([topic], topic, group_instance_id="two") as two:
                await all_of(two, 2)
                assert (one.assigned, two.assigned) == shares
                assert changes == []
            nursery.cancel_scope.cancel()


async def test_kafka_killed_and_started_again_keeps_group_and_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "RETRY_MOST_S", 0.5)
    monkeypatch.setattr("taskd.log.kafka.reader.PROBE_EVERY_S", 0.5)
    sent: set[bytes] = set()
    read: list[Record] = []
    try:
        manager = open_apache_kafka()
        kafka = await trio.to_thread.run_sync(manager.__enter__)
    except Unavailable as error:
        pytest.skip(str(error))
    try:
        async with aio.open_loop():
            log = KafkaLog(kafka.listeners.plaintext)
            await log.ensure_topics({"t": 2})
            async with (
                log.open_writer() as writer,
                log.open_reader(["t"], "g") as reader,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(follow, reader, [])

                async def write(first: int) -> None:
                    for number in range(first, first + 50):
                        value = b"%d" % number
                        while True:
                            (answer,) = await writer.append([Outgoing("t", value)])
                            if isinstance(answer, Position):
                                break
                        sent.add(value)

                async def read_all() -> None:
                    with trio.fail_after(WITHIN_S):
                        while {record.value for record in read} < sent or not sent:
                            records = await reader.read_batch(100, 0.5)
                            read.extend(records)
                            if records:
                                await reader.commit({r.partition: r.offset + 1 for r in records})

                await write(0)
                await read_all()
                kafka.kill()
                with trio.fail_after(WITHIN_S):
                    while reader.healthy:
                        await reader.read_batch(1, 0.1)
                nursery.start_soon(write, 50)
                await trio.to_thread.run_sync(kafka.start)
                with trio.fail_after(WITHIN_S):
                    while len(sent) < 100:
                        read.extend(await reader.read_batch(100, 0.1))
                await read_all()
                with trio.fail_after(WITHIN_S):
                    while not reader.healthy:
                        await reader.read_batch(1, 0.1)
                nursery.cancel_scope.cancel()
    finally:
        await trio.to_thread.run_sync(manager.__exit__, None, None, None)
    # Not each once: an append that was given up after 15 s was tried again by a new producer.
    assert {record.value for record in read} == {b"%d" % n for n in range(100)}


@pytest.mark.process
@pytest.mark.parametrize("static", [False, True])
async def test_brokers_restarted_under_load_store_each_record_once(kafka_address: str, static: bool) -> None:
    plan = Plan(3, 8, 5_000, 3, (1.0, 4.0), capacity=2_500, static=static)
    report = await torture(kafka_address, plan, SEED)
    assert report.problems == [], f"seed {SEED}: {report}"
