"""A broker that starts on the configuration of an existing one, carried over by `taskd config import`."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest
import trio
from daemons import clean_environment, free_port, open_daemons

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.kafka]

FLAT = """
kafka_cluster: {kafka}
kafka_topic: flat-{unique}
kafka_consumer_group: brokers-{unique}
kafka_deadletter_topic: flat-{unique}-dlq
kafka_auto_offset_reset: earliest
create_missing_topics: true
db_path: {folder}/store/flat.sqlite
grpc_addr: 127.0.0.1
grpc_port: {port}
grpc_shared_secret: [first, second]
statsd_addr: 127.0.0.1:8126
"""
MAPS = """
kafka_clusters: {{main: {{address: "{kafka}"}}}}
kafka_topics:
  maps-{unique}: {{cluster: main, consumer_group: brokers-{unique}, auto_offset_reset: earliest}}
  maps-{unique}-dlq: {{cluster: main, produce_only: true}}
kafka_deadletter_topic: maps-{unique}-dlq
create_missing_topics: true
store: {{db_path: "{folder}/store/maps.sqlite", max_pending_count: 100}}
grpc_addr: 127.0.0.1
grpc_port: {port}
"""


@pytest.mark.parametrize(("style", "text"), [("flat", FLAT), ("maps", MAPS)])
async def test_an_imported_configuration_starts(
    style: str, text: str, tmp_path: Path, kafka_address: str
) -> None:
    unique = uuid.uuid4().hex[:8]
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(text.format(kafka=kafka_address, unique=unique, folder=tmp_path, port=free_port()))
    done = await trio.run_process(
        [sys.executable, "-m", "taskd", "config", "import", str(theirs)],
        env=clean_environment(),
        capture_stdout=True,
        capture_stderr=True,
    )
    ours.write_bytes(done.stdout)
    async with open_daemons(tmp_path) as daemons:
        broker = daemons.start("broker", "--config", str(ours), "--http-port", "0")
        assigned = await broker.said("partitions assigned")
        assert f"{style}-{unique}" in str(assigned["partitions"])
        assert await broker.stopped() == 0
        ours_say = [entry for entry in broker.entries() if entry["logger"].startswith("taskd")]
        assert [entry for entry in ours_say if entry["level"] in ("error", "critical")] == []
