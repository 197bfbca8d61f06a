"""Rows are held: handed out under a lease, started, reported, handed back, taken back.

Every hand-out gives its rows a larger fence than any before. Who reports under a fence that is not
the row's newest is superseded: somebody else has, or had, the row since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress, groupby, repeat
from typing import Any

from taskd.activation.lifecycle import HELD, LEAVING, Event, Status
from taskd.clock import Now
from taskd.inflight.base import (
    Claimed,
    ClaimRequest,
    Lease,
    LeaseKind,
    Ref,
    Report,
    ReportStatus,
    Verdict,
)
from taskd.inflight.departures import Departures
from taskd.inflight.gated import Claimable, GatedLanes
from taskd.inflight.held import HeldRows
from taskd.inflight.limiting import Limiting
from taskd.inflight.limits import LimitState
from taskd.inflight.sqlite import Lane, SqliteStore
from taskd.wire.envelope import scan

MAX_ERROR_CHARS = 4_096  # of an error text kept with a row
MAX_EXPIRED_PER_CLAIM = 1_000  # rows; a transaction that expires more would hold up all others
MAX_ATTEMPTS_MARGIN = 3  # of retries beyond max_attempts; a worker that counts from elsewhere is no loop
MAX_REASON_CHARS = 64  # of the word that names a reason
WITHOUT_FENCE = frozenset({LeaseKind.UNARY, LeaseKind.PUSH})  # these holders report by id alone


# One row as a claim sees it, as `waiting_in_lane` has it: row, id, activation, deadline_ms, expires_at_ms,
# at_most_once, dead_letter, received_at_ms, taskname. No class: one is read for each hand-out.
Waiting = tuple[int, str, bytes, int, int | None, int, int, int, str]


@dataclass(slots=True)
class Claim:
    """One claim on its way over the lanes. `is_over`: what it has is all it gets."""

    request: ClaimRequest
    now: Now
    left_bytes: int
    left_at_most_once: int | None
    leases: list[Lease] = field(default_factory=list)
    expired: int = 0
    is_over: bool = False

    @property
    def left(self) -> int:
        return self.request.limit - len(self.leases)

    @property
    def cut_short(self) -> bool:
        """So much was expired that the rest is left for another transaction."""
        return self.expired >= MAX_EXPIRED_PER_CLAIM

    def expires_in_ms(self, expires_at_ms: int | None) -> int | None:
        """None: not by itself."""
        if expires_at_ms is None or not self.now.may_expire:
            return None
        return expires_at_ms - self.now.wall_ms

    def fitting(self, rows: Iterable[Waiting], known: frozenset[str] | None = None) -> list[Waiting]:
        """Those at the head that fit in what is left of bytes and of what may be at most once.

        Raises _PassesOver at the first whose task is not among `known`, None: all are.
        """
        fits: list[Waiting] = []
        left_bytes, left_once = self.left_bytes, self.left_at_most_once
        for row in rows:
            _, _, activation, _, _, at_most_once, _, _, taskname = row
            if known is not None and taskname not in known:
                raise _PassesOver
            left_bytes -= len(activation)
            if left_bytes < 0 and (fits or self.leases):
                break
            if at_most_once and left_once is not None:
                if not left_once:
                    self.is_over = True
                    break
                left_once -= 1
            fits.append(row)
        self.left_at_most_once = left_once
        return fits

    def claimable_in(self, lane: Lane, in_order: bool) -> Claimable:
        knows, anyones = self.request.knows, self.request.known_to_any
        return Claimable(
            None if knows is None else knows.in_lane(lane.application, lane.namespace),
            None if anyones is None else anyones.in_lane(lane.application, lane.namespace),
            in_order,
        )


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


_lease_of = partial(tuple.__new__, Lease)  # as frames.lease_ref


def _without_gap(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


class _PassesOver(Exception):
    """Among the rows is one that the claimant does not know."""


class Leases:
    def __init__(self, store: SqliteStore, departures: Departures) -> None:
        self._store = store
        self._departures = departures
        self._gated = GatedLanes(store, departures)
        self._limiting = Limiting(store)
        self._held = HeldRows(store)
        self._round: dict[int, None] = {}  # lanes in the order of their next turn
        self._round_version = -1
        self.cut_short = False  # the last claim met so many expired or paused rows that it left the rest

    # ---- hand out

    def claim(self, request: ClaimRequest, now: Now) -> list[Lease]:
        """Lease up to `request.limit` waiting rows, in turns over the lanes that have any."""
        request = self._limiting.within_pool(request)
        claim = Claim(request, now, request.max_bytes, request.at_most_once_limit)
        self._gated.cut_short = False
        lanes = self._ready_lanes(request, now)
        while lanes and claim.left and not claim.is_over:
            share = max(claim.left // len(lanes), 1)
            lanes = [lane for lane in lanes if self._claim_in_lane(lane, share, claim)]
        self.cut_short = claim.cut_short or self._gated.cut_short
        return claim.leases

    def claim_each(self, request: ClaimRequest, now: Now) -> Claimed:
        """As many claims of one row would lease one after the other, `request.limit` of them."""
        leases: list[Lease] = []
        while len(leases) < request.limit:  # a claim takes from a lane what its share is, and may leave some
            more = self.claim(replace(request, limit=request.limit - len(leases)), now)
            leases += more
            if not more or self.cut_short:
                return Claimed(leases, self.cut_short)
        return Claimed(leases, cut_short=False)

    def _claim_in_lane(self, lane: Lane, share: int, claim: Claim) -> bool:
        """Lease up to `share` rows of one lane. Whether it has more for this claim."""
        if claim.is_over or not claim.left:
            return False
        wanted = self._limiting.most(lane, min(share, claim.left), claim.now)
        if not wanted:
            return False
        rows, looked = self._waiting(lane, wanted, claim)
        if not rows or not self._limiting.may_go(lane, rows[0][-1], claim.now):
            return False  # none that may go, or too large for what is left: this lane keeps its turn
        left = claim.left
        self._hand_out(lane, self._not_expired(lane, rows, claim), claim)
        self._limiting.handed_out(lane, left - claim.left, rows[0][-1], claim.now)
        self._turn_over(lane)
        if looked and claim.left < left:
            return False  # one look in a claim where rows are passed over: it may be long
        return lane.counts[Status.PENDING] > 0 and not self._busy_in_order(lane)

    def _ready_lanes(self, request: ClaimRequest, now: Now) -> list[Lane]:
        lanes = self._store.lanes
        limited = self._store.limits.rules or self._store.unsettled
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
            and (request.knows is None or request.knows.may_serve(*lane.name, request.known_to_any))
            and not self._busy_in_order(lane)
            and not self._store.gate(lane).closed
            and (not limited or self._limiting.has_room(lane, request, now))
        ]

    def pool_states(self) -> list[LimitState]:
        """What limits of pools leave."""
        return self._limiting.pool_states()

    def _in_order(self, lane: Lane) -> bool:
        return lane.namespace in self._store.policy.strict_order_namespaces

    def _busy_in_order(self, lane: Lane) -> bool:
        """A strict-order lane has one live lease at a time."""
        return self._in_order(lane) and lane.counts[Status.PROCESSING] + lane.counts[Status.CLAIMED] > 0

    def _turn_over(self, lane: Lane) -> None:
        del self._round[lane.number]
        self._round[lane.number] = None

    def _waiting(self, lane: Lane, wanted: int, claim: Claim) -> tuple[list[Waiting], bool]:
        """The head of a lane, as far as it fits, and whether rows were passed over to find it.

        The first row of a claim goes whatever its size.
        """
        in_order = self._in_order(lane)
        wanted = 1 if in_order else wanted
        claimable = claim.claimable_in(lane, in_order)
        if not self._gated.passes_over(lane, claimable):
            cursor = self._store.run("waiting_in_lane", lane.number, wanted)
            with closing(cursor), suppress(_PassesOver):
                return claim.fitting(cursor, claimable.known), False
        rows = self._gated.rows(lane, wanted, claim.now, claimable)
        return claim.fitting(rows), True

    def _not_expired(self, lane: Lane, rows: list[Waiting], claim: Claim) -> list[Waiting]:
        """Those that may still run. What is too late is taken out on the way."""
        late: list[Waiting] = []
        rest: list[Waiting] = []
        for row in rows:
            left_ms = None if row[4] is None else claim.expires_in_ms(row[4])
            (rest if left_ms is None or left_ms > 0 else late).append(row)
        for number, *_, dead_letter, _, _ in late:
            self._departures.expire(number, lane.number, Status.PENDING, bool(dead_letter), claim.now)
        claim.expired += len(late)
        claim.is_over |= claim.cut_short
        return rest

    def _hand_out(self, lane: Lane, rows: list[Waiting], claim: Claim) -> None:
        """Give each of these rows its new lease."""
        if not rows:
            return
        store, request, now = self._store, claim.request, claim.now
        fences = store.next_fences(len(rows), now)
        numbers, ids, activations, deadlines_ms, expires_at_ms, once, _, received_at_ms, _ = zip(
            *rows, strict=True
        )
        fence_of = dict(zip(numbers, fences, strict=True))
        if request.kind is LeaseKind.PUSH:
            store.move_all(numbers, lane.number, Status.PENDING, Event.CLAIMED)
            end_ms = now.mono_ms + store.policy.claim_ms
            store.run("claim", request.kind, end_ms, json.dumps(fence_of))
        else:
            store.move_all(numbers, lane.number, Status.PENDING, Event.HANDED_OUT)
            self._lease(fence_of, once, claim)
        if request.kind is LeaseKind.UNARY:
            store.measure_since("received_to_started", received_at_ms, now)
        if request.kind is not LeaseKind.PUSH:
            started = request.kind is LeaseKind.UNARY
            said_of = zip(ids, repeat(None) if started else fences, strict=False)
            held = zip(numbers, repeat(lane.number), fences, received_at_ms, repeat(started), strict=False)
            self._held.remember(zip(said_of, held, strict=False))
        expires_in_ms: Iterable[int | None] = expires_at_ms
        if expires_at_ms.count(None) < len(rows):
            expires_in_ms = map(claim.expires_in_ms, expires_at_ms)
        leases = zip(ids, fences, activations, deadlines_ms, expires_in_ms, strict=True)
        claim.leases += map(_lease_of, leases)
        claim.left_bytes -= sum(map(len, activations))

    def _lease(self, fences: dict[int, int], at_most_once: Sequence[int], claim: Claim) -> None:
        """Lease these rows, given with their fences."""
        store, request, now = self._store, claim.request, claim.now
        # Unary calls have no START, and at most once the hand-out is the START: both count now.
        is_unary = request.kind is LeaseKind.UNARY
        counted = fences if is_unary else {row: fences[row] for row in compress(fences, at_most_once)}
        others = {row: fence for row, fence in fences.items() if row not in counted} if counted else fences
        begun = (now.mono_ms + store.policy.grace_ms, 1, 1, now.wall_ms, now.mono_ms)
        for values, those in ((begun, counted), ((None, 0, 0, None, None), others)):
            if those:
                self._lease_rows(those, (request.kind, request.holder, *values))

    def _lease_rows(self, fences: dict[int, int], values: tuple[Any, ...]) -> None:
        rows, its_fences = list(fences), list(fences.values())
        first, offset = rows[0], its_fences[0] - rows[0]
        # What came in together lies beside each other, and is a third cheaper to lease.
        if _without_gap(rows) and _without_gap(its_fences):
            self._store.run("hand_out_run", offset, *values, first, rows[-1])
        else:
            self._store.run("hand_out", *values, json.dumps(fences))

    # ---- what the holder says

    def start(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """The holder began: the attempt counts, the deadline runs."""
        verdicts: list[Verdict] = []
        for is_plain, group in groupby(refs, self._held.has_not_started):
            together = list(group)
            if is_plain and self._held.start(together, now):
                verdicts += [Verdict.APPLIED] * len(together)
            else:
                verdicts += [self._start(ref, now) for ref in together]
        return verdicts

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

    def complete(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """The work of these is done: as `report` of each, cheaper."""
        if self._held.complete(refs, now):
            return [Verdict.APPLIED] * len(refs)
        return self.report([Report(id_, fence, ReportStatus.COMPLETE) for id_, fence in refs], now)

    def report(self, reports: Sequence[Report], now: Now) -> list[Verdict]:
        """Outcomes of leases. A late one counts as long as nobody else was given the row."""
        verdicts: list[Verdict] = []
        for is_plain, group in groupby(reports, self._is_plain):
            together = list(group)
            if is_plain and self._held.complete([report[:2] for report in together], now):
                verdicts += [Verdict.APPLIED] * len(together)
            else:
                verdicts += [self._report(report, now) for report in together]
        return verdicts

    def _is_plain(self, report: Report) -> bool:
        return report.status is ReportStatus.COMPLETE and self._held.has(report[:2])

    def _report(self, report: Report, now: Now) -> Verdict:
        self._held.forget(report[:2])
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
                self._crash(leased, now, report.error[:MAX_ERROR_CHARS])
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
        elif leased.at_most_once:  # a retry is a second run; workers of ours ask for none
            why = (now, "at_most_once", error)
            self._departures.fail(row, lane, before, Event.FAILED, leased.dead_letter, *why)
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
        self._held.forget(ref)
        leased = self._find(ref.id)
        if leased is None:
            return Verdict.UNKNOWN
        if leased.status is not Status.PROCESSING or leased.fence != ref.fence or leased.started:
            return Verdict.SUPERSEDED
        self._store.move(leased.row, leased.lane, Status.PROCESSING, Event.HANDED_BACK)
        self._store.run("requeue", int(leased.counted), leased.row)
        self._store.return_token(leased.row, leased.lane)
        return Verdict.APPLIED

    # ---- what the holder no longer says

    def reconcile(self, holder: str, holding: Iterable[Ref], now: Now) -> int:
        """End the leases of `holder` that it does not name as its own. Returns how many."""
        held = {(ref.id, ref.fence) for ref in holding}
        lost = [id_ for id_, fence in self._store.run("held_by", holder) if (id_, fence) not in held]
        for id_ in lost:
            self._end_by_id(id_, now, "lost on the way to its worker")
        return len(lost)

    def lost(self, refs: Iterable[Ref]) -> list[Ref]:
        """Those that are over for good: their row is gone or about to go, or was handed out again since."""
        return [
            ref
            for ref in refs
            if (row := self._find(ref.id)) is None or row.fence != ref.fence or row.status in LEAVING
        ]

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
        self._held.forget((id_, None if leased.kind == LeaseKind.UNARY else leased.fence))
        self._end(leased, now, "deadline", why)

    def _crash(self, leased: Leased, now: Now, error: str) -> None:
        """Its process ended under it. One that does so again and again would take down the next one, too."""
        (crashes,) = self._store.one("crash", leased.row)
        self._end(leased, now, "poison", error, may_wait=crashes < self._store.policy.max_crashes)

    def _end(
        self,
        leased: Leased,
        now: Now,
        reason: str,
        error: str,
        *,
        forgive: bool = False,
        may_wait: bool = True,
    ) -> None:
        """A lease ended without an outcome: wait again, unless that may not be.

        `forgive`: as if it had not been an attempt. `may_wait`: as far as is known outside.
        """
        may_wait &= leased.attempts < self._store.policy.max_processing_attempts
        if leased.at_most_once:
            reason = "at_most_once"
        elif forgive or may_wait:
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
