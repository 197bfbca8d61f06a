"""Contract §8 on a running broker: orders by the command line, the file of switches, its mistakes."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trio
from daemons import clean_environment
from running_broker import RunningBroker

from taskd import aio
from taskd.admin.orders import SERVICE
from taskd.log.base import Reader, Revoked
from taskd.log.kafka import KafkaLog
from taskd.testing.kafka import open_local_kafka
from taskd.wire.envelope import scan
from taskd.wire.generated.taskd.v1 import ListSwitchesRequest

EMPTY = "drop_task_killswitch: []\ndemoted_namespaces: []\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("switches") / "switches.yaml"
    path.write_text(EMPTY)
    return path


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, file: Path) -> Iterator[RunningBroker]:
    settings = {"SWITCHES__FILE": str(file), "LOG__TOPICS": json.dumps({"taskd": {}, "read-too": {}})}
    settings["LOG__RETRY_TOPIC"] = "taskd"
    with RunningBroker(tmp_path_factory.mktemp("broker") / "data", settings) as running:
        yield running


def order(broker: RunningBroker, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taskd", *arguments, "--socket", str(broker.data_dir / "admin.sock")]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)


def written(broker: RunningBroker, file: Path, text: str, message: str, **more: str) -> float:
    """Replace the file and return after how many seconds the broker said `message` for the first time."""
    assert not broker.entries(message, **more)
    began = time.monotonic()
    file.write_text(text)
    broker.said(message, **more)
    return time.monotonic() - began


def test_pause_and_resume_by_the_command_line(broker: RunningBroker) -> None:
    done = order(
        broker, "pause", "application=paused", "--reason", "a move", "--for", "2h", "--author", "ann"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pause application=paused, until 20")
    id_ = broker.add("paused")
    other = broker.add("other")
    assert broker.get_task("paused") is None
    assert (task := broker.get_task()) is not None
    assert task.id == other
    (told,) = [entry for entry in broker.entries("switch set") if entry["kind"] == "pause"]
    assert (told["by"], told["reason"], told["subject"]) == ("ann", "a move", "application=paused")
    listed = json.loads(order(broker, "switches", "--json").stdout)
    assert [(switch["application"], switch["reason"]) for switch in listed] == [("paused", "a move")]
    broker.operate("resume", "application=paused", "--reason", "moved")
    assert (task := broker.get_task("paused")) is not None
    assert task.id == id_
    assert broker.said("switch taken back")["because"] == "moved"
    again = order(broker, "resume", "application=paused")
    assert (again.returncode, "no such pause" in again.stderr) == (1, True)


def test_the_socket_is_for_the_brokers_user_only(broker: RunningBroker) -> None:
    assert stat.S_IMODE((broker.data_dir / "admin.sock").stat().st_mode) == 0o600
    with pytest.raises(grpc.RpcError) as refused:  # and orders are not taken where workers connect
        broker.call(f"/{SERVICE}/ListSwitches", bytes(ListSwitchesRequest()))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_killswitch_by_the_command_line(broker: RunningBroker) -> None:
    waiting = broker.add("shop", taskname="doomed")
    broker.operate("killswitch", "add", "doomed", "--reason", "sends twice")
    broker.became(waiting, "gone")
    assert broker.history(waiting) == ["pending", "dropped", "gone"]
    assert broker.history(broker.add("shop", taskname="doomed"))[0] == "dropped"
    assert "killswitch task=doomed" in order(broker, "killswitch", "list").stdout
    broker.operate("killswitch", "remove", "doomed")
    assert broker.history(broker.add("shop", taskname="doomed")) == ["pending"]


def test_a_change_of_the_file_holds_within_a_second(broker: RunningBroker, file: Path) -> None:
    waiting = broker.add("shop", taskname="listed")
    took_s = []
    for name in ("first", "second", "listed"):  # on a busy machine one of them may be late
        text = f"drop_task_killswitch: [{name}]\ndemoted_namespaces: []\n"
        took_s.append(written(broker, file, text, "switch set", subject=f"task={name}"))
    assert min(took_s) < 1
    broker.became(waiting, "gone")
    wrong = order(broker, "killswitch", "remove", "listed")
    assert (wrong.returncode, "switched by the file" in wrong.stderr) == (1, True)


def test_an_invalid_file_changes_nothing_and_is_told_in_full(broker: RunningBroker, file: Path) -> None:
    text = "drop_task_killswitch: [1, {name: 2}]\n"
    written(broker, file, text, "the switches that it set before hold")
    problems = [entry["problem"] for entry in broker.entries("file of switches is not valid")]
    assert len(problems) == 3
    assert broker.metric("taskd_switch_file_valid") == 0
    assert broker.history(broker.add("shop", taskname="listed"))[0] == "dropped"
    file.unlink()
    broker.until(lambda: len(broker.entries("the switches that it set before hold")) == 2)
    broker.process.send_signal(signal.SIGHUP)  # which never stops it, and has the trouble told again
    broker.until(lambda: len(broker.entries("the switches that it set before hold")) == 3)
    written(broker, file, EMPTY, "switch taken back", subject="task=listed")
    broker.until(lambda: broker.metric("taskd_switch_file_valid") == 1)
    assert broker.history(broker.add("shop", taskname="listed")) == ["pending"]


def test_demoted_namespaces_go_to_their_topic(broker: RunningBroker, file: Path) -> None:
    waiting = broker.add("shop", namespace="slow")
    text = "drop_task_killswitch: []\ndemoted_namespaces: [slow]\n"
    written(broker, file, text, "switch set", subject="namespace=slow")
    arriving = broker.add("shop", namespace="slow")
    broker.until(lambda: len(broker.records("taskworker-long")) == 2)
    assert {record.id for record in broker.records("taskworker-long")} == {waiting, arriving}
    file.write_text(EMPTY)
    broker.said("switch taken back", subject="namespace=slow")
    broker.produce(*(record.value for record in broker.records("taskworker-long") if record.id == waiting))
    broker.until(lambda: broker.history(waiting).count("pending") == 2)  # no tombstone is in its way


@pytest.mark.kafka
def test_demoted_namespaces_go_to_another_cluster(broker: RunningBroker, file: Path) -> None:
    with open_local_kafka() as address:
        id_ = broker.add("shop", namespace="far")
        text = f"drop_task_killswitch: []\ndemoted_namespaces: [far]\ndemoted_topic_cluster: {address}\n"
        written(broker, file, text, "demoted namespaces go to another cluster", cluster=address)
        assert [scan(value).id for value in trio.run(first_of, address)] == [id_]
        assert id_ not in {record.id for record in broker.records("taskworker-long")}


async def first_of(address: str) -> list[bytes]:
    """What is first read of taskworker-long there."""
    async with (
        aio.open_loop(),
        KafkaLog(address).open_reader(["taskworker-long"], "look") as reader,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(follow, reader)
        with trio.fail_after(30):
            while not (found := await reader.read_batch(10, 5)):
                pass
        nursery.cancel_scope.cancel()
    return [record.value for record in found]


async def follow(reader: Reader) -> None:
    async for change in reader.assignments:
        if isinstance(change, Revoked):
            change.acknowledge()


def test_nothing_is_forwarded_to_a_topic_that_is_read_here(broker: RunningBroker, file: Path) -> None:
    text = "drop_task_killswitch: []\ndemoted_namespaces: [round]\ndemoted_topic: read-too\n"
    written(broker, file, text, "nothing is demoted")
    assert broker.history(broker.add("shop", namespace="round")) == ["pending"]


def test_switches_outlive_a_kill_and_a_stale_socket_is_replaced(
    broker: RunningBroker, file: Path, tmp_path: Path
) -> None:
    broker.operate("pause", "application=kept", "--reason", "why")
    broker.end()
    assert (broker.data_dir / "admin.sock").exists()
    gone = order(broker, "switches")
    assert (gone.returncode, "no broker takes orders at" in gone.stderr) == (69, True)
    settings = {"ADMIN__SECRETS": '["operators"]', "RPC__SECRETS": '["workers"]'}
    with RunningBroker(broker.data_dir, settings) as again:
        assert "application=kept" in order(again, "switches").stdout
        for secret, exit_code in (("operators", 0), ("workers", 1)):
            done = subprocess.run(
                [sys.executable, "-m", "taskd", "switches", "--address", again.rpc],
                env=clean_environment({"TASKD_ADMIN_SECRET": secret}),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == exit_code, done.stdout + done.stderr
        assert again.stop() == 0
    assert not (broker.data_dir / "admin.sock").exists()
