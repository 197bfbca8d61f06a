"""The demo's daemons: taskd as processes of its own, started on free ports and stopped by SIGTERM."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from taskd_webhooks.tasks import SECRET_VARIABLE

TASKD = Path(sys.executable).with_name("taskd")
START_WITHIN_S = 30.0
STOP_WITHIN_S = 20.0


class DemoFailed(Exception):
    """Something did not go as it should; the message says what."""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@dataclass(frozen=True)
class Daemon:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def failed(self, what: str) -> DemoFailed:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        said = "; the end of its log:\n  " + "\n  ".join(lines) if lines else ""
        return DemoFailed(f"`taskd {self.name}` {what}{said}")


@contextmanager
def running(name: str, arguments: list[str], folder: Path, environ: dict[str, str]) -> Iterator[Daemon]:
    """Run one daemon while the block lasts; stop it by SIGTERM. Its log lies in `folder`.

    Raises DemoFailed when it does not stop in time with exit code 0.
    """
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(TASKD), name, *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | environ,
            start_new_session=True,  # Ctrl-C is for us; we stop the daemons in their order
        )
    daemon = Daemon(name, process, log)
    try:
        yield daemon
    except BaseException:
        stop(process)
        raise
    code = stop(process)
    if code is None:
        raise daemon.failed(f"did not stop within {STOP_WITHIN_S:.0f} s")
    if code != 0:
        raise daemon.failed(f"ended with exit code {code}, expected 0")


def stop(process: subprocess.Popen[bytes]) -> int | None:
    """Ask the process to stop and return its exit code; None: it took too long and was killed."""
    process.terminate()
    try:
        return process.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()  # also when somebody is impatient and presses Ctrl-C again
        process.wait()


def wait_until_ready(url: str, daemons: list[Daemon]) -> None:
    """Wait for the broker to say that it is. Raises DemoFailed when it takes too long, or a daemon ended."""
    give_up_s = time.monotonic() + START_WITHIN_S
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < give_up_s:
        for daemon in daemons:
            if (code := daemon.process.poll()) is not None:
                raise daemon.failed(f"ended with exit code {code} right after its start")
        try:
            direct.open(url, timeout=1).close()
        except OSError:  # nobody there yet, or 503: not ready
            time.sleep(0.05)
        else:
            return
    raise daemons[0].failed(f"was not ready within {START_WITHIN_S:.0f} s")


@dataclass(frozen=True)
class Taskd:
    """A running taskd: the broker's address, and what `taskd.configure` needs to reach its log."""

    address: str
    producer: dict[str, Any]


@contextmanager
def taskd_running(kafka: str | None, folder: Path, secret: str) -> Iterator[Taskd]:
    """Run a broker and a worker while the block lasts: as `taskd dev`, or one by one when there is Kafka."""
    rpc_port, http_port = free_ports(2)
    address = f"127.0.0.1:{rpc_port}"
    log, producer = settings(kafka, address)
    broker = {
        "data_dir": str(folder / "data"),
        "rpc": {"port": rpc_port},
        "http": {"port": http_port},
        "log": log,
        "upkeep": {"interval_s": 0.2},  # retries are due to the second; look more often
    }
    worker = {"pools": {"default": {"brokers": [address]}}}
    (folder / "broker.yaml").write_text(yaml.safe_dump(broker))
    (folder / "worker.yaml").write_text(yaml.safe_dump(worker))
    environ = {SECRET_VARIABLE: secret, "NO_PROXY": "127.0.0.1"}
    commands = {"dev": ["--config", "broker.yaml"]}
    if kafka:
        commands = {"broker": ["--config", "broker.yaml"], "worker": ["--config", "worker.yaml"]}
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(running(name, arguments, folder, environ))
            for name, arguments in commands.items()
        ]
        wait_until_ready(f"http://127.0.0.1:{http_port}/readyz", daemons)
        yield Taskd(address, producer)


def settings(kafka: str | None, address: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Section `log` of the broker's configuration, and what a producer is told to match it."""
    if kafka is None:
        return {"kind": "embedded"}, {"log": "embedded", "broker": address}
    name = f"taskd-demo-{secrets.token_hex(4)}"  # a cluster that is shared keeps the topics of the last run
    log = {
        "kind": "kafka",
        "clusters": {"default": {"address": kafka}},
        "topics": {name: {"consumer_group": name}},
        "deadletter_topic": f"{name}-dlq",
    }
    return log, {"log": "kafka", "kafka": kafka, "topic": name}
