"""Rows are handed out: whose turn it is among the lanes, which rows of it go, and under which lease.

Every hand-out gives its rows a larger fence than any before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress, repeat
from typing import Any

from taskd.activation.lifecycle import Event, Status
from taskd.clock import Now
from taskd.inflight.base import Claimed, ClaimRequest, Lease, LeaseKind
from taskd.inflight.departures import Departures
from taskd.inflight.gated import Claimable, GatedLanes
from taskd.inflight.held import HeldRows
from taskd.inflight.limiting import Limiting
from taskd.inflight.limits import LimitState
from taskd.inflight.sqlite import Lane, SqliteStore

MAX_EXPIRED_PER_CLAIM = 1_000  # rows; a transaction that expires more would hold up all others

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


_lease_of = partial(tuple.__new__, Lease)  # as frames.lease_ref


def _without_gap(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


class _PassesOver(Exception):
    """Among the rows is one that the claimant does not know."""


class Handouts:
    """`held`: told what was handed out."""

    def __init__(self, store: SqliteStore, departures: Departures, held: HeldRows) -> None:
        self._store = store
        self._departures = departures
        self._held = held
        self._gated = GatedLanes(store, departures)
        self._limiting = Limiting(store)
        self._round: dict[int, None] = {}  # lanes in the order of their next turn
        self._round_version = -1
        self.cut_short = False  # the last claim met so many expired or paused rows that it left the rest

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
