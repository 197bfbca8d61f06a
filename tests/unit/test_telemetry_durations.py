"""Durations observed together are on the page like those of an ordinary histogram."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from taskd.telemetry.durations import Durations

BUCKETS = (0.005, 0.25, 1, 10)


def test_the_page_is_that_of_a_histogram() -> None:
    values_ms = [0, 5, 6, 250, 250, 251, 9_999, 10_000, 10_001, 90_000_000]
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    durations = Durations("waited_seconds", "How long", BUCKETS)
    ours.register(durations)
    histogram = Histogram("waited_seconds", "How long", buckets=BUCKETS, registry=theirs)
    for value_ms in values_ms:
        histogram.observe(value_ms / 1000)
    durations.observe_all(values_ms[:3])
    durations.observe_all(values_ms[3:])
    durations.observe_all([])
    page = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == page
