"""Which pool each worker on the stream belongs to, so that a limit of a pool can count the rows it holds.

It is kept with the rows: after a restart of the broker, what a pool holds counts before any of its
workers is back.
"""

from __future__ import annotations

from functools import partial

from taskd.inflight.base import ClaimRequest
from taskd.inflight.limits import UNLIMITED, LimitKind, LimitState
from taskd.inflight.sqlite import SqliteStore

FORGET_ABOVE = 256  # workers; beyond, those that hold nothing are forgotten


class Pools:
    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._pools: dict[str, str] = dict(store.run("pools"))  # by holder

    def note(self, holder: str, pool: str) -> None:
        """This worker, which is about to get rows, is of that pool."""
        before = self._pools.get(holder)
        if before == pool:
            return
        if before is None and len(self._pools) >= FORGET_ABOVE:
            self._forget_idle()
        self._store.run("note_pool", holder, pool)
        self._set(holder, pool)
        self._store.when_undone(partial(self._set, holder, before))

    def room(self, request: ClaimRequest) -> int:
        """How many more rows the pool of this claim may hold."""
        most = self._store.limits.pools.get(request.pool)
        if most is None:
            return UNLIMITED
        room = max(most - self.live(request.pool), 0)
        if not room:
            self._store.full_pools.add(request.pool)
        return room

    def live(self, pool: str) -> int:
        """Rows that workers of this pool hold."""
        holders = [holder for holder, its in self._pools.items() if its == pool]
        return sum(self._store.one("count_held_by", holder)[0] for holder in holders)

    def states(self) -> list[LimitState]:
        """Every limit of a pool. What waits does so in the lanes, for whichever pool."""
        return [
            LimitState(LimitKind.POOL, pool, most, None, self.live(pool), 0)
            for pool, most in self._store.limits.pools.items()
        ]

    def _forget_idle(self) -> None:
        held = {holder for (holder,) in self._store.run("holders")}
        for holder in self._pools.keys() - held:
            self._store.run("forget_pool", holder)
            self._store.when_undone(partial(self._set, holder, self._pools.pop(holder)))

    def _set(self, holder: str, pool: str | None) -> None:
        if pool is None:
            self._pools.pop(holder, None)
        else:
            self._pools[holder] = pool
