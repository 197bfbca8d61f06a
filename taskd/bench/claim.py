"""What one claim costs with few and with very many rows waiting."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from taskd.bench.figures import Report, Step, at_most
from taskd.clock import SystemClock, thread_cpu_ns
from taskd.inflight.base import Arrival, ClaimRequest, LeaseKind, Policy
from taskd.inflight.writer import Inflight, open_inflight

INSERT_ROWS = 1_000
CLAIM_ROWS = 64
CLAIMS = 100
MOST_RATIO = 1.2


async def claim(folder: Path, report: Report, step: Step, *, sizes: Sequence[int], payload: int) -> None:
    """CPU of the store for one claim of 64 rows, which then are handed back; a round over all sizes."""
    costs: dict[int, float] = {}
    total = sum(sizes)
    done = 0
    for size in sizes:
        path = folder / f"claim-{size}.sqlite"
        async with open_inflight(path, SystemClock(), Policy(), inline=True) as inflight:
            for start in range(0, size, INSERT_ROWS):
                await inflight.insert(
                    [_arrival(number, payload) for number in range(start, min(start + INSERT_ROWS, size))]
                )
                step(95 * (done + start) // total, f"storing {size:,}")
            costs[size] = await _cost_us(inflight)
        done += size
        report.add(f"one claim of {CLAIM_ROWS} with {size:,} waiting", costs[size], "µs of CPU")
    least, most = min(sizes), max(sizes)
    if least != most:
        report.add(
            f"{most:,} against {least:,} waiting",
            costs[most] / costs[least],
            "times",
            target=at_most(MOST_RATIO),
        )


async def _cost_us(inflight: Inflight) -> float:
    times: list[float] = []
    for _ in range(CLAIMS):
        began_ns = thread_cpu_ns()
        leases = await inflight.claim(ClaimRequest(CLAIM_ROWS, LeaseKind.STREAM, holder="bench"))
        times.append((thread_cpu_ns() - began_ns) / 1000)
        await inflight.hand_back([lease.ref for lease in leases])
    return statistics.median(times)


def _arrival(number: int, payload: int) -> Arrival:
    return Arrival(
        id=f"{number:032x}",
        namespace="taskd-bench",
        taskname="noop",
        application="",
        received_at_ms=None,
        processing_deadline_s=30,
        expires_s=None,
        delay_s=None,
        attempts=0,
        dead_letter=False,
        at_most_once=False,
        topic="taskd-bench",
        partition=0,
        offset=number,
        record_key=None,
        activation=bytes(payload),
    )
