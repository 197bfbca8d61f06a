"""How fast records of the log get into the store."""

from __future__ import annotations

from pathlib import Path

from taskd import aio
from taskd.bench.figures import Report, Step, at_least
from taskd.bench.scene import Kafka, open_scene
from taskd.bench.traffic import send, stretch, until_counted
from taskd.producer.client import open_producer

INGEST_PER_S = 35_000  # alone, from Kafka


async def ingest(
    folder: Path, report: Report, step: Step, *, count: int, payload: int, kafka: Kafka | None
) -> None:
    """On Kafka the records wait, then the broker starts. The embedded log is the broker's: both at once."""
    async with open_scene(folder, kafka) as scene, aio.open_loop():
        broker = await scene.broker()
        if kafka is not None:
            await broker.stop()  # it has made the topic and its group
        async with open_producer(scene.producer) as producer:
            await send(producer, count, payload, lambda done: step(60 * done // count, "sending"))
        if kafka is not None:
            broker = await scene.broker()
        await until_counted(
            scene, "arrived", count, [broker], lambda n: step(60 + 35 * n // count, "storing")
        )
        await broker.stop()
        report.add(
            "ingested",
            stretch(scene.stores, "stored_at_ms").per_s,
            "/s",
            target=at_least(INGEST_PER_S) if kafka and not payload else None,
            detail=f"{count:,} records of {'Kafka' if kafka else 'the embedded log, produced meanwhile'}",
        )
