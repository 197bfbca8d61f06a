"""What real daemons tell systemd, over a real socket, and what the unit files in conf/systemd say."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from daemons import ROOT, WITHIN_S, free_port, open_daemons

from taskd.config.loader import load_worker_config
from taskd.config.schema import BrokerConfig, PoolSection
from taskd.worker import pool

pytestmark = [pytest.mark.process, pytest.mark.slow]

UNITS = ROOT / "conf" / "systemd"
BROKER, WORKER = UNITS / "taskd-broker.service", UNITS / "taskd-worker@.service"
CLOSING_S = 5.0  # for sockets and files, on a slow machine


class Manager:
    """systemd's end of the socket. What was said is kept, in its order."""

    def __init__(self, path: Path, socket: trio.socket.SocketType) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "600000"}
        self.said: list[str] = []
        self._socket = socket
        self._news = trio.Event()

    async def listen(self) -> None:
        while True:
            self.said.append((await self._socket.recv(10_000)).decode())
            self._news.set()

    async def heard(self, pattern: str, after: int = 0) -> int:
        """Where it was said, first after so many messages."""
        with trio.move_on_after(WITHIN_S):
            while True:
                for number, said in enumerate(self.said[after:], after):
                    if re.fullmatch(pattern, said):
                        return number + 1
                self._news = trio.Event()
                await self._news.wait()
        raise AssertionError(f"did not hear {pattern!r}, but {self.said}")


@asynccontextmanager
async def open_manager(path: Path) -> AsyncIterator[Manager]:
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as socket:
        await socket.bind(str(path))
        async with trio.open_nursery() as nursery:
            manager = Manager(path, socket)
            nursery.start_soon(manager.listen)
            yield manager
            nursery.cancel_scope.cancel()


async def test_daemons_tell_how_they_are_from_the_start_to_the_end(tmp_path: Path) -> None:
    port = free_port()
    ports = ("--rpc-port", str(port), "--http-port", "0")
    async with (
        open_manager(tmp_path / "broker.sock") as of_broker,
        open_manager(tmp_path / "worker.sock") as of_worker,
        open_daemons(tmp_path) as daemons,
    ):
        broker = daemons.start(
            "broker", "--data-dir", "data", *ports, more=of_broker.environment, cwd=tmp_path
        )
        worker = daemons.start(
            "worker", "--broker", f"127.0.0.1:{port}", "--slots", "1", more=of_worker.environment
        )
        assert await of_broker.heard("STATUS=opening the store") == 1
        assert await of_worker.heard("STATUS=starting 1 slots") == 1
        lines = (
            r"STATUS=0 waiting, 0 with workers, 0/s come, .*",
            r"STATUS=1 slots.*, 0 running, 0 waiting, .*",
        )
        for manager, daemon, line in zip((of_broker, of_worker), (broker, worker), lines, strict=True):
            ready = await manager.heard("READY=1")
            await manager.heard(line, ready)
            ping = await manager.heard("WATCHDOG=1", ready)
            await manager.heard("WATCHDOG=1", ping)
            daemon.send(signal.SIGHUP)
            reloading = await manager.heard(r"RELOADING=1\nMONOTONIC_USEC=\d+", ready)
            ready = await manager.heard("READY=1", reloading)
            assert await daemon.stopped() == 0
            await manager.heard("STOPPING=1", ready)
            assert manager.said.count("READY=1") == 2


async def test_a_worker_that_is_stopped_before_it_is_ready_does_not_say_it_is(tmp_path: Path) -> None:
    async with open_manager(tmp_path / "worker.sock") as manager, open_daemons(tmp_path) as daemons:
        worker = daemons.start("worker", "--broker", "127.0.0.1:1", more=manager.environment)
        await manager.heard("STATUS=starting 2 slots")
        assert await worker.stopped() == 0
        await manager.heard("STOPPING=1")
        assert "READY=1" not in manager.said


def setting(unit: Path, name: str) -> str:
    found = re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)
    assert found, f"{unit.name} has no {name}"
    return str(found[-1])


def seconds(unit: Path, name: str) -> float:
    return float(setting(unit, name))


@pytest.mark.parametrize("unit", [BROKER, WORKER], ids=lambda unit: unit.name)
def test_units_wait_for_daemons_that_tell(unit: Path) -> None:
    assert setting(unit, "Type") == "notify"
    assert setting(unit, "NotifyAccess") == "main", "children must not speak for the daemon"
    assert setting(unit, "KillMode") == "mixed", "a worker tells its children itself"
    assert setting(unit, "ExecReload").endswith("-HUP $MAINPID")
    assert seconds(unit, "WatchdogSec") >= 60, "a part may rest and be busy for so long"
    assert "143" in setting(unit, "SuccessExitStatus"), "stopped twice is stopped, no reason to start again"
    assert "78" in setting(unit, "RestartPreventExitStatus")
    assert setting(unit, "StateDirectory")


def test_units_give_a_drain_the_time_it_may_take() -> None:
    assert seconds(BROKER, "TimeoutStopSec") >= BrokerConfig().drain_grace_s + 3 + CLOSING_S
    section = load_worker_config(ROOT / "conf" / "worker.yaml", {}).pools["default"]
    assert section.drain_grace_s == PoolSection().drain_grace_s is None, "it is the longest running deadline"
    after_grace_s = (
        section.exception_grace_s
        + section.terminate_grace_s
        + pool.KILL_WITHIN_S
        + pool.DELIVERY_GRACE_S
        + pool.GOODBYE_WITHIN_S
        + CLOSING_S
    )
    (longest,) = re.findall(r"deadlines up to (\d+) s", WORKER.read_text())
    assert seconds(WORKER, "TimeoutStopSec") >= float(longest) + pool.TIMEOUT_MARGIN_S + after_grace_s


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """The units as an administrator has them: with a program that exists, in a folder of their own."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    made = []
    for unit in (BROKER, WORKER):
        copy = tmp_path / unit.name.replace("@.", "@default.")
        copy.write_text(unit.read_text().replace("/opt/taskd/bin/taskd", sys.executable))
        made.append(copy)
    return made


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "SYSTEMD_LOG_COLOR": "0"}
    done = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=WITHIN_S, env=environment
    )
    if "not been booted with systemd" in done.stderr or "Unknown option" in done.stderr:
        pytest.skip(f"systemd-analyze cannot: {done.stderr.strip()}")
    return done


def test_systemd_finds_nothing_wrong_with_the_units(installed: list[Path]) -> None:
    done = analyze("verify", "--man=no", "--recursive-errors=no", *map(str, installed))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_units_expose_little(installed: list[Path]) -> None:
    done = analyze("security", "--offline=true", "--threshold=20", *map(str, installed))
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr
