"""The names are a promise to dashboards."""

from __future__ import annotations

from prometheus_client import REGISTRY

from taskd.telemetry import metrics
from taskd.telemetry.durations import Durations

NAMES = {
    "taskd_asyncio_errors_total": (),
    "taskd_backpressure": ("reason",),
    "taskd_claims_total": ("via",),
    "taskd_commit_batch_size": (),
    "taskd_commit_seconds": (),
    "taskd_connected_workers": (),
    "taskd_dead_letters_total": ("reason",),
    "taskd_discarded_total": ("reason",),
    "taskd_ingest_records_total": ("topic", "result"),
    "taskd_log_lag_records": ("topic", "partition"),
    "taskd_received_to_finished_seconds": (),
    "taskd_received_to_started_seconds": (),
    "taskd_received_to_stored_seconds": (),
    "taskd_results_total": ("via", "status"),
    "taskd_retries_published_total": (),
    "taskd_store_rows": ("application", "namespace", "status"),
    "taskd_superseded_results_total": (),
    "taskd_transitions_total": ("event", "status"),
    "taskd_upkeep_errors_total": ("duty",),
    "taskd_upkeep_seconds": ("duty",),
    "taskd_worker_task_seconds": (),
    "taskd_worker_tasks_total": ("status",),
}


def test_every_promised_name_is_on_the_page():
    page = metrics.render().decode()
    for name in NAMES:
        assert f"# TYPE {name} " in page, name


def test_labels():
    declared = {
        metric._name: metric._labelnames
        for metric in vars(metrics).values()
        if hasattr(metric, "_labelnames")
    } | {metric.name: () for metric in vars(metrics).values() if isinstance(metric, Durations)}
    for name, labels in NAMES.items():
        if name != "taskd_asyncio_errors_total":
            assert declared[name.removesuffix("_total")] == labels, name


def test_nothing_is_left_in_the_registry_of_others():
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("taskd_")]


def test_asyncio_errors_are_read_when_rendered():
    count = 4
    metrics.asyncio_errors_from(lambda: count)
    assert b"taskd_asyncio_errors_total 4.0" in metrics.render()
    count = 5
    assert b"taskd_asyncio_errors_total 5.0" in metrics.render()
    metrics.asyncio_errors_from(lambda: 0)


def test_lanes_go_away_and_cannot_fill_the_memory():
    metrics.set_store_rows({("shop", "mail", "pending"): 3})
    metrics.set_store_rows({("shop", f"n{i}", "pending"): 1 for i in range(metrics.LANES_SHOWN + 7)})
    page = metrics.render().decode()
    assert 'namespace="mail"' not in page
    assert page.count("taskd_store_rows{") == metrics.LANES_SHOWN + 1
    assert 'taskd_store_rows{application="(other)",namespace="(other)",status="pending"} 7.0' in page
    metrics.set_store_rows({})
