"""Calls that a benchmark sends, and what the store says of them afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from taskd.bench.figures import BenchFailed
from taskd.bench.scene import Daemon, Scene
from taskd.bench.tasks import noop
from taskd.clock import monotonic_s
from taskd.database import open_for_reading
from taskd.producer.client import Producer

BATCH = 1_000
LOOK_EVERY_S = 0.5  # each look has the broker write all of its metrics
STANDSTILL_S = 60.0


async def send(producer: Producer, count: int, payload: int, sent: Callable[[int], None]) -> None:
    """Send so many no-ops, with so many bytes each. Raises BenchFailed when one is not taken."""
    done = 0
    while done < count:
        batch = min(BATCH, count - done)
        calls = [noop.to_call(kwargs={"payload": bytes(payload)} if payload else {}) for _ in range(batch)]
        errors = [error for error in await producer.send_many(calls) if error is not None]
        if errors:
            raise BenchFailed(f"a call was not taken: {errors[0]}")
        done += batch
        sent(done)


async def until_counted(
    scene: Scene, event: str, count: int, daemons: list[Daemon], seen: Callable[[int], None]
) -> None:
    """Wait until so many activations went through a transition. Raises BenchFailed at a standstill."""
    last, last_s = -1, monotonic_s()
    while True:
        for daemon in daemons:
            daemon.check()
        now = int(await scene.metric("taskd_transitions_total", event=event))
        seen(min(now, count))
        if now >= count:
            return
        if now != last:
            last, last_s = now, monotonic_s()
        elif monotonic_s() - last_s > STANDSTILL_S:
            raise BenchFailed(f"{now} of {count} are {event}, and none more for {STANDSTILL_S:.0f} s")
        await trio.sleep(LOOK_EVERY_S)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows by the time of something: how many per second between the first and the last of them."""

    rows: int
    first_ms: int
    last_ms: int
    at_first: int  # rows with the very first time: they took time that is not in the stretch

    @property
    def per_s(self) -> float:
        return (self.rows - self.at_first) / max((self.last_ms - self.first_ms) / 1000, 0.001)


def stretch(stores: Sequence[Path], column: str) -> Stretch:
    """From the files of brokers that have stopped; `column` is a time of their rows, in milliseconds."""
    assert column in ("stored_at_ms", "finished_at_ms")
    # The name is one of two words of ours.
    counted = f"SELECT {column}, count(*) FROM inflight WHERE {column} IS NOT NULL GROUP BY {column}"  # noqa: S608
    times: Counter[int] = Counter()
    for store in stores:
        with open_for_reading(store) as db:
            rows: list[Any] = db.execute(counted).fetchall()
            times.update(dict(rows))
    if not times:
        raise BenchFailed(f"no rows to count in {', '.join(map(str, stores))}")
    first, last = min(times), max(times)
    return Stretch(times.total(), first, last, times[first])
