"""Rows are held: handed out under a lease, started, reported, handed back, taken back.

Every hand-out gives the row a larger fence than any before. Who reports under a fence that is not
the row's newest is superseded: somebody else has, or had, the row since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from taskd.activation.lifecycle import Event, Status
from taskd.clock import Now
from taskd.inflight.base import (
    ClaimRequest,
    Lease,
    LeaseKind,
    Outcome,
    Ref,
    Report,
    ReportStatus,
    Verdict,
)
from taskd.inflight.departures import Departures
from taskd.inflight.sqlite import Lane, SqliteStore

MAX_ERROR_CHARS = 4_096  # of an error text kept with a row


@dataclass(slots=True)
class Leased:
    """One row as its lease sees it."""

    row: int
    status: Status
    lane: int
    fence: int
    kind: int
    holder: str | None
    attempts: int
    counted: bool
    started: bool
    at_most_once: bool
    dead_letter: bool
    deadline_ms: int
    received_at_ms: int
    started_at_ms: int | None


class Leases:
    def __init__(self, store: SqliteStore, departures: Departures) -> None:
        self._store = store
        self._departures = departures
        self._round: deque[int] = deque()  # lanes in the order of their next turn

    # ---- hand out

    def claim(self, request: ClaimRequest, now: Now) -> list[Lease]:
        """Lease up to `request.limit` waiting rows, in turns over the lanes that have any."""
        leases: list[Lease] = []
        lanes = self._ready_lanes(request)
        while lanes and len(leases) < request.limit:
            share = max((request.limit - len(leases)) // len(lanes), 1)
            still_ready = []
            for lane in lanes:
                wanted = min(share, request.limit - len(leases))
                if not wanted:
                    break
                taken, more = self._claim_from(lane, wanted, request, now)
                leases += taken
                if more:
                    still_ready.append(lane)
                self._turn_over(lane)
            lanes = still_ready
        return leases

    def _ready_lanes(self, request: ClaimRequest) -> list[Lane]:
        known = set(self._round)
        self._round.extend(number for number in self._store.lanes if number not in known)
        return [
            lane
            for number in self._round
            if (lane := self._store.lanes.get(number)) is not None
            and lane.counts[Status.PENDING] > 0
            and (request.application is None or lane.application == request.application)
            and (not request.namespaces or lane.namespace in request.namespaces)
            and not self._busy_in_order(lane)
        ]

    def _busy_in_order(self, lane: Lane) -> bool:
        """A strict-order lane has one live lease at a time."""
        return lane.namespace in self._store.policy.strict_order_namespaces and (
            lane.counts[Status.PROCESSING] + lane.counts[Status.CLAIMED] > 0
        )

    def _turn_over(self, lane: Lane) -> None:
        self._round.remove(lane.number)
        self._round.append(lane.number)

    def _claim_from(
        self, lane: Lane, wanted: int, request: ClaimRequest, now: Now
    ) -> tuple[list[Lease], bool]:
        """Leases from one lane, and whether it may have more to give."""
        in_order = lane.namespace in self._store.policy.strict_order_namespaces
        if in_order:
            wanted = 1
        rows = self._store.run("waiting_in_lane", lane.number, wanted).fetchall()
        leases = []
        for row, id_, activation, deadline_ms, expires_at_ms, at_most_once, dead_letter, _, received in rows:
            if expires_at_ms is not None and expires_at_ms <= now.wall_ms and now.may_expire:
                self._departures.expire(row, lane.number, Status.PENDING, bool(dead_letter), now)
                continue
            fence = self._store.next_fence(now)
            # Unary calls have no START, and at most once the hand-out is the START: both count now.
            counts = request.kind is LeaseKind.UNARY or bool(at_most_once)
            lease_end_ms = now.mono_ms + deadline_ms + self._store.policy.grace_ms if counts else None
            self._store.move(lane.number, Status.PENDING, Event.HANDED_OUT)
            self._store.run(
                "hand_out",
                fence,
                request.kind,
                request.holder,
                lease_end_ms,
                int(counts),
                int(counts),
                now.wall_ms if counts else None,
                row,
            )
            if request.kind is LeaseKind.UNARY:
                self._store.measure("received_to_started", now.wall_ms - received)
            expires_in_ms = None if expires_at_ms is None else max(expires_at_ms - now.wall_ms, 0)
            leases.append(Lease(id_, fence, activation, deadline_ms, expires_in_ms))
        return leases, len(rows) == wanted and not in_order

    # ---- what the holder says

    def start(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """The holder began: the attempt counts, the deadline runs."""
        return [self._start(ref, now) for ref in refs]

    def _start(self, ref: Ref, now: Now) -> Verdict:
        leased = self._find(ref.id)
        if leased is None:
            return Verdict.UNKNOWN
        if leased.status is not Status.PROCESSING or leased.fence != ref.fence:
            return Verdict.SUPERSEDED
        if not leased.started:
            end_ms = now.mono_ms + leased.deadline_ms + self._store.policy.grace_ms
            self._store.run("start", int(not leased.counted), end_ms, now.wall_ms, leased.row)
            self._store.measure("received_to_started", now.wall_ms - leased.received_at_ms)
        return Verdict.APPLIED

    def report(self, reports: Sequence[Report], now: Now) -> list[Verdict]:
        """Outcomes of leases. A late one counts as long as nobody else was given the row."""
        return [self._report(report, now) for report in reports]

    def _report(self, report: Report, now: Now) -> Verdict:
        leased = self._find(report.id)
        if leased is None or leased.status is Status.GONE:
            return Verdict.UNKNOWN
        newest = leased.kind == LeaseKind.UNARY if report.fence is None else leased.fence == report.fence
        if not newest or leased.status not in (Status.PROCESSING, Status.PENDING):
            return Verdict.SUPERSEDED
        if report.fence is not None and leased.status is Status.PROCESSING and not leased.counted:
            # The result overtook its START, or carried it: it started all the same.
            self._store.run("start", 1, None, now.wall_ms, leased.row)
            leased.attempts += 1
            leased.counted = leased.started = True
        error = report.error[:MAX_ERROR_CHARS]
        match report.status:
            case ReportStatus.COMPLETE:
                status = self._store.move(leased.lane, leased.status, Event.COMPLETED)
                self._departures.finish(leased.row, leased.lane, status, Outcome.COMPLETE, now)
            case ReportStatus.FAILURE:
                self._departures.fail(
                    leased.row,
                    leased.lane,
                    leased.status,
                    Event.FAILED,
                    leased.dead_letter,
                    now,
                    report.reason or "failed",
                    error,
                )
            case ReportStatus.RETRY:
                status = self._store.move(leased.lane, leased.status, Event.RETRY_ASKED)
                self._store.run(
                    "leave",
                    status,
                    report.reason or "retry",
                    error,
                    report.max_attempts,
                    report.delay_on_retry_s,
                    leased.row,
                )
            case ReportStatus.CRASHED:
                if leased.status is Status.PROCESSING:
                    self._end(leased, now, "poison", error)
        self._store.measure("received_to_finished", now.wall_ms - leased.received_at_ms)
        return Verdict.APPLIED

    def hand_back(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """The holder did not start these, or never got them: they wait again, their attempt undone."""
        return [self._hand_back(ref) for ref in refs]

    def _hand_back(self, ref: Ref) -> Verdict:
        leased = self._find(ref.id)
        if leased is None:
            return Verdict.UNKNOWN
        if leased.status is not Status.PROCESSING or leased.fence != ref.fence or leased.started:
            return Verdict.SUPERSEDED
        self._store.move(leased.lane, Status.PROCESSING, Event.HANDED_BACK)
        self._store.run("requeue", int(leased.counted), leased.row)
        return Verdict.APPLIED

    # ---- what the holder no longer says

    def reconcile(self, holder: str, holding: Iterable[Ref], now: Now) -> int:
        """End the leases of `holder` that it does not name as its own. Returns how many."""
        held = {(ref.id, ref.fence) for ref in holding}
        lost = [id_ for id_, fence in self._store.run("held_by", holder) if (id_, fence) not in held]
        for id_ in lost:
            self._end_by_id(id_, now, "lost on the way to its worker")
        return len(lost)

    def held_ids(self, limit: int) -> list[str]:
        """Some of the activations that are with workers now."""
        return [id_ for (id_,) in self._store.run("held", limit)]

    def holders(self) -> list[str]:
        """Workers that hold a stream lease."""
        return [holder for (holder,) in self._store.run("holders")]

    def end_overdue(self, limit: int, now: Now) -> int:
        """End the leases whose time is over. Returns how many."""
        overdue = [id_ for (id_,) in self._store.run("leases_over", now.mono_ms, limit)]
        for id_ in overdue:
            self._end_by_id(id_, now, "its deadline passed without a report")
        return len(overdue)

    def _end_by_id(self, id_: str, now: Now, why: str) -> None:
        leased = self._find(id_)
        assert leased is not None  # read in this very transaction
        self._end(leased, now, "deadline", why)

    def _end(self, leased: Leased, now: Now, reason: str, error: str) -> None:
        """A lease ended without an outcome: wait again, unless that may not be."""
        if leased.at_most_once:
            reason = "at_most_once"
        elif leased.attempts < self._store.policy.max_processing_attempts:
            self._store.move(leased.lane, Status.PROCESSING, Event.LEASE_ENDED)
            self._store.run("requeue", 0, leased.row)
            return
        self._departures.fail(
            leased.row,
            leased.lane,
            Status.PROCESSING,
            Event.EXHAUSTED,
            leased.dead_letter,
            now,
            reason,
            error,
        )

    def _find(self, id_: str) -> Leased | None:
        found = self._store.one("leased", id_)
        if found is None:
            return None
        row, status, lane, fence, kind, holder, attempts, counted, started, at_most_once, *rest = found
        return Leased(
            row,
            Status(status),
            lane,
            fence,
            kind,
            holder,
            attempts,
            bool(counted),
            bool(started),
            bool(at_most_once),
            bool(rest[0]),
            *rest[1:],
        )
