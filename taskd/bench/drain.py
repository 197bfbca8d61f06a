"""How fast waiting work is done, and how fast work goes from the producer to its end."""

from __future__ import annotations

from pathlib import Path

import trio

from taskd import aio
from taskd.bench.figures import Report, Step, at_least, at_most
from taskd.bench.scene import Daemon, open_scene
from taskd.bench.traffic import send, stretch, until_counted
from taskd.clock import SystemClock
from taskd.producer.client import open_producer

DRAIN_PER_S = 35_000  # of waiting no-ops on the embedded log, with 2 slots on 2 CPUs
MANY_WAITING, MEMORY_MB = 1_000_000, 250  # so many waiting take no more memory of the broker
MB = 1_000_000
THROUGH_PER_S = 20_000  # from the producer to the end on Kafka, all on one machine


async def drain(
    folder: Path, report: Report, step: Step, *, count: int, slots: int, payload: int, kafka: str | None
) -> None:
    """`count` no-ops wait in the store, then a worker starts. From the first to the last that is finished."""
    async with open_scene(folder, kafka) as scene, aio.open_loop():
        broker = await scene.broker()
        async with open_producer(scene.producer) as producer:
            await send(producer, count, payload, lambda done: step(30 * done // count, "sending"))
        await until_counted(
            scene, "arrived", count, [broker], lambda n: step(30 + 20 * n // count, "storing")
        )
        if count >= MANY_WAITING:
            report.add(
                f"broker memory with {count:,} waiting",
                broker.rss_bytes / MB,
                "MB",
                target=at_most(MEMORY_MB),
            )
        before_s = broker.cpu_s
        worker = await scene.worker(slots)
        both = [broker, worker]
        await until_counted(scene, "completed", count, both, lambda n: step(50 + 45 * n // count, "draining"))
        _cpu(report, broker.cpu_s - before_s, worker, count)
        await worker.stop()
        await broker.stop()
        found = stretch(scene.store, "finished_at_ms")
        report.add(
            "drained",
            found.per_s,
            "/s",
            target=at_least(DRAIN_PER_S) if kafka is None and not payload else None,
            detail=f"{count:,} no-ops, {slots} slots",
        )


async def through(
    folder: Path, report: Report, step: Step, *, count: int, slots: int, payload: int, kafka: str | None
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
        last_ms = stretch(scene.store, "finished_at_ms").last_ms
        report.add(
            "produced to drained",
            count / max((last_ms - began_ms) / 1000, 0.001),
            "/s",
            target=at_least(THROUGH_PER_S) if kafka and not payload else None,
            detail=f"{count:,} no-ops over {'Kafka' if kafka else 'the embedded log'}, {slots} slots",
        )


def _cpu(report: Report, broker_s: float, worker: Daemon, count: int) -> None:
    report.add("broker CPU", broker_s / count * 1e6, "µs each")
    report.add("worker CPU", worker.cpu_s / count * 1e6, "µs each", detail="its start included")
