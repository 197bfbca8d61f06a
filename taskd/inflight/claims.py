"""Rows on their way to a worker by push: claimed while the call is under way, and what became of it.

A claim is a lease of its own, for the time a push may take. Whoever ends it names its fence, and is
heard only while the row still is claimed under it: a worker may have reported the work as done before
the call that brought it has returned, and finished work stays finished.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskd.activation.lifecycle import Event, Status
from taskd.clock import Now
from taskd.inflight.base import Ref, Verdict
from taskd.inflight.leases import Leased
from taskd.inflight.sqlite import SqliteStore


class Claims:
    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    def pushed(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """A worker took these: the attempt counts, and the deadline runs from now."""
        return [self._pushed(ref, now) for ref in refs]

    def unclaim(self, refs: Sequence[Ref]) -> list[Verdict]:
        """These surely reached no worker: they wait again, no attempt counted."""
        return [self._unclaim(ref) for ref in refs]

    def maybe_pushed(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """A worker may have these. At most once: they count as started.

        Others stay claimed until the claim is over, which gives the worker time to report.
        """
        return [self._maybe_pushed(ref, now) for ref in refs]

    def end_overdue(self, limit: int, now: Now) -> int:
        """End the claims whose time is over, as if their push had been cut off. Returns how many."""
        overdue = [id_ for (id_,) in self._store.run("claims_over", now.mono_ms, limit)]
        for id_ in overdue:
            leased = Leased(*self._store.one("leased", id_))
            if leased.at_most_once:
                self._begin(leased, now)
            else:
                self._end(leased)
        return len(overdue)

    def _pushed(self, ref: Ref, now: Now) -> Verdict:
        leased = self._claimed(ref)
        if isinstance(leased, Leased):
            self._begin(leased, now)
            return Verdict.APPLIED
        return leased

    def _unclaim(self, ref: Ref) -> Verdict:
        leased = self._claimed(ref)
        if isinstance(leased, Leased):
            self._end(leased)
            self._store.return_token(leased.row, leased.lane)
            return Verdict.APPLIED
        return leased

    def _maybe_pushed(self, ref: Ref, now: Now) -> Verdict:
        leased = self._claimed(ref)
        if isinstance(leased, Leased):
            if leased.at_most_once:
                self._begin(leased, now)
            return Verdict.APPLIED
        return leased

    def _claimed(self, ref: Ref) -> Leased | Verdict:
        """The row as this claim holds it, or why the claim is no longer heard."""
        found = self._store.one("leased", ref.id)
        if found is None:
            return Verdict.UNKNOWN
        leased = Leased(*found)
        if leased.status is not Status.CLAIMED or leased.fence != ref.fence:
            return Verdict.SUPERSEDED
        return leased

    def _begin(self, leased: Leased, now: Now) -> None:
        end_ms = now.mono_ms + leased.deadline_ms + self._store.policy.grace_ms
        self._store.move(leased.row, leased.lane, Status.CLAIMED, Event.PUSHED)
        self._store.run("pushed", end_ms, now.wall_ms, leased.row)
        self._store.measure("received_to_started", now.wall_ms - leased.received_at_ms)

    def _end(self, leased: Leased) -> None:
        self._store.move(leased.row, leased.lane, Status.CLAIMED, Event.CLAIM_ENDED)
        self._store.run("requeue", 0, leased.row)
