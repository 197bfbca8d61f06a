"""What a benchmark measures: daemons of its own on a temporary folder, and how they are doing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import yaml

from taskd.bench.figures import BenchFailed
from taskd.bench.tasks import bench
from taskd.config.schema import ProducerConfig
from taskd.rpc.access import Access, producer_access

START_WITHIN_S = 60.0
STOP_WITHIN_S = 30.0
TOPIC = "taskd-bench"
ROOM = 100_000_000  # rows: a benchmark measures the way, not its limits
END_OF_LOG = 15  # lines shown when a daemon failed


@dataclass
class Daemon:
    """One process of taskd."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raises BenchFailed when it ended."""
        code = self.process.poll()
        if code is not None:
            lines = self.log.read_text(errors="replace").splitlines()[-END_OF_LOG:]
            said = "\n  ".join(lines)
            raise BenchFailed(
                f"`taskd {self.name}` ended with exit code {code}; the end of its log:\n  {said}"
            )

    @property
    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def stop(self) -> None:
        """End it as an operator would. Raises BenchFailed when it does not go in time."""
        self.process.send_signal(signal.SIGTERM)
        try:
            await trio.to_thread.run_sync(self.process.wait, STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise BenchFailed(f"`taskd {self.name}` did not stop within {STOP_WITHIN_S:.0f} s") from None


@dataclass(frozen=True, slots=True)
class Kafka:
    """A cluster, by its bootstrap servers. `fetch_max_wait_ms`: for one that answers no sooner when a record
    comes; None: as usual."""

    address: str
    fetch_max_wait_ms: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """As a broker's configuration names it."""
        wait_ms = self.fetch_max_wait_ms
        return {"address": self.address} | ({"fetch_max_wait_ms": wait_ms} if wait_ms else {})


@dataclass(frozen=True, slots=True)
class Place:
    """What belongs to one broker of a scene."""

    name: str
    data: Path
    rpc_port: int
    http_port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.rpc_port}"

    @property
    def store(self) -> Path:
        return self.data / "inflight.sqlite"

    def is_ready(self) -> bool:
        try:
            self.get("/readyz")
        except OSError:  # nobody there yet, or 503: not ready
            return False
        return True

    def get(self, path: str) -> str:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as answer:
            return str(answer.read(), "utf-8")


@dataclass
class Scene:
    """A folder with brokers in it, and workers when they are wanted. Opened by `open_scene`."""

    folder: Path
    short_folder: Path  # for what may not have a long path
    kafka: Kafka | None
    places: Sequence[Place]  # none, when a broker that is there already is used
    _stack: AsyncExitStack
    _broker_settings: Mapping[str, Any] = field(default_factory=dict)
    _existing: ProducerConfig | None = None

    @property
    def address(self) -> str:
        return self._existing.broker if self._existing else self.places[0].address

    @property
    def access(self) -> Access:
        """How to call the brokers."""
        return producer_access(self.producer)

    @property
    def topic(self) -> str:
        """On Kafka, where a topic has as many partitions as brokers share it."""
        return f"{TOPIC}-{len(self.places)}"

    @property
    def stores(self) -> list[Path]:
        return [place.store for place in self.places]

    @property
    def producer(self) -> ProducerConfig:
        if self._existing is not None:
            return self._existing
        if self.kafka is None:
            return ProducerConfig(broker=self.address, timeout_s=60)
        return ProducerConfig(log="kafka", kafka=self.kafka.address, topic=self.topic, timeout_s=60)

    async def brokers(self) -> list[Daemon]:
        """Start every broker of ours; returns when all are ready. They end with the scene, if not before."""
        return [await self._broker(place) for place in self.places]

    async def broker(self) -> Daemon:
        """The same where there is one only."""
        (daemon,) = await self.brokers()
        return daemon

    async def _broker(self, place: Place) -> Daemon:
        log: dict[str, Any] = {"kind": "embedded"}
        if self.kafka is not None:
            log = {
                "kind": "kafka",
                "clusters": {"default": self.kafka.settings},
                "topics": {self.topic: {"consumer_group": self.topic, "partitions": len(self.places)}},
                "deadletter_topic": f"{TOPIC}-dlq",
            }
        limits = dict.fromkeys(("max_pending_count", "max_delay_count", "max_processing_count"), ROOM)
        settings = {
            "data_dir": str(place.data),
            "rpc": {"port": place.rpc_port},
            "http": {"port": place.http_port},
            "log": log,
            "store": limits | {"max_size_bytes": 100_000_000_000},
            "admin": {"socket": str(self.short_folder / f"{place.name}.sock")},
            **self._broker_settings,
        }
        return await self._start("broker", settings, name=place.name, until=place.is_ready)

    async def worker(self, slots: int, name: str = "worker") -> Daemon:
        """Start a worker with so many children, for all brokers; returns at once."""
        addresses = [place.address for place in self.places] or [self.address]
        pool = {
            "brokers": addresses,
            "slots": slots,
            "namespaces": [bench.name],
            "modules": ["taskd.bench.tasks"],
            **(_as_pool(self._existing) if self._existing else {}),
        }
        return await self._start("worker", {"pools": {"default": pool}}, name=name)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of a metric of the brokers that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        total = 0.0
        for place in self.places:
            text = await trio.to_thread.run_sync(place.get, "/metrics")
            total += sum(
                float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.partition("{")[0].partition(" ")[0] == name and all(part in line for part in wanted)
            )
        return total

    async def completed(self) -> int:
        return int(await self.metric("taskd_transitions_total", event="completed"))

    async def _start(
        self,
        command: str,
        settings: Mapping[str, Any],
        *,
        name: str,
        until: Callable[[], bool] | None = None,
    ) -> Daemon:
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(dict(settings)))
        daemon = _started(name, command, config, self.folder / f"{name}.log")
        self._stack.push_async_callback(_end, daemon)
        if until is not None:
            with trio.move_on_after(START_WITHIN_S) as waiting:
                while not await trio.to_thread.run_sync(until):
                    daemon.check()
                    await trio.sleep(0.02)
            if waiting.cancelled_caught:
                raise BenchFailed(f"`taskd {command}` was not ready within {START_WITHIN_S:.0f} s")
        return daemon


