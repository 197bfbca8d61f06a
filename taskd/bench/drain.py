"""How fast waiting work is done, and how fast work goes from the producer to its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trio

from taskd import aio
from taskd.bench.figures import Report, Step, at_least, at_most
from taskd.bench.scene import Kafka, open_scene
from taskd.bench.traffic import send, stretch, until_counted
from taskd.clock import SystemClock
from taskd.producer.client import open_producer

DRAIN_PER_S = 35_000  # of waiting no-ops on the embedded log, with 2 slots on 2 CPUs
MANY_WAITING, MEMORY_MB = 1_000_000, 250  # so many waiting take no more memory of the broker
MB = 1_000_000
THROUGH_PER_S = 20_000  # from the producer to the end on Kafka, all on one machine


@dataclass(frozen=True, slots=True)
class Drained:
    """What it took to drain a store, or several. Of all processes of a kind together."""

    count: int
    per_s: float
    broker_cpu_us: float  # for each activation
    worker_cpu_us: float  # the same, its start included; its children are not in it
    broker_rss_bytes: int  # of the largest one, before the worker came


async def drained(
    folder: Path, step: Step, *, count: int, slots: int, payload: int, kafka: Kafka | None, brokers: int = 1
) -> Drained:
    """`count` no-ops wait in the stores, then a worker starts. From the first to the last that is done."""
    async with open_scene(folder, kafka, brokers=brokers) as scene, aio.open_loop():
        daemons = await scene.brokers()
        async with open_producer(scene.producer) as producer:
            await send(producer, count, payload, lambda done: step(30 * done // count, "sending"))
        await until_counted(scene, "arrived", count, daemons, lambda n: step(30 + 20 * n // count, "storing"))
        rss_bytes = max(daemon.rss_bytes for daemon in daemons)
        before_s = sum(daemon.cpu_s for daemon in daemons)
        worker = await scene.worker(slots)
        everyone = [*daemons, worker]
        await until_counted(
            scene, "completed", count, everyone, lambda n: step(50 + 45 * n // count, "draining")
        )
        broker_s = sum(daemon.cpu_s for daemon in daemons) - before_s
        worker_s = worker.cpu_s
        for daemon in reversed(everyone):
            await daemon.stop()
        per_s = stretch(scene.stores, "finished_at_ms").per_s
    return Drained(count, per_s, broker_s / count * 1e6, worker_s / count * 1e6, rss_bytes)


async def drain(
    folder: Path, report: Report, step: Step, *, count: int, slots: int, payload: int, kafka: Kafka | None
) -> None:
    found = await drained(folder, step, count=count, slots=slots, payload=payload, kafka=kafka)
    if count >= MANY_WAITING:
        report.add(
            f"broker memory with {count:,} waiting",
            found.broker_rss_bytes / MB,
            "MB",
            target=at_most(MEMORY_MB),
        )
    report.add("broker CPU", found.broker_cpu_us, "µs each")
    report.add("worker CPU", found.worker_cpu_us, "µs each", detail="its start included")
    report.add(
        "drained",
        found.per_s,
        "/s",
        target=at_least(DRAIN_PER_S) if kafka is None and not payload else None,
        detail=f"{count:,} no-ops, {slots} slots",
    )


async def through(
    folder: Path, report: Report, step: Step, *, count: int, slots: int, payload: int, kafka: Kafka | None
) -> None:
    """Everything runs, then `count` no-ops are produced. From the first send to the last end."""
    async with open_scene(folder, kafka) as scene, aio.open_loop():
        broker = await scene.broker()
        worker = await scene.worker(slots)
        both = [broker, worker]
        async with open_producer(scene.producer) as producer:
            await send(producer, slots, 0, lambda done: None)  # everyone knows everyone
            await until_counted(scene, "completed", slots, both, lambda n: step(10, "warming up"))
            began_ms = SystemClock().now().wall_ms
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, producer, count, payload, lambda done: None)
                await until_counted(
                    scene, "completed", count + slots, both, lambda n: step(10 + 85 * n // count, "running")
                )
        await worker.stop()
        await broker.stop()
        last_ms = stretch(scene.stores, "finished_at_ms").last_ms
        report.add(
            "produced to drained",
            count / max((last_ms - began_ms) / 1000, 0.001),
            "/s",
            target=at_least(THROUGH_PER_S) if kafka and not payload else None,
            detail=f"{count:,} no-ops over {'Kafka' if kafka else 'the embedded log'}, {slots} slots",
        )
