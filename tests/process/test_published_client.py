"""The published `taskbroker-client`, unmodified, works for `taskd broker`: its worker, its activations."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import trio
from daemons import HERE, ROOT, Daemons
from history import Produced
from kill_scene import TOPIC, Scene, open_scene

from taskd.log.base import Outgoing
from taskd.producer.build import outgoing
from taskd.tasks.outbox import Call

pytestmark = [pytest.mark.process, pytest.mark.slow]

# An environment of its own: its protobuf is older than the one that `make proto` generates with.
PYTHON = os.environ.get("TASKD_TEST_CLIENT_PYTHON", str(ROOT / ".venv-client" / "bin" / "python"))
VERSION = "0.20.30"
SCRIPT = str(HERE / "published_client.py")
RUNS = {"retried": 3, "fails": 2, "fails_once": 1}  # of its policies; its tasks without one run once
FAULTS = ("StatusCode.UNKNOWN", "StatusCode.INTERNAL", "StatusCode.UNIMPLEMENTED")
Batch = list[tuple[Produced, Outgoing]]


@pytest.fixture(scope="module", autouse=True)
def _client_is_there() -> None:
    if not Path(PYTHON).exists() and "MAKELEVEL" not in os.environ:
        pytest.skip(f"no taskbroker-client: {PYTHON} does not exist; `make setup` makes it")
    asked = "from importlib.metadata import version; print(version('taskbroker-client'))"
    found = subprocess.run([PYTHON, "-c", asked], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == VERSION, f"{PYTHON}: {found.stdout}{found.stderr}"


def by_our_producer(count: int, deadline_s: int = 3) -> Batch:
    """Activations that name the client's tasks, as `ExternalNamespace`s of applications on taskd would."""
    batch = []
    for number in range(count):
        kind = ("noop", "nap", *RUNS)[number % 5]
        key = f"{kind}-{uuid.uuid4().hex}"
        call = Call(
            id=uuid.uuid4().hex,
            namespace="published",
            taskname=kind,
            application="published",
            topic="",
            args=(),
            kwargs={"key": key},
            processing_deadline_s=deadline_s,
            max_attempts=RUNS[kind] + 1 if kind in RUNS else None,
            dead_letter=kind in RUNS,
            compression_type="zstd" if number % 2 else "plaintext",
        )
        record = outgoing(call, time.time_ns() // 1_000_000, TOPIC)
        batch.append((Produced(key, kind, call.id, record.value), record))
    return batch


def by_the_client(count: int) -> Batch:
    """Activations as the client itself serializes them; its Kafka records have no key."""
    said = subprocess.run(
        [PYTHON, SCRIPT, "activations", str(count)], capture_output=True, text=True, check=True
    ).stdout
    batch = []
    for line in said.splitlines():
        made = json.loads(line)
        value = base64.b64decode(made.pop("value"))
        batch.append((Produced(value=value, **made), Outgoing(TOPIC, value)))
    return batch


class Client:
    """Its worker, as a daemon of the test."""

    def __init__(self, scene: Scene, daemons: Daemons) -> None:
        command = [PYTHON, SCRIPT, "work", scene.address, "2"]
        more = {"TASKD_TEST_RECORD": str(scene.record), "PYTHONPATH": str(HERE), "GRPC_VERBOSITY": "NONE"}
        self.daemon = daemons.run(command, "client", more=more)

    def check(self) -> None:
        """No call was answered by what a fault inside a handler would look like."""
        wrong = [line for line in self.daemon.lines if line.strip().endswith(FAULTS)]
        assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize("source", [by_our_producer, by_the_client])
async def test_its_worker_runs_what_is_produced(tmp_path: Path, source: object) -> None:
    assert callable(source)
    async with open_scene(tmp_path) as scene:
        broker = scene.broker()
        client = Client(scene, scene.daemons)
        await scene.produce_these(*source(100))
        history = await scene.close_the_books(broker, client.daemon)
        client.check()
        assert history.duplicates() == 0
        ran = {line.key for line in history.lines if line.word == "START"}
        assert ran == {produced.key for produced in history.produced}
        retries = [seen for seen in history.statuses.values() if seen.outcome == "retried"]
        assert len(retries) == 20 * (2 + 1), "two of each `retried`, one of each `fails`"
        assert len(history.files.dead_letters) == 40, "all `fails` and `fails_once`"


async def test_the_broker_is_killed_meanwhile(tmp_path: Path) -> None:
    """The client lets a broker alone for 20 s that it could not reach three times, and keeps its results.

    Unary calls know no fences and no heartbeats: leases shorter than that would all end, and their
    activations run again.
    """
    async with open_scene(tmp_path) as scene:
        broker = scene.broker()
        client = Client(scene, scene.daemons)
        batch = by_our_producer(200, deadline_s=25)
        await scene.produce_these(*batch)
        with trio.fail_after(60):
            while len(scene.lines()) < 60:  # noqa: ASYNC110  # files give no event to wait for
                await trio.sleep(0.02)
        await broker.killed()
        broker = scene.broker()
        history = await scene.close_the_books(broker, client.daemon)
        client.check()
        assert history.stopped_by_crashes() == 0
        assert any(line.endswith("StatusCode.UNAVAILABLE") for line in client.daemon.lines), "it noticed"
