"""Brings the numbers of a broker's parts to the metrics page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import structlog
import trio

from taskd.daemon.limiting import LimitReport
from taskd.errors import LogUnavailable, StoreError
from taskd.inflight.sqlite import Changes
from taskd.inflight.writer import Inflight
from taskd.log.base import Reader
from taskd.telemetry import metrics

EVERY_S = 5.0
# A look at the rows by partition reads each of them: 40 ms of another thread for 100,000. After it so many
# times as long as it took: then it is a hundredth of a CPU at most, however many wait.
PAUSES_PER_LOOK = 100
LOOP_LAG_EVERY_S = 1.0

log = structlog.get_logger("taskd.inflight")

_DURATIONS = {
    "received_to_stored": metrics.received_to_stored_seconds,
    "received_to_started": metrics.received_to_started_seconds,
    "received_to_finished": metrics.received_to_finished_seconds,
}


def count(changes: Changes) -> None:
    """One committed transaction: its numbers, and at level debug a line for each transition."""
    for transition in changes.transitions:
        log.debug(
            "transition",
            id=transition.id,
            by=transition.event.value,  # `event` is structlog's own name for the message
            before="" if transition.before is None else transition.before.word,
            status=transition.status.word,
        )
    for (event, status), times in changes.events.items():
        metrics.transitions.labels(event.value, status.word).inc(times)
    for reason, times in changes.discarded.items():
        metrics.discarded.labels(reason).inc(times)
        log.info("discarded", reason=reason, count=times)
    for name, values_ms in changes.durations_ms.items():
        _DURATIONS[name].observe_all(values_ms)


def committed(size: int, seconds: float) -> None:
    metrics.commit_batch_size.observe(size)
    metrics.commit_seconds.observe(seconds)


async def watch_loop() -> None:
    """Measure how late the event loop runs what is due, until cancelled."""
    while True:
        due = trio.current_time() + LOOP_LAG_EVERY_S
        await trio.sleep_until(due)
        metrics.loop_lag_seconds.observe(trio.current_time() - due)


async def keep_gauges(inflight: Inflight, reader: Callable[[], Reader | None]) -> None:
    """Refresh depths, limits and lag until cancelled."""
    limits = LimitReport()
    next_look_at = trio.current_time()
    while True:
        metrics.set_store_rows(
            {(d.application, d.namespace, d.status.word): d.count for d in inflight.depths()}
        )
        with suppress(StoreError):  # a disk in trouble is told by the store itself
            limits.tell(await inflight.limit_states())
        current = reader()
        if current is not None:
            # A log that is away, or a group that just changes hands, has no lag to tell.
            with suppress(LogUnavailable), trio.move_on_after(EVERY_S):
                lags = await current.lag()
                metrics.log_lag_records.clear()  # what moved to another broker is told there
                for partition, lag in lags.items():
                    metrics.log_lag_records.labels(partition.topic, str(partition.number)).set(lag)
        if trio.current_time() >= next_look_at:
            with suppress(StoreError):
                began_at = trio.current_time()
                await _look_at_partitions(inflight)
                took_s = trio.current_time() - began_at
                next_look_at = trio.current_time() + PAUSES_PER_LOOK * took_s
        await trio.sleep(EVERY_S)


async def _look_at_partitions(inflight: Inflight) -> None:
    rows = await inflight.depths_by_partition()
    metrics.partition_rows.clear()
    for (topic, number, status), count in rows.items():
        metrics.partition_rows.labels(topic, str(number), status.word).set(count)
