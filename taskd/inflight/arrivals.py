"""Rows come in: new activations are stored, delayed ones become due, late ones expire."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby

from taskd.activation.lifecycle import Event, Status, after
from taskd.activation.switches import OPEN, Gate
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
        events: list[Event | None] = []
        coming = (self._coming(arrival, now) for arrival in arrivals)
        for why_over, group in groupby(coming, _why_over):
            together = list(group)
            found = self._insert(together, now)
            if why_over:
                self._discard(together, found, why_over, now)
            events += found
        results = Counter(events)
        delayed = [a for a, event in zip(arrivals, events, strict=True) if event is not None and a.delay_s]
        return Inserted(
            pending=results[Event.ARRIVED],
            delayed=results[Event.ARRIVED_DELAYED],
            duplicate=results[None],
            expired=results[Event.ARRIVED_EXPIRED],
            undecodable=results[Event.ARRIVED_UNDECODABLE],
            dropped=results[Event.ARRIVED_DROPPED],
            forwarded=results[Event.ARRIVED_FORWARDED],
            shortened=tuple(a.id for a in delayed if self._is_shortened(a)),
            beyond_expiry=tuple(
                a.id
                for a in delayed
                if a.expires_s is not None and a.delay_s is not None and a.delay_s >= a.expires_s
            ),
        )

    def _is_shortened(self, arrival: Arrival) -> bool:
        return _delay_ms(arrival, self._store.policy) < (arrival.delay_s or 0) * 1000

    def _coming(self, arrival: Arrival, now: Now) -> _Coming:
        (
            id_,
            namespace,
            taskname,
            application,
            received_at_ms,
            processing_deadline_s,
            expires_s,
            delay_s,
            attempts,
            dead_letter,
            at_most_once,
            topic,
            partition,
            offset,
            record_key,
            activation,
            undecodable,
        ) = arrival
        policy = self._store.policy
        if received_at_ms is None or received_at_ms > now.wall_ms + FUTURE_TOLERANCE_MS:
            received_at_ms = now.wall_ms
        expires_at_ms = None if expires_s is None else received_at_ms + expires_s * 1000
        due_at_ms = received_at_ms + (_delay_ms(arrival, policy) if delay_s else 0)
        gate = self._store.board.gate(application, namespace)
        if undecodable or expires_s is not None or delay_s or gate is not OPEN:
            event = _arrives_as(arrival, due_at_ms, expires_at_ms, gate, now)
        else:
            event = Event.ARRIVED  # nothing that has to be decided
        values = (
            id_,
            taskname,
            topic,
            partition,
            offset,
            record_key,
            activation,
            received_at_ms,
            now.wall_ms,
            due_at_ms,
            expires_at_ms,
            _deadline_ms(processing_deadline_s, policy),
            attempts,
            dead_letter,
            at_most_once,
            undecodable or None,
        )
        return arrival, received_at_ms, event, values

    def _insert(self, coming: Sequence[_Coming], now: Now) -> list[Event | None]:
        """How each arrived; None: it is known."""
        store = self._store
        events = [event for _, _, event, _ in coming]
        lanes = [store.lane_of(a.application, a.namespace, a.taskname).number for a, _, _, _ in coming]
        stored_as = {event: (after(None, event), _REASONS.get(event)) for event in set(events)}
        last_row = store.one("last_row")[0] or 0
        count = store.run_many(
            "insert",
            [
                values + stored_as[event] + (lane, seq)
                for (_, _, event, values), lane, seq in zip(
                    coming, lanes, store.next_seqs(len(coming)), strict=True
                )
            ],
        )
        if count == len(coming):
            rows: Sequence[int | None] = range(last_row + 1, last_row + 1 + count)
            received_at_ms = [at_ms for _, at_ms, _, _ in coming]
        else:
            rows = self._new_rows(coming, last_row)
            received_at_ms = [at_ms for (_, at_ms, _, _), row in zip(coming, rows, strict=True) if row]
        moved: defaultdict[tuple[int, Event], list[int]] = defaultdict(list)
        for lane, event, row in zip(lanes, events, rows, strict=True):
            if row is not None:
                moved[lane, event].append(row)
        for (lane, event), its in moved.items():
            store.move_all(its, lane, None, event)
        for lane in set(lanes):
            store.drop_lane_if_empty(lane)
        store.measure_since("received_to_stored", received_at_ms, now)
        return [None if row is None else event for event, row in zip(events, rows, strict=True)]

    def _new_rows(self, coming: Sequence[_Coming], last_row: int) -> list[int | None]:
        """The row of each that is new, where some are known, or come twice: rows are numbered upwards."""
        rows: list[int | None] = []
        seen: set[int] = set()
        for arrival, *_ in coming:
            row = self._store.one("row_of", arrival.id)[0]
            is_new = row > last_row and row not in seen
            seen.add(row)
            rows.append(row if is_new else None)
        return rows

    def _discard(
        self, coming: Sequence[_Coming], events: Sequence[Event | None], reason: str, now: Now
    ) -> None:
        """Nothing follows these, and they never run: keep their ids only."""
        for (arrival, *_), event in zip(coming, events, strict=True):
            if event is not None:
                row, lane = self._store.one("row_of", arrival.id)
                self._store.discard(reason)
                self._departures.finish(row, lane, after(None, event), now, reason=reason)

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


# The arrival, when it counts as received, what is to become of it, and the values of its row but for lane and
# order. No class: one is made for each record.
_Coming = tuple[Arrival, int, Event, tuple[object, ...]]


def _why_over(coming: _Coming) -> str:
    """Why it is gone at once; empty: it is not."""
    arrival, _, event, _ = coming
    if event is Event.ARRIVED_DROPPED:
        return KILLED
    return "expired" if event is Event.ARRIVED_EXPIRED and not arrival.dead_letter else ""


def _arrives_as(arrival: Arrival, due_at_ms: int, expires_at_ms: int | None, gate: Gate, now: Now) -> Event:
    if arrival.undecodable:
        return Event.ARRIVED_UNDECODABLE
    if gate.kills and killed_by(gate, arrival.taskname, arrival.activation):
        return Event.ARRIVED_DROPPED
    if expires_at_ms is not None and expires_at_ms <= now.wall_ms and now.may_expire:
        return Event.ARRIVED_EXPIRED
    if gate.demoted:
        return Event.ARRIVED_FORWARDED
    if arrival.delay_s and due_at_ms > now.wall_ms:  # a producer's clock ahead of ours is no delay
        return Event.ARRIVED_DELAYED
    return Event.ARRIVED


def _deadline_ms(processing_deadline_s: int, policy: Policy) -> int:
    deadline_ms = (processing_deadline_s or DEFAULT_DEADLINE_S) * 1000
    most_ms = policy.max_processing_deadline_ms
    return deadline_ms if most_ms is None or deadline_ms < most_ms else most_ms


def _delay_ms(arrival: Arrival, policy: Policy) -> int:
    if not arrival.delay_s:
        return 0
    delay_ms = arrival.delay_s * 1000
    return delay_ms if policy.max_delay_ms is None else min(delay_ms, policy.max_delay_ms)
