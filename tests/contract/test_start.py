"""How soon a broker that starts has what waits in its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from running_broker import activation, new_id

from taskd import aio
from taskd.clock import SystemClock
from taskd.log.base import Log, Outgoing
from taskd.log.embedded import open_embedded
from taskd.log.kafka import KafkaLog

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.long, pytest.mark.kafka]

RECORDS = 10_000
PARTITIONS = 4
WITHIN_S = 5.0


async def fill(log: Log, topic: str) -> None:
    await log.ensure_topics({topic: PARTITIONS, "taskd-dlq": 1})
    records = [
        Outgoing(topic, activation(new_id(), "app", parameters_bytes=bytes(150))) for _ in range(RECORDS)
    ]
    async with log.open_writer() as writer:
        answers = await writer.append(records)
    assert not [answer for answer in answers if isinstance(answer, Exception)]


@pytest.mark.parametrize("kind", ["embedded", "kafka"])
def test_ten_thousand_records_are_visible_within_five_seconds(
    start_broker: Any, kind: str, kafka_address: str, tmp_path: Path
) -> None:
    """Visible in the view that operators read. Of these, Kafka has a new group wait three seconds."""
    topic, data_dir = f"start-{new_id()}", tmp_path / "data"

    async def prepare() -> None:
        async with aio.open_loop():
            if kind == "kafka":
                await fill(KafkaLog(kafka_address), topic)
                return
            limits = {"retention_s": 3_600, "max_record_bytes": 10_000_000}
            async with open_embedded(data_dir, partitions=1, clock=SystemClock(), **limits) as log:
                await fill(log, topic)

    trio.run(prepare)
    broker = start_broker(
        data_dir=data_dir,
        STORE__MAX_PENDING_COUNT=str(2 * RECORDS),
        LOG__KIND=kind,
        LOG__CLUSTERS__DEFAULT__ADDRESS=kafka_address,
        LOG_LEVEL="info",
        **{f"LOG__TOPICS__{topic.upper()}__PARTITIONS": str(PARTITIONS)},
    )
    broker.until(lambda: broker.visible() >= RECORDS)
    took_s = broker.age_s()
    print(f"{kind}: {took_s:.2f} s")
    assert took_s < WITHIN_S
