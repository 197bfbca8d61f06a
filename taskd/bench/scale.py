"""What an activation costs when more of them wait, when they are larger, and when brokers share the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from taskd.bench.drain import Drained, drained
from taskd.bench.figures import Report, Step, at_most
from taskd.bench.scene import Kafka

FLAT = 1.2  # times the cost of the first
KB, MB = 1_000, 1_000_000
TOTAL_BYTES = 200 * MB  # of payloads, together
LEAST = 200  # activations, however large


async def scale(
    folder: Path,
    report: Report,
    step: Step,
    *,
    waiting: Sequence[int],
    payloads: Sequence[int],
    brokers: Sequence[int],
    slots: int,
    kafka: Kafka | None,
) -> None:
    """Drains of `waiting` no-ops, then of `payloads` bytes each, then from so many `brokers` on Kafka."""
    runs = len(waiting) + len(payloads) + len(brokers)
    finished = 0

    async def one(count: int, *, payload: int = 0, kafka: Kafka | None = None, brokers: int = 1) -> Drained:
        nonlocal finished
        own = folder / str(finished)
        own.mkdir()

        def within(done: int, note: str = "") -> None:
            step((100 * finished + done) // runs, f"{finished + 1} of {runs}, {note}")

        found = await drained(
            own, within, count=count, slots=slots, payload=payload, kafka=kafka, brokers=brokers
        )
        finished += 1
        return found

    first: Drained | None = None
    for count in waiting:
        found = await one(count)
        _tell(report, f"{count:,} waiting", found)
        first = first or found
    if first is not None and len(waiting) > 1:
        report.add(
            f"broker CPU, {waiting[-1]:,} against {waiting[0]:,} waiting",
            found.broker_cpu_us / first.broker_cpu_us,
            "times",
            target=at_most(FLAT),
        )
    for payload in payloads:
        count = max(min(min(waiting, default=50_000), TOTAL_BYTES // max(payload, 1)), LEAST)
        found = await one(count, payload=payload)
        _tell(report, f"{_size(payload)} each", found, f"{found.per_s * payload / MB:,.1f} MB/s")
    for number in brokers:
        found = await one(min(waiting, default=50_000), kafka=kafka, brokers=number)
        _tell(report, f"{number} broker{'s' if number > 1 else ''} on one topic of Kafka", found)


def _tell(report: Report, what: str, found: Drained, more: str = "") -> None:
    cpu = f"{found.count:,} drained; CPU each: broker {found.broker_cpu_us:.0f} µs, worker "
    cpu += f"{found.worker_cpu_us:.0f} µs with its start"
    report.add(what, found.per_s, "/s", detail=f"{cpu}; {more}" if more else cpu)


def _size(payload: int) -> str:
    for unit, size in (("MB", MB), ("kB", KB)):
        if payload >= size:
            return f"{payload // size} {unit}"
    return f"{payload} B"
