"""How long an idle system takes from `.delay()` to the first line of the task."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from taskd import aio
from taskd.bench.figures import BenchFailed, Report, Step, at_most, percentile
from taskd.bench.scene import Kafka, open_scene
from taskd.bench.tasks import tell
from taskd.clock import monotonic_s
from taskd.config.schema import ProducerConfig
from taskd.producer.client import Producer, open_producer

ANSWER_WITHIN_S = 30.0
WARM_UP = 10
PAUSE_S = (0.02, 0.08)  # between two calls: the system is idle again
EMBEDDED_MS = (4.0, 15.0)  # p50, p99
KAFKA_MS = (12.0, 40.0)


class Ear:
    """Hears tasks say that they began. Opened by `open_ear`."""

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self._socket = socket
        self.port = int(socket.getsockname()[1])

    async def begun_s(self, number: int) -> float:
        """When call `number` began, by the machine's monotonic clock. Raises BenchFailed when it does not."""
        with trio.move_on_after(ANSWER_WITHIN_S):
            while True:
                data, _ = await self._socket.recvfrom(64)
                called, _, at_s = data.decode().partition(" ")
                if called == str(number):
                    return float(at_s)
        raise BenchFailed(f"a task did not begin within {ANSWER_WITHIN_S:.0f} s")


@asynccontextmanager
async def open_ear() -> AsyncIterator[Ear]:
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as socket:
        await socket.bind(("127.0.0.1", 0))
        yield Ear(socket)


async def one_latency_ms(producer: Producer, ear: Ear, number: int) -> float:
    began_s = monotonic_s()
    await producer.send(tell.to_call(kwargs={"port": ear.port, "number": number}))
    return (await ear.begun_s(number) - began_s) * 1000


async def latency(
    folder: Path,
    report: Report,
    step: Step,
    *,
    count: int,
    slots: int,
    kafka: Kafka | None,
    seed: int,
    existing: ProducerConfig | None = None,
) -> None:
    rng = random.Random(seed)
    async with open_scene(folder, kafka, existing=existing) as scene, aio.open_loop(), open_ear() as ear:
        daemons = [*await scene.brokers(), await scene.worker(slots)]
        found: list[float] = []
        async with open_producer(scene.producer) as producer:
            for number in range(count + WARM_UP):
                value = await one_latency_ms(producer, ear, number)
                if number >= WARM_UP:
                    found.append(value)
                step(100 * number // (count + WARM_UP), "calling")
                await trio.sleep(rng.uniform(*PAUSE_S))
        for daemon in reversed(daemons):
            await daemon.stop()
        over_kafka = scene.producer.log == "kafka"
    p50_ms, p99_ms = KAFKA_MS if over_kafka else EMBEDDED_MS
    where = "Kafka" if over_kafka else "the embedded log"
    fsync = f"fsync {report.machine['fsync_ms']} ms"
    report.add(
        "submit to start, p50",
        percentile(found, 50),
        "ms",
        target=at_most(p50_ms),
        detail=f"{count} calls over {where}, {fsync}",
    )
    report.add("submit to start, p99", percentile(found, 99), "ms", target=at_most(p99_ms))
