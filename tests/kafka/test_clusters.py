"""One broker, topics on several clusters: in the clear, behind TLS and a password, and one that is away."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest
import trio
from real_kafka import Listeners

from taskd import aio
from taskd.config.schema import BrokerConfig
from taskd.daemon.broker import run_broker
from taskd.log.base import Outgoing
from taskd.log.kafka import KafkaLog
from taskd.producer.build import build
from taskd.tasks.outbox import Call

WITHIN_S = 60

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


async def stored(store: Path, number: int) -> set[tuple[str, str]]:
    """Topic and application of so many rows, as soon as they are there."""
    with trio.fail_after(WITHIN_S):
        while True:
            with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as reading:
                rows = reading.execute(
                    "SELECT topic, application FROM inflight JOIN lane USING (lane)"
                ).fetchall()
            if len(rows) >= number:
                return set(rows)
            await trio.sleep(0.1)


async def test_several_topics_on_several_clusters_feed_one_store(
    listeners: Listeners, tmp_path: Path
) -> None:
    name = uuid4().hex[:8]
    open_, behind, away = f"open-{name}", f"behind-{name}", f"away-{name}"
    raw = {"namespace": "n", "application": "foreign", "taskname": "t", "processing_deadline_s": 5}
    config = BrokerConfig.model_validate(
        {
            "data_dir": tmp_path,
            "rpc": {"port": 0},
            "http": {"port": 0},
            "log": {
                "kind": "kafka",
                "clusters": {
                    "default": {"address": listeners.plaintext},
                    "behind": {
                        "address": listeners.sasl_ssl,
                        "security_protocol": "SASL_SSL",
                        "sasl_mechanism": "SCRAM-SHA-512",
                        "sasl_username": listeners.username,
                        "sasl_password": listeners.password,
                        "ssl_ca_location": listeners.ca,
                    },
                    "away": {"address": "127.0.0.1:1"},
                },
                "topics": {
                    open_: {"consumer_group": name, "partitions": 3},
                    behind: {"consumer_group": name, "cluster": "behind", "raw": raw},
                    away: {"cluster": "away"},
                    f"dlq-{name}": {"produce_only": True},
                },
                "retry_topic": open_,
                "deadletter_topic": f"dlq-{name}",
            },
        }
    )
    call = Call(uuid4().hex, "n", "t", "ours", "", (), {})
    async with trio.open_nursery() as nursery:
        stop = trio.Event()

        async def run(task_status: trio.TaskStatus[object]) -> None:
            await run_broker(config, stop=stop, task_status=task_status)

        await nursery.start(run)
        async with aio.open_loop():
            log = KafkaLog(listeners.plaintext)  # both names lead to one Kafka, which need not be known here
            await log.ensure_topics({open_: 3, behind: 1})
            async with log.open_writer() as writer:
                await writer.append([Outgoing(open_, build(call, 0)), Outgoing(behind, b"payload")])
        assert await stored(tmp_path / "inflight.sqlite", 2) == {(open_, "ours"), (behind, "foreign")}
        stop.set()
