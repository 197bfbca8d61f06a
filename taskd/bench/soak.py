"""Whether anything grows while taskd works for long."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import trio

from taskd import aio
from taskd.bench.figures import Report, Step, at_most, percentile
from taskd.bench.latency import Ear, one_latency_ms, open_ear
from taskd.bench.scene import Daemon, open_scene
from taskd.bench.tasks import noop
from taskd.clock import monotonic_s
from taskd.database import wal_bytes
from taskd.producer.client import Producer, open_producer

SAMPLE_EVERY_S = 1.0
SEND_EVERY_S = 0.1
ASK_EVERY_S = (0.1, 0.3)
MOST_GROWTH = 1.1  # of memory, from the second quarter to the last
MB = 1_000_000


class Samples:
    """One number over the time of the run; its quarters tell whether it drifts."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def quarter(self, number: int) -> Sequence[float]:
        size = max(len(self.values) // 4, 1)
        return self.values[number * size : (number + 1) * size] or self.values[-1:]

    @property
    def growth(self) -> float:
        """Median of the last quarter against that of the second: the first still fills caches."""
        return percentile(self.quarter(3), 50) / max(percentile(self.quarter(1), 50), 1e-9)


async def soak(
    folder: Path, report: Report, step: Step, *, seconds: float, per_s: int, slots: int, seed: int
) -> None:
    """So many no-ops a second for so long, and a few calls between them whose latency is taken."""
    # What is finished is forgotten within the first quarter, so that the store has its final size then.
    store = {"store": {"tombstone_ttl_s": max(seconds / 8, 1.0)}}
    rss: dict[str, Samples] = {"broker": Samples(), "worker": Samples()}
    descriptors: dict[str, Samples] = {"broker": Samples(), "worker": Samples()}
    wal, latency = Samples(), Samples()
    async with open_scene(folder, settings=store) as scene, aio.open_loop(), open_ear() as ear:
        daemons = {"broker": await scene.broker(), "worker": await scene.worker(slots)}
        async with open_producer(scene.producer) as producer:
            await one_latency_ms(producer, ear, -1)
            end_s = monotonic_s() + seconds
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send, producer, per_s, end_s)
                nursery.start_soon(_ask, producer, ear, random.Random(seed), end_s, latency)
                while monotonic_s() < end_s:
                    _sample(daemons, rss, descriptors)
                    wal.values.append(wal_bytes(scene.places[0].store))
                    step(int(100 - 100 * (end_s - monotonic_s()) / seconds), "soaking")
                    await trio.sleep(SAMPLE_EVERY_S)
        completed = await scene.completed()
        for daemon in reversed(daemons.values()):
            await daemon.stop()
    report.add("completed", completed, "", detail=f"{per_s} a second for {seconds:.0f} s")
    for name in daemons:
        report.add(f"memory of the {name}", max(rss[name].values) / MB, "MB", detail="most")
        report.add(
            "... from its second quarter to its last", rss[name].growth, "times", target=at_most(MOST_GROWTH)
        )
        report.add(
            f"descriptors of the {name}",
            max(descriptors[name].values),
            "",
            detail=f"{min(descriptors[name].values):.0f} least",
        )
    report.add("write-ahead log", max(wal.values) / MB, "MB", detail="most")
    report.add("latency in the second quarter, p50", percentile(latency.quarter(1), 50), "ms")
    report.add("latency in the last quarter, p50", percentile(latency.quarter(3), 50), "ms")


def _sample(daemons: dict[str, Daemon], rss: dict[str, Samples], descriptors: dict[str, Samples]) -> None:
    for name, daemon in daemons.items():
        daemon.check()
        rss[name].values.append(daemon.rss_bytes)
        descriptors[name].values.append(daemon.descriptors)


async def _send(producer: Producer, per_s: int, end_s: float) -> None:
    began_s, sent = monotonic_s(), 0
    while monotonic_s() < end_s:
        due = int((monotonic_s() - began_s) * per_s) - sent
        if due > 0:
            await producer.send_many([noop.to_call() for _ in range(due)])
            sent += due
        await trio.sleep(SEND_EVERY_S)


async def _ask(producer: Producer, ear: Ear, rng: random.Random, end_s: float, found: Samples) -> None:
    number = 0
    while monotonic_s() < end_s:
        found.values.append(await one_latency_ms(producer, ear, number))
        number += 1
        await trio.sleep(rng.uniform(*ASK_EVERY_S))
