"""All benchmarks in one run, one after the other: the figures that taskd has targets for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from taskd.bench.claim import claim
from taskd.bench.drain import drain, through
from taskd.bench.figures import Report, Step
from taskd.bench.ingest import ingest
from taskd.bench.latency import latency
from taskd.bench.rpc import rpc
from taskd.bench.scene import Kafka
from taskd.bench.soak import soak

MILLION = 1_000_000

Part = Callable[[Path, Report, Step], Awaitable[None]]


def parts(kafka: Kafka) -> dict[str, Part]:
    """By name, in their order. The last takes longest: a million activations at a steady rate."""
    return {
        "drain": partial(drain, count=50_000, slots=2, payload=0, kafka=None),
        "through": partial(through, count=50_000, slots=2, payload=0, kafka=kafka),
        "ingest": partial(ingest, count=100_000, payload=0, kafka=kafka),
        "rpc": partial(rpc, seconds=2.0, rounds=3, in_flight=16),
        "claim": partial(claim, sizes=(1_000, 100_000, MILLION), payload=200),
        "latency": partial(latency, count=200, slots=2, kafka=None, seed=1),
        "latency over Kafka": partial(latency, count=200, slots=2, kafka=kafka, seed=1),
        "waiting": partial(drain, count=MILLION, slots=2, payload=0, kafka=None),
        "soak": partial(soak, seconds=200.0, per_s=5_000, slots=2, seed=1),
    }


async def everything(folder: Path, report: Report, step: Step, *, kafka: Kafka) -> None:
    """Every part on a folder of its own, which is emptied only at the end."""
    all_parts = parts(kafka)
    for number, (name, part) in enumerate(all_parts.items()):
        own = folder / str(number)
        own.mkdir()

        def within(done: int, note: str = "", number: int = number, name: str = name) -> None:
            step((100 * number + done) // len(all_parts), f"{name}: {note}")

        await part(own, report, within)