@asynccontextmanager
async def open_scene(
    folder: Path,
    kafka: Kafka | None = None,
    *,
    brokers: int = 1,
    settings: Mapping[str, Any] | None = None,
    existing: ProducerConfig | None = None,
) -> AsyncIterator[Scene]:
    """An empty scene in `folder`; what was started in it ends with the block.

    `kafka`: the log, which several brokers share; None: the embedded one, which belongs to one broker.
    `settings`: further sections of a broker's configuration. `existing`: how to reach a broker that runs
    already; then none is started.
    """
    if existing is not None:
        brokers = 0
    if brokers > 1 and kafka is None:
        raise BenchFailed("the embedded log belongs to one broker: several share a topic of --kafka")
    ports = _free_ports(2 * brokers)
    names = ["broker"] if brokers == 1 else [f"broker-{number}" for number in range(1, brokers + 1)]
    places = [
        Place(name, folder / name, rpc_port, http_port)
        for name, rpc_port, http_port in zip(names, ports[::2], ports[1::2], strict=True)
    ]
    async with AsyncExitStack() as stack:
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="taskd-bench-")))
        yield Scene(folder, short, kafka, places, stack, settings or {}, existing)


def _as_pool(broker: ProducerConfig) -> dict[str, Any]:
    """What a pool of workers needs to reach this broker."""
    pool: dict[str, Any] = {}
    if broker.secret is not None:
        pool["secrets"] = [broker.secret.get_secret_value()]
    if broker.tls or broker.tls_ca is not None:
        files = {"ca": broker.tls_ca, "certificate": broker.tls_certificate, "key": broker.tls_key}
        pool["tls"] = {name: str(path) for name, path in files.items() if path is not None}
    return pool


def _started(name: str, command: str, config: Path, log: Path) -> Daemon:
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "taskd", command, "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=config.parent,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the benchmark, which then stops them in their order
        )
    return Daemon(name, process, log)


async def _end(daemon: Daemon) -> None:
    if daemon.process.poll() is None:
        with trio.CancelScope(shield=True), suppress(BenchFailed):
            await daemon.stop()


def _environment() -> dict[str, str]:
    """Ours without anything that configures taskd."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TASKD_")}
    return kept | {"TASKD_LOG_FORMAT": "json", "NO_PROXY": "127.0.0.1"}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
