"""Rows come in: new activations are stored, delayed ones become due, late ones expire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from taskd.activation.lifecycle import Event, Status, after
from taskd.activation.switches import Gate
from taskd.clock import Now
from taskd.inflight.base import Arrival, Inserted, Policy
from taskd.inflight.departures import Departures
from taskd.inflight.sqlite import SqliteStore
from taskd.inflight.switches import DEMOTED, KILLED, killed_by

DEFAULT_DEADLINE_S = 10  # an activation that names none; the default of namespaces
FUTURE_TOLERANCE_MS = 300_000  # a received_at further ahead than this counts as now (design rule 2)


class Arrivals:
    def __init__(self, store: SqliteStore, departures: Departures) -> None:
        self._store = store
        self._departures = departures

    def insert(self, arrivals: Sequence[Arrival], now: Now) -> Inserted:
        """Store what is not known yet. Ids that are known, finished ones included, are passed over."""
        events = [self._insert(arrival, now) for arrival in arrivals]
        results = Counter(events)
        new = [arrival for arrival, event in zip(arrivals, events, strict=True) if event is not None]
        max_delay_ms = self._store.policy.max_delay_ms
        return Inserted(
            pending=results[Event.ARRIVED],
            delayed=results[Event.ARRIVED_DELAYED],
            duplicate=results[None],
            expired=results[Event.ARRIVED_EXPIRED],
            undecodable=results[Event.ARRIVED_UNDECODABLE],
            dropped=results[Event.ARRIVED_DROPPED],
            forwarded=results[Event.ARRIVED_FORWARDED],
            shortened=tuple(
                arrival.id
                for arrival in new
                if arrival.delay_s and _shortened(arrival.delay_s, max_delay_ms) < arrival.delay_s * 1000
            ),
            beyond_expiry=tuple(
                arrival.id
                for arrival in new
                if arrival.delay_s and arrival.expires_s is not None and arrival.delay_s >= arrival.expires_s
            ),
        )

    def _insert(self, arrival: Arrival, now: Now) -> Event | None:
        """How it arrived; None when it is known."""
        store = self._store
        times = _times(arrival, now, store.policy)
        lane = store.lane_of(arrival.application, arrival.namespace, arrival.taskname)
        event = _arrives_as(arrival, times, store.gate(lane), now)
        status = after(None, event)
        store.run(
            "insert",
            arrival.id,
            status,
            lane.number,
            store.next_seq(),
            arrival.taskname,
            arrival.topic,
            arrival.partition,
            arrival.offset,
            arrival.record_key,
            arrival.activation,
            times.received_at_ms,
            now.wall_ms,
            times.due_at_ms,
            times.expires_at_ms,
            times.deadline_ms,
            arrival.attempts,
            arrival.dead_letter,
            arrival.at_most_once,
            _REASONS.get(event),
            arrival.undecodable or None,
        )
        if store.db.changes() == 0:
            store.drop_lane_if_empty(lane.number)
            return None
        row = store.db.last_insert_rowid()
        store.move(row, lane.number, None, event)
        store.measure("received_to_stored", now.wall_ms - times.received_at_ms)
        over = KILLED if event is Event.ARRIVED_DROPPED else ""
        if event is Event.ARRIVED_EXPIRED and not arrival.dead_letter:
            over = "expired"
        if over:
            store.discard(over)
            self._departures.finish(row, lane.number, status, now, reason=over)
        return event

    def become_due(self, limit: int, now: Now) -> int:
        """Move delayed rows whose time has come to the end of their lanes. Returns how many."""
        rows = self._store.run("due", now.wall_ms, limit).fetchall()
        for row, lane in rows:
            self._store.move(row, lane, Status.DELAYED, Event.BECAME_DUE)
            self._store.run("become_due", self._store.next_seq(), row)
        return len(rows)

    def expire(self, limit: int, now: Now) -> int:
        """Take out what waited too long. Returns how many."""
        if not now.may_expire:
            return 0
        rows = self._store.run("expiring", now.wall_ms, limit).fetchall()
        for row, status, lane, dead_letter in rows:
            self._departures.expire(row, lane, Status(status), bool(dead_letter), now)
        return len(rows)


_REASONS = {
    Event.ARRIVED_EXPIRED: "expired",
    Event.ARRIVED_UNDECODABLE: "undecodable",
    Event.ARRIVED_FORWARDED: DEMOTED,
}


class _Times(NamedTuple):
    """Of one arrival, in milliseconds; `*_at_ms` on the wall clock."""

    received_at_ms: int
    due_at_ms: int
    expires_at_ms: int | None
    deadline_ms: int


def _times(arrival: Arrival, now: Now, policy: Policy) -> _Times:
    received_at_ms = arrival.received_at_ms
    if received_at_ms is None or received_at_ms > now.wall_ms + FUTURE_TOLERANCE_MS:
        received_at_ms = now.wall_ms
    deadline_ms = (arrival.processing_deadline_s or DEFAULT_DEADLINE_S) * 1000
    if policy.max_processing_deadline_ms is not None:
        deadline_ms = min(deadline_ms, policy.max_processing_deadline_ms)
    return _Times(
        received_at_ms,
        received_at_ms + _shortened(arrival.delay_s, policy.max_delay_ms),
        None if arrival.expires_s is None else received_at_ms + arrival.expires_s * 1000,
        deadline_ms,
    )


def _arrives_as(arrival: Arrival, times: _Times, gate: Gate, now: Now) -> Event:
    if arrival.undecodable:
        return Event.ARRIVED_UNDECODABLE
    if gate.kills and killed_by(gate, arrival.taskname, arrival.activation):
        return Event.ARRIVED_DROPPED
    if times.expires_at_ms is not None and times.expires_at_ms <= now.wall_ms and now.may_expire:
        return Event.ARRIVED_EXPIRED
    if gate.demoted:
        return Event.ARRIVED_FORWARDED
    if arrival.delay_s and times.due_at_ms > now.wall_ms:  # a producer's clock ahead of ours is no delay
        return Event.ARRIVED_DELAYED
    return Event.ARRIVED


def _shortened(delay_s: int | None, max_delay_ms: int | None) -> int:
    delay_ms = (delay_s or 0) * 1000
    return delay_ms if max_delay_ms is None else min(delay_ms, max_delay_ms)
