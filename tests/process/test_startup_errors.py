"""What keeps a daemon from starting is a sentence and an exit code; what may pass is waited for."""

from __future__ import annotations

import random
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from daemons import HERE, Daemon, Daemons, free_port, install_plugin, open_daemons, python_path
from kill_scene import make, open_scene

pytestmark = [pytest.mark.process, pytest.mark.slow]

CONFIG, CANNOT_CREATE, TAKEN = 78, 73, 75
BROKEN = """\
stor:
  max_pending_count: 5
rpc:
  prot: 5
upkeep:
  interval_s: soon
log_level: loud
"""
ANY_PORTS = ("--rpc-port", "0", "--http-port", "0")


@pytest.fixture
async def daemons(tmp_path: Path) -> AsyncIterator[Daemons]:
    async with open_daemons(tmp_path) as opened:
        yield opened


async def refused(daemon: Daemon, code: int) -> str:
    """What it said when it did not start."""
    assert await daemon.ended() == code, f"{daemon}\n{daemon.tail()}"
    said = "\n".join(line for line in daemon.lines if not line.startswith("{"))
    assert "Traceback" not in said
    assert "this is a bug" not in said
    return said


# ---- a sentence and an exit code


@pytest.mark.parametrize("listener", ["rpc", "http"])
async def test_a_port_is_taken(daemons: Daemons, tmp_path: Path, listener: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (free,) = {"rpc", "http"} - {listener}
        ports = (f"--{listener}-port", port, f"--{free}-port", "0")
        said = await refused(daemons.start("broker", "--data-dir", str(tmp_path / "data"), *ports), TAKEN)
    assert f"127.0.0.1:{port}" in said


@pytest.mark.parametrize("folder", ["a file/data", "/proc/data"])
async def test_the_data_folder_cannot_be_written(daemons: Daemons, tmp_path: Path, folder: str) -> None:
    (tmp_path / "a file").touch()
    path = tmp_path / folder  # an absolute one replaces the first
    said = await refused(daemons.start("broker", "--data-dir", str(path), *ANY_PORTS), CANNOT_CREATE)
    assert str(path) in re.sub(r"\s+", " ", said)


async def test_a_log_that_is_no_database(daemons: Daemons, tmp_path: Path) -> None:
    """Nothing can stand in for it: who started the broker must say what is to be done."""
    file = tmp_path / "log.sqlite"
    file.write_bytes(b"not a database " * 1_000)
    said = await refused(daemons.start("broker", "--data-dir", str(tmp_path), *ANY_PORTS), CANNOT_CREATE)
    assert str(file) in said


async def test_two_brokers_on_one_folder(daemons: Daemons, tmp_path: Path) -> None:
    first = daemons.start("broker", "--data-dir", str(tmp_path), *ANY_PORTS)
    await first.said("broker listens")
    second = daemons.start("broker", "--data-dir", str(tmp_path), *ANY_PORTS)
    said = await refused(second, TAKEN)
    assert str(first.pid) in said
    await first.killed()
    third = daemons.start("broker", "--data-dir", str(tmp_path), *ANY_PORTS)
    await third.said("broker listens")  # a dead broker holds nothing


async def test_a_broken_configuration(daemons: Daemons, tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text(BROKEN)
    said = await refused(daemons.start("broker", "--config", str(file)), CONFIG)
    for expected in ("stor", "store", "prot", "port", "interval_s", "soon", "log_level", "loud"):
        assert re.search(rf"\b{expected}\b", said), f"{expected} is not in\n{said}"
    for line in (1, 4, 6, 7):
        assert f"{file}:{line}" in said.replace("\n", ""), said


async def test_a_configuration_that_is_not_there(daemons: Daemons, tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    assert str(file) in await refused(daemons.start("broker", "--config", str(file)), CONFIG)


async def test_an_unknown_pool(daemons: Daemons, tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("pools:\n  default: {slots: 1}\n  webhooks: {slots: 1}\n")
    said = await refused(daemons.start("worker", "--config", str(file), "--pool", "webhook"), CONFIG)
    assert "default, webhooks" in said
    assert "`webhooks`?" in said


# ---- what may pass is waited for


async def test_a_worker_whose_broker_is_not_there(daemons: Daemons, tmp_path: Path) -> None:
    port = free_port()
    worker = daemons.start("worker", "--broker", f"127.0.0.1:{port}", "--slots", "1")
    await worker.said("broker lost")
    await worker.said("broker not reached", count=2)
    ports = ("--rpc-port", str(port), "--http-port", "0")
    broker = daemons.start("broker", "--data-dir", str(tmp_path / "data"), *ports)
    await worker.said("broker connected")
    await broker.killed()
    await worker.said("broker not reached", count=3)
    assert await worker.stopped() == 0, worker.tail()


async def test_a_broker_whose_kafka_is_not_there(daemons: Daemons, tmp_path: Path) -> None:
    kafka = {"TASKD_LOG__KIND": "kafka", "TASKD_LOG__CLUSTERS__DEFAULT__ADDRESS": f"127.0.0.1:{free_port()}"}
    broker = daemons.start("broker", "--data-dir", str(tmp_path / "data"), *ANY_PORTS, more=kafka)
    await broker.said("broker listens")
    await broker.said("cannot reach Kafka", count=2)
    assert await broker.stopped() == 0, broker.tail()


# ---- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("what", "ready"),
    [("broker", "broker listens"), ("worker", "broker connected"), ("dev", "broker connected")],
)
async def test_idle_daemons_stop_with_0(
    daemons: Daemons, tmp_path: Path, what: str, ready: str, number: signal.Signals
) -> None:
    port = str(free_port())
    folder = ("--data-dir", str(tmp_path / "data"), "--rpc-port", port, "--http-port", "0")
    if what == "worker":
        broker = daemons.start("broker", *folder)
        await broker.said("broker listens")
        stopping = daemons.start("worker", "--broker", f"127.0.0.1:{port}")
    else:
        stopping = daemons.start(what, *folder)
    await stopping.said(ready)
    assert await stopping.stopped(number) == 0, stopping.tail()
    assert not [entry for entry in stopping.entries() if entry["level"] in ("warning", "error")]


async def test_a_broker_stops_under_load(tmp_path: Path) -> None:
    """What runs is waited for and its result taken; what waits is there after the next start."""
    async with open_scene(tmp_path) as scene:
        broker, worker = scene.broker(), scene.worker(slots=2)
        rng = random.Random(1)
        first = make(rng, "nap", seconds=1)
        await worker.said("broker connected")
        await scene.produce_these(first)
        await scene.started(first[0].key)
        await scene.produce_these(*(make(rng, "nap", seconds=0.02) for _ in range(200)))
        assert await broker.stopped() == 0, broker.tail()
        assert broker.entries("drained")
        assert not broker.entries("stopping while workers still hold activations")
        assert any(line.key == first[0].key and line.word == "END" for line in scene.lines())
        history = await scene.close_the_books(scene.broker(), worker)
        assert history.duplicates() == 0


async def test_a_worker_stops_under_load(tmp_path: Path) -> None:
    """What runs is finished, what waits is handed back: nothing runs twice, no attempt is lost."""
    async with open_scene(tmp_path) as scene:
        broker, worker = scene.broker(), scene.worker(slots=2)
        batch = [make(random.Random(number), "nap", seconds=0.05) for number in range(100)]
        await scene.produce_these(*batch)
        await scene.started(batch[20][0].key)
        assert await worker.stopped() == 0, worker.tail()
        assert not worker.entries("left behind")
        history = await scene.close_the_books(broker, scene.worker())
        assert history.duplicates() == 0
        assert {seen.attempts for seen in history.statuses.values()} == {1}


async def test_the_grace_ends(tmp_path: Path) -> None:
    """Who is left is named by id, and is not lost: the broker knows the lease at its next start."""
    async with open_scene(tmp_path, TASKD_DRAIN_GRACE_S="0.5") as scene:
        broker, worker = scene.broker(), scene.worker(slots=1)
        slow = make(random.Random(1), "nap", seconds=4)
        await scene.produce_these(slow)
        await scene.started(slow[0].key)
        assert await broker.stopped() == 0, broker.tail()
        assert broker.entries("stopping while workers still hold activations")[0]["ids"] == [slow[0].id]
        history = await scene.close_the_books(scene.broker(), worker)
        assert history.duplicates() == 0


async def test_a_second_signal_stops_now(tmp_path: Path) -> None:
    async with open_scene(tmp_path) as scene:
        broker, worker = scene.broker(), scene.worker(slots=1)
        slow = make(random.Random(1), "nap", seconds=4)
        await scene.produce_these(slow)
        await scene.started(slow[0].key)
        broker.send(signal.SIGTERM)
        await broker.said("draining")
        assert await broker.stopped(signal.SIGINT) == 130, broker.tail()
        await scene.close_the_books(scene.broker(), worker)


# ---- plugins


async def test_a_plugin_that_cannot_be_imported(tmp_path: Path) -> None:
    async with open_scene(tmp_path) as scene:
        broken = tmp_path / "broken"
        install_plugin(broken, "broken-plugin", "broken_tasks", "import no_such_module_anywhere\n")
        more = {"PYTHONPATH": python_path(broken, tmp_path / "plugin", HERE)}
        listed = scene.daemons.start("plugins", "list", more=more)
        assert await listed.ended() == 1
        said = "\n".join(listed.lines)
        for expected in ("broken-plugin 1.0", "no_such_module_anywhere", "recorded-tasks"):
            assert expected in said
        broker = scene.broker()
        worker = scene.worker(slots=1, more=more)
        error = await worker.said("tasks could not be imported")
        assert "broken-plugin 1.0" in error["plugin"]
        assert "no_such_module_anywhere" in error["error"]
        await scene.produce_these(make(random.Random(1), "noop"))
        await scene.close_the_books(broker, worker)
