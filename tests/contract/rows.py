"""Rows that tests put into a store, and whether a store is sound."""

from __future__ import annotations

from typing import Any

from taskd.activation.lifecycle import Status
from taskd.inflight.base import Arrival
from taskd.inflight.writer import Inflight
from taskd.testing.clock import START_WALL_MS

_TEMPLATE = Arrival(
    id="",
    namespace="mail",
    taskname="send",
    application="shop",
    received_at_ms=START_WALL_MS,
    processing_deadline_s=10,
    expires_s=None,
    delay_s=None,
    attempts=0,
    dead_letter=True,
    at_most_once=False,
    topic="taskd",
    partition=0,
    offset=0,
    record_key=b"key",
    activation=b"",
)


def arrival(id_: str, **changes: Any) -> Arrival:
    """One that has nothing special but `changes`."""
    return _TEMPLATE._replace(id=id_, **{"activation": id_.encode(), **changes})


def check(inflight: Inflight) -> None:
    """The counters equal a recount, and the file is sound. Only while no write is under way."""
    core = inflight._store
    assert core.db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    recounted = {(lane, Status(status)): count for lane, status, count in core.run("recount")}
    counted = {(n.number, status): count for n in core.lanes.values() for status, count in n.counts.items()}
    assert {key: count for key, count in counted.items() if count} == recounted
    stored = {(lane, Status(status)): count for lane, status, count in core.run("depths") if count}
    assert stored == recounted
    by_name = {(d.application, d.namespace, d.status): d.count for d in core.recount()}
    assert {(d.application, d.namespace, d.status): d.count for d in inflight.depths()} == by_name
