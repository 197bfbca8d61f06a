"""What the stations count, named stably: dashboards and alerts of others depend on these names.

The metrics are module level because there is one process and one page to scrape; the registry is our
own, so that an application which imports taskd does not find our metrics among its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

from taskd.telemetry.durations import Durations

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LANES_SHOWN = 500  # application and namespace come from producers: without a cap they could fill the memory
OTHER_LANES = "(other)"

registry = CollectorRegistry(auto_describe=False)
ProcessCollector(namespace="taskd", registry=registry)

_FAST_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800, 7_200, 43_200)
_RUN_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096)


def _counter(name: str, about: str, *labels: str) -> Counter:
    return Counter(name, about, labels, registry=registry)


def _gauge(name: str, about: str, *labels: str) -> Gauge:
    return Gauge(name, about, labels, registry=registry)


def _histogram(name: str, about: str, buckets: Iterable[float], *labels: str) -> Histogram:
    return Histogram(name, about, labels, buckets=tuple(buckets), registry=registry)


def _durations(name: str, about: str, buckets: Iterable[float], per_s: int = 1_000) -> Durations:
    collected = Durations(name, about, buckets, per_s)
    registry.register(collected)
    return collected


# ingest
ingest_records = _counter(
    "taskd_ingest_records_total", "Records read from the log, by what became of them", "topic", "result"
)
ingest_overflowed = _counter(
    "taskd_ingest_overflowed_total", "Records sent on to the overflow topic, their application's share full"
)
shortened_delays = _counter(
    "taskd_ingest_shortened_delays_total", "Records whose delay was beyond max_delay_s, and was shortened"
)
delay_beyond_expiry = _counter(
    "taskd_ingest_delay_beyond_expiry_total", "Records that expire before their delay is over"
)
log_lag_records = _gauge("taskd_log_lag_records", "Records not read yet", "topic", "partition")
backpressure = _gauge("taskd_backpressure", "1 while reading pauses for this reason", "reason")

# inflight
store_rows = _gauge(
    "taskd_store_rows", "Activations in the store, by lane and status", "application", "namespace", "status"
)
partition_rows = _gauge(
    "taskd_partition_rows", "Activations that are not finished, by origin", "topic", "partition", "status"
)
commit_seconds = _histogram("taskd_commit_seconds", "Time of one transaction, durable", _FAST_S)
commit_batch_size = _histogram("taskd_commit_batch_size", "Requests gathered in one transaction", _BATCH)
transitions = _counter(
    "taskd_transitions_total",
    "Moves in the life cycle, and where they led",
    "event",
    "status",
)
discarded = _counter("taskd_discarded_total", "Activations that ended without a dead letter", "reason")
superseded_results = _counter(
    "taskd_superseded_results_total", "Results that came too late: a newer lease exists, or none"
)

# dispatch
claims = _counter("taskd_claims_total", "Activations handed out", "via")
pushes = _counter(
    "taskd_pushes_total", "Calls that pushed an activation, by what came of them", "worker", "result"
)
results = _counter("taskd_results_total", "Results taken from workers", "via", "status")
limit_live = _gauge("taskd_limit_live", "Activations that workers hold, by limit", "kind", "name")
limit_concurrency = _gauge("taskd_limit_concurrency", "Most of them that the limit allows", "kind", "name")
limit_rate_per_second = _gauge("taskd_limit_rate_per_second", "The rate that it allows", "kind", "name")
limit_waiting = _gauge("taskd_limit_waiting", "Activations that wait because of the limit", "kind", "name")
connected_workers = _gauge("taskd_connected_workers", "Workers with an open stream")
received_to_stored_seconds = _durations(
    "taskd_received_to_stored_seconds", "From received_at to the row in the store", _WAIT_S
)
received_to_started_seconds = _durations(
    "taskd_received_to_started_seconds", "From received_at to the first start", _WAIT_S
)
received_to_finished_seconds = _durations(
    "taskd_received_to_finished_seconds", "From received_at to the final status", _WAIT_S
)

loop_lag_seconds = _histogram("taskd_loop_lag_seconds", "How late the event loop runs what is due", _FAST_S)

# upkeep
retries_published = _counter("taskd_retries_published_total", "Retries published to the log")
dead_letters = _counter("taskd_dead_letters_total", "Dead letters published", "reason")
upkeep_seconds = _histogram("taskd_upkeep_seconds", "Time of one round of a duty", _FAST_S, "duty")
upkeep_errors = _counter("taskd_upkeep_errors_total", "Rounds of a duty that failed", "duty")

# operators' switches
switches = _gauge("taskd_switches", "Switches that hold", "kind")
demoted = _counter("taskd_demoted_total", "Activations of demoted namespaces forwarded to their topic")
switch_file_valid = _gauge(
    "taskd_switch_file_valid", "1 when the file of switches holds as it is, 0 when an older state of it does"
)
switch_file_errors = _counter("taskd_switch_file_errors_total", "Times the file of switches was not valid")

# worker
worker_tasks = _counter("taskd_worker_tasks_total", "Tasks that ended in this worker", "status")
worker_results_refused = _counter(
    "taskd_worker_results_refused_total", "Results that a broker of the plain protocol called invalid"
)
worker_loop_stalls = _counter(
    "taskd_worker_loop_stalls_total", "Times an async task blocked the loop that it shares with others"
)
worker_task_seconds = _durations(
    "taskd_worker_task_seconds", "Run time of tasks in the child", _RUN_S, per_s=1_000_000
)


class _AsyncioErrors:
    """Reads a count that is kept elsewhere, when the page is rendered."""

    read: Callable[[], int] = staticmethod(lambda: 0)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily("taskd_asyncio_errors", "Errors that asyncio code left to its loop")
        family.add_metric([], self.read())
        yield family


_asyncio_errors = _AsyncioErrors()
registry.register(_asyncio_errors)


def asyncio_errors_from(read: Callable[[], int]) -> None:
    """Name where taskd_asyncio_errors_total is read; a root passes `lambda: aio.unhandled_errors`."""
    _asyncio_errors.read = read


def set_store_rows(rows: Mapping[tuple[str, str, str], int]) -> None:
    """Replace taskd_store_rows by these counts, keyed by application, namespace, status.

    Lanes that are gone disappear from the page; past `LANES_SHOWN` keys the smallest are summed up
    under the names `(other)`.
    """
    ordered = sorted(rows.items(), key=lambda item: -item[1])
    store_rows.clear()
    for (application, namespace, status), count in ordered[:LANES_SHOWN]:
        store_rows.labels(application, namespace, status).set(count)
    for (_, _, status), count in ordered[LANES_SHOWN:]:
        store_rows.labels(OTHER_LANES, OTHER_LANES, status).inc(count)


def render() -> bytes:
    """The page for Prometheus, in the text format of `CONTENT_TYPE`."""
    return generate_latest(registry)
