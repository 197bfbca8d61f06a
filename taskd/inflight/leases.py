"""Rows are held: handed out under a lease, started, reported, handed back, taken back.

Every hand-out gives the row a larger fence than any before. Who reports under a fence that is not
the row's newest is superseded: somebody else has, or had, the row since.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from taskd.activation.lifecycle import HELD, Event, Status
from taskd.clock import Now
from taskd.inflight.base import (
    ClaimRequest,
    Lease,
    LeaseKind,
    Ref,
    Report,
    ReportStatus,
    Verdict,
)
from taskd.inflight.departures import Departures
from taskd.inflight.sqlite import Lane, SqliteStore
from taskd.inflight.switches import GatedLanes
from taskd.wire.envelope import scan

MAX_ERROR_CHARS = 4_096  # of an error text kept with a row
MAX_EXPIRED_PER_CLAIM = 1_000  # rows; a transaction that expires more would hold up all others
MAX_ATTEMPTS_MARGIN = 3  # of retries beyond max_attempts; a worker that counts from elsewhere is no loop
MAX_REASON_CHARS = 64  # of the word that names a reason
WITHOUT_FENCE = frozenset({LeaseKind.UNARY, LeaseKind.PUSH})  # these holders report by id alone


class Waiting(NamedTuple):
    """One row as a claim sees it; the columns of `waiting_in_lane`."""

    row: int
    id: str
    activation: bytes
    deadline_ms: int
    expires_at_ms: int | None
    at_most_once: int
    dead_letter: int
    received_at_ms: int


@dataclass(slots=True)
class Leased:
    """One row as its lease sees it; the columns of `leased`."""

    row: int
    status: Status
    lane: int
    fence: int
    kind: int
    attempts: int
    counted: bool
    started: bool
    at_most_once: bool
    dead_letter: bool
    deadline_ms: int
    received_at_ms: int

    def __post_init__(self) -> None:
        self.status = Status(self.status)
        self.dead_letter = bool(self.dead_letter)


class Leases:
    def __init__(self, store: SqliteStore, departures: Departures) -> None:
        self._store = store
        self._departures = departures
        self._gated = GatedLanes(store, departures)
        self._round: dict[int, None] = {}  # lanes in the order of their next turn
        self._round_version = -1
        self.cut_short = False  # the last claim met so many expired or paused rows that it left the rest

    # ---- hand out

    def claim(self, request: ClaimRequest, now: Now) -> list[Lease]:
        """Lease up to `request.limit` waiting rows, in turns over the lanes that have any."""
        leases: list[Lease] = []
        expired = 0
        self.cut_short = self._gated.cut_short = False
        left_bytes = request.max_bytes
        lanes = self._ready_lanes(request)
        while lanes and len(leases) < request.limit:
            share = max((request.limit - len(leases)) // len(lanes), 1)
            still_ready = []
            for lane in lanes:
                wanted = min(share, request.limit - len(leases))
                self.cut_short = expired >= MAX_EXPIRED_PER_CLAIM
                if not wanted or self.cut_short:
                    break
                rows = self._waiting(lane, wanted, left_bytes, now, is_first=not leases)
                if not rows:
                    continue  # too large for what is left: this lane keeps its turn
                taken = [lease for row in rows if (lease := self._hand_out(lane, row, request, now))]
                leases += taken
                expired += len(rows) - len(taken)
                left_bytes -= sum(len(lease.activation) for lease in taken)
                self._turn_over(lane)
                looked = bool(taken) and self._store.gate(lane).by_task  # one look in a claim: it may be long
                if lane.counts[Status.PENDING] > 0 and not looked and not self._busy_in_order(lane):
                    still_ready.append(lane)
            lanes = [] if self.cut_short else still_ready
        self.cut_short |= self._gated.cut_short
        return leases

    def _ready_lanes(self, request: ClaimRequest) -> list[Lane]:
        lanes = self._store.lanes
        if self._round_version != self._store.lanes_version:
            self._round = {n: None for n in self._round if n in lanes} | dict.fromkeys(lanes)
            self._round_version = self._store.lanes_version
        return [
            lane
            for number in self._round
            if (lane := self._store.lanes.get(number)) is not None
            and lane.counts[Status.PENDING] > 0
            and (request.application is None or lane.application == request.application)
            and (not request.namespaces or lane.namespace in request.namespaces)
            and not self._busy_in_order(lane)
            and not self._store.gate(lane).closed
        ]

    def _in_order(self, lane: Lane) -> bool:
        return lane.namespace in self._store.policy.strict_order_namespaces

    def _busy_in_order(self, lane: Lane) -> bool:
        """A strict-order lane has one live lease at a time."""
        return self._in_order(lane) and lane.counts[Status.PROCESSING] + lane.counts[Status.CLAIMED] > 0

    def _turn_over(self, lane: Lane) -> None:
        del self._round[lane.number]
        self._round[lane.number] = None

    def _waiting(
        self, lane: Lane, wanted: int, left_bytes: int, now: Now, *, is_first: bool
    ) -> list[Waiting]:
        """The head of a lane, as far as it fits; the first row of a claim goes whatever its size."""
        rows: list[Waiting] = []
        in_order = self._in_order(lane)
        wanted = 1 if in_order else wanted
        if self._store.gate(lane).by_task:
            cursor = self._gated.rows(lane, wanted, now, in_order=in_order)
        else:
            cursor = self._store.run("waiting_in_lane", lane.number, wanted)
        for values in cursor:
            row = Waiting(*values)
            left_bytes -= len(row.activation)
            if left_bytes < 0 and (rows or not is_first):
                break
            rows.append(row)
        cursor.close()
        return rows

    def _hand_out(self, lane: Lane, waiting: Waiting, request: ClaimRequest, now: Now) -> Lease | None:
        """The row's new lease; None when it expired instead."""
        expires_in_ms = None
        if waiting.expires_at_ms is not None and now.may_expire:
            expires_in_ms = waiting.expires_at_ms - now.wall_ms
            if expires_in_ms <= 0:
                dead_letter = bool(waiting.dead_letter)
                self._departures.expire(waiting.row, lane.number, Status.PENDING, dead_letter, now)
                return None
        fence = self._store.next_fence(now)
        if request.kind is LeaseKind.PUSH:
            self._store.move(waiting.row, lane.number, Status.PENDING, Event.CLAIMED)
            end_ms = now.mono_ms + self._store.policy.claim_ms
            self._store.run("claim", fence, request.kind, end_ms, waiting.row)
            return Lease(waiting.id, fence, waiting.activation, waiting.deadline_ms, expires_in_ms)
        # Unary calls have no START, and at most once the hand-out is the START: both count now.
        is_unary = request.kind is LeaseKind.UNARY
        counts = is_unary or bool(waiting.at_most_once)
        self._store.move(waiting.row, lane.number, Status.PENDING, Event.HANDED_OUT)
        self._store.run(
            "hand_out",
            fence,
            request.kind,
            request.holder,
            now.mono_ms + waiting.deadline_ms + self._store.policy.grace_ms if counts else None,
            counts,
            counts,
            now.wall_ms if counts else None,
            now.mono_ms if counts else None,
            waiting.row,
        )
        if is_unary:
            self._store.measure("received_to_started", now.wall_ms - waiting.received_at_ms)
        return Lease(waiting.id, fence, waiting.activation, waiting.deadline_ms, expires_in_ms)

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
            self._begin(leased, now)
        return Verdict.APPLIED

    def _begin(self, leased: Leased, now: Now) -> None:
        end_ms = now.mono_ms + leased.deadline_ms + self._store.policy.grace_ms
        self._store.run("start", not leased.counted, end_ms, now.wall_ms, now.mono_ms, leased.row)
        self._store.measure("received_to_started", now.wall_ms - leased.received_at_ms)
        leased.attempts += not leased.counted
        leased.counted = leased.started = True

    def report(self, reports: Sequence[Report], now: Now) -> list[Verdict]:
        """Outcomes of leases. A late one counts as long as nobody else was given the row."""
        return [self._report(report, now) for report in reports]

    def _report(self, report: Report, now: Now) -> Verdict:
        leased = self._find(report.id)
        if leased is None:
            return Verdict.UNKNOWN
        newest = leased.kind in WITHOUT_FENCE if report.fence is None else leased.fence == report.fence
        if not newest or leased.status not in (Status.PROCESSING, Status.PENDING, Status.CLAIMED):
            return Verdict.SUPERSEDED
        if leased.kind != LeaseKind.UNARY and leased.status in HELD and not leased.started:
            self._begin(leased, now)  # the result overtook its START, or carried it: it started all the same
        if report.status is ReportStatus.CRASHED:
            if leased.status is Status.PROCESSING:
                self._end(leased, now, "poison", report.error[:MAX_ERROR_CHARS])
            return Verdict.APPLIED
        if report.status is ReportStatus.INTERRUPTED:
            if leased.status is Status.PROCESSING:
                self._end(leased, now, "interrupted", report.error[:MAX_ERROR_CHARS], forgive=True)
            return Verdict.APPLIED
        self._finish(leased, report, now)
        self._store.measure("received_to_finished", now.wall_ms - leased.received_at_ms)
        return Verdict.APPLIED

    def _finish(self, leased: Leased, report: Report, now: Now) -> None:
        row, lane, before = leased.row, leased.lane, leased.status
        reason, error = report.reason[:MAX_REASON_CHARS], report.error[:MAX_ERROR_CHARS]
        if report.status is ReportStatus.COMPLETE:
            status = self._store.move(row, lane, before, Event.COMPLETED)
            self._departures.finish(row, lane, status, now)
        elif report.status is ReportStatus.FAILURE:
            reason = reason or "failed"
            self._departures.fail(row, lane, before, Event.FAILED, leased.dead_letter, now, reason, error)
        elif self._retries_without_end(row, report):
            self._departures.fail(row, lane, before, Event.FAILED, True, now, "max_attempts", error)
        else:
            status = self._store.move(row, lane, before, Event.RETRY_ASKED)
            follow = (report.max_attempts, report.delay_on_retry_s)
            self._store.run("leave", status, reason or "retry", error, *follow, row)

    def _retries_without_end(self, row: int, report: Report) -> bool:
        """Whether this retry is far beyond the attempts it may have, which its worker should have noticed.

        One that names no limit has none. Off by default: workers decide between retry and failure.
        """
        if not self._store.policy.enforce_max_attempts:
            return False
        envelope = scan(self._store.one("activation", row)[0])
        limit = envelope.max_attempts if report.max_attempts is None else report.max_attempts
        return limit > 0 and envelope.attempts + 1 > limit + MAX_ATTEMPTS_MARGIN

    def hand_back(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """The holder did not start these, or never got them: they wait again, their attempt undone."""
        return [self._hand_back(ref) for ref in refs]

    def _hand_back(self, ref: Ref) -> Verdict:
        leased = self._find(ref.id)
        if leased is None:
            return Verdict.UNKNOWN
        if leased.status is not Status.PROCESSING or leased.fence != ref.fence or leased.started:
            return Verdict.SUPERSEDED
        self._store.move(leased.row, leased.lane, Status.PROCESSING, Event.HANDED_BACK)
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

    def _end(self, leased: Leased, now: Now, reason: str, error: str, *, forgive: bool = False) -> None:
        """A lease ended without an outcome: wait again, unless that may not be.

        `forgive`: as if it had not been an attempt.
        """
        if leased.at_most_once:
            reason = "at_most_once"
        elif forgive or leased.attempts < self._store.policy.max_processing_attempts:
            self._store.move(leased.row, leased.lane, Status.PROCESSING, Event.LEASE_ENDED)
            self._store.run("requeue", int(forgive and leased.counted), leased.row)
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
        """The row; None when there is none, or only its tombstone."""
        found = self._store.one("leased", id_)
        return None if found is None else Leased(*found)
