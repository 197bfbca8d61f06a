"""Our worker works for a broker that it shares nothing with but the published protocol.

The published broker itself is a program of another language, which no package index has; a broker
of grpcio and the published schema, written after the contract, stands in.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from daemons import HERE, Daemon, Daemons, free_port, install_plugin, open_daemons, python_path
from history import Produced, parse
from kill_scene import TOPIC, make
from recorded_async import awaits
from recorded_tasks import RECORD
from test_published_client import (
    PYTHON,
    _client_is_there,  # noqa: F401  # the fixture that looks for the client and its schema
)

from taskd.producer.build import outgoing

pytestmark = [pytest.mark.process, pytest.mark.slow]

SECRET = "super secret"
FAILURE, RETRY, COMPLETE = 3, 4, 5
EXPECTED = {
    "noop": (COMPLETE, 0, 0),
    "nap": (COMPLETE, 0, 0),
    "retried": (RETRY, 4, 0),
    "fails": (RETRY, 3, 0),
    "fails_once": (FAILURE, 0, 0),
    "unknown": (FAILURE, 0, 0),
    "awaits": (COMPLETE, 0, 0),
}


def foreign(daemons: Daemons, *arguments: str) -> Daemon:
    more = {"TASKD_TEST_SECRET": SECRET, "GRPC_VERBOSITY": "NONE", "PYTHONPATH": ""}
    return daemons.run([PYTHON, str(HERE / "foreign_broker.py"), *arguments], "foreign", more=more)


def made(rng: random.Random, kind: str) -> Produced:
    if kind != "awaits":
        return make(rng, kind)[0]
    key = f"{kind}-{rng.getrandbits(64):016x}"
    call = awaits.to_call(kwargs={"key": key})
    return Produced(key, kind, call.id, outgoing(call, time.time_ns() // 1_000_000, TOPIC).value)


@pytest.mark.parametrize("protocol", ["pull", "push"])
async def test_what_it_hands_out_runs_once_and_is_reported_in_its_terms(
    tmp_path: Path, protocol: str
) -> None:
    for module in ("recorded_tasks", "recorded_async"):
        install_plugin(tmp_path / "plugin", module.replace("_", "-"), module)
    record = tmp_path / "record"
    record.touch()
    rng = random.Random(3)
    produced = [made(rng, kind) for kind in list(EXPECTED) * 10]
    activations = json.dumps([base64.b64encode(one.value).decode() for one in produced])
    port = free_port()
    environment = {
        RECORD: str(record),
        "TASKD_POOLS__DEFAULT__APPLICATION": "kill-tests",
        "TASKD_POOLS__DEFAULT__SECRETS": json.dumps([SECRET]),
        "TASKD_POOLS__DEFAULT__LISTEN__PORT": str(port),
    }
    path = {"PYTHONPATH": python_path(tmp_path / "plugin", HERE)}
    async with open_daemons(tmp_path, path) as daemons:
        target = [f"127.0.0.1:{port}"] if protocol == "push" else []
        broker = foreign(daemons, protocol, *target, activations)
        address = f"127.0.0.1:{(await broker.said('listens'))['port']}"
        arguments = ("--protocol", protocol, "--broker", address, "--slots", "4")
        worker = daemons.start("worker", *arguments, more=environment)
        await broker.said("status", count=len(produced))
        assert await worker.stopped() == 0
        statuses = broker.entries("status")
        assert broker.entries("wrong") == []
    found = {
        entry["id"]: (entry["status"], entry["max_attempts"], entry["delay_on_retry"]) for entry in statuses
    }
    assert found == {one.id: EXPECTED[one.kind] for one in produced}
    assert len(statuses) == len(produced), "no result was given twice"
    starts = Counter(line.id for line in parse(record.read_text()) if line.word == "START")
    assert starts == {one.id: 1 for one in produced if one.kind != "unknown"}
