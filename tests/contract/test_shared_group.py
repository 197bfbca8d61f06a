"""Contract §3: a broker of ours joins the consumer group of existing brokers, so that it can replace them."""

from __future__ import annotations

import pytest
import trio
from running_broker import WITHIN_S, new_id

from taskd import aio
from taskd.log.base import Partition, Reader, Revoked
from taskd.log.kafka import KafkaLog

from aiokafka import AIOKafkaConsumer  # isort: skip  # after taskd.aio, which says why
from aiokafka.coordinator.assignors.range import RangePartitionAssignor  # isort: skip
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor  # isort: skip

# Long: a group takes three seconds to form, twice.
pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.long]


async def existing_member(address: str, topic: str, group: str) -> AIOKafkaConsumer:
    """It offers both eager assignors, as existing brokers do.

    They offer `range` first; aiokafka would then join once with `range` alone, before it joins with both.
    """
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=address,
        group_id=group,
        enable_auto_commit=False,
        session_timeout_ms=6_000,
        heartbeat_interval_ms=200,
        metadata_max_age_ms=1_000,
        partition_assignment_strategy=(RoundRobinPartitionAssignor, RangePartitionAssignor),
    )
    await consumer.start()
    return consumer


async def acknowledge(reader: Reader) -> None:
    async for change in reader.assignments:
        if isinstance(change, Revoked):
            change.acknowledge()


async def test_same_both_are_members_of_one_group(kafka_address: str) -> None:
    topic, group = new_id(), new_id()
    everything = {Partition(topic, number) for number in range(4)}
    async with aio.open_loop(), trio.open_nursery() as nursery:
        log = KafkaLog(kafka_address)
        await log.ensure_topics({topic: 4})
        member = await aio.call(existing_member, kafka_address, topic, group)
        try:
            async with log.open_reader([topic], group) as ours:
                nursery.start_soon(acknowledge, ours)

                def shared() -> bool:
                    theirs = {Partition(at.topic, at.partition) for at in member.assignment()}
                    apart = not theirs & ours.assigned
                    return bool(theirs and ours.assigned and apart and theirs | ours.assigned == everything)

                with trio.fail_after(WITHIN_S):
                    while not shared():  # noqa: ASYNC110  # the other member tells nobody
                        await trio.sleep(0.05)
        finally:
            await aio.finish(member.stop, within_s=10)
        nursery.cancel_scope.cancel()
