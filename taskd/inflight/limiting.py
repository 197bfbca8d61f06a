"""What limits leave of a claim, and what a claim takes from them."""

from __future__ import annotations

from dataclasses import replace

from taskd.clock import Now
from taskd.inflight.base import ClaimRequest
from taskd.inflight.limits import LimitState, room
from taskd.inflight.pools import Pools
from taskd.inflight.sqlite import Lane, SqliteStore


class Limiting:
    """In the transaction of a claim: rows that it hands out count for the next lane at once."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._pools = Pools(store)

    def within_pool(self, request: ClaimRequest) -> ClaimRequest:
        """The claim, for no more than its pool may still hold."""
        if request.holder is None or not request.pool:
            return request
        self._pools.note(request.holder, request.pool)
        left = self._pools.room(request)
        return request if left >= request.limit else replace(request, limit=left)

    def pool_states(self) -> list[LimitState]:
        return self._pools.states()

    def has_room(self, lane: Lane, request: ClaimRequest, now: Now) -> bool:
        """Whether something of this lane may be handed out to whoever asks."""
        if lane.namespace in self._store.unsettled or (lane.taskname and not _concerns(lane, request)):
            return False
        return not lane.limits or room(lane.limits, now.mono_ms) > 0

    def most(self, lane: Lane, wanted: int, now: Now) -> int:
        """How many of `wanted` may be handed out."""
        return min(wanted, room(lane.limits, now.mono_ms)) if lane.limits else wanted

    def may_go(self, lane: Lane, taskname: str, now: Now) -> bool:
        """Whether the head of a strict-order lane may go, as far as the rate of its task is concerned."""
        if not self._store.limits.rated:
            return True
        return room(self._store.limits.in_order(lane, taskname), now.mono_ms) > 0

    def handed_out(self, lane: Lane, count: int, taskname: str, now: Now) -> None:
        """So many rows of this lane; of which task counts only where one is handed out at a time."""
        store = self._store
        if store.limits.rated and count:
            store.take_tokens((*lane.limits, *store.limits.in_order(lane, taskname)), count, now)


def _concerns(lane: Lane, request: ClaimRequest) -> bool:
    """Whether a claim should look into the lane of one task: it knows the task, or nobody does."""
    known = None if request.knows is None else request.knows.in_lane(*lane.name)
    if known is None or lane.taskname in known:
        return True
    to_anyone = None if request.known_to_any is None else request.known_to_any.in_lane(*lane.name)
    return to_anyone is not None and lane.taskname not in to_anyone
