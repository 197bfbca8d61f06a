"""An operator cancels activations by id, wherever they are: waiting, with a worker, about to be retried.

What was cancelled is gone at once, and its tombstone refuses a redelivered record, a late result and a
retry. A retry goes on under an id derived from the activation's, so an id stands for all that
followed it: the newest is cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import HELD, WAITING, Status
from taskd.clock import Now
from taskd.inflight.base import Outcome, Ref
from taskd.inflight.departures import Departures
from taskd.inflight.sqlite import SqliteStore

CANCELLED = "cancelled"  # the reason stored with what an operator cancelled


class Effect(Enum):
    """What a cancel did. The value is the word for machines."""

    DROPPED = "dropped"  # it will not run
    STOPPING = "stopping"  # gone; its worker, known by id, is to be told
    UNTOLD = "untold"  # gone; a worker has it that cannot be told, and whose result will be ignored
    EXPECTED = "expected"  # not here; will be dropped if it comes while its tombstone is kept
    ENDED = "ended"  # before the order
    LEAVING = "leaving"  # its dead letter, or its copy for another topic, is on the way
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What became of one id. `status`: before the order; None: not in this store.

    `newest`: the id of the retry that this was about, when it is not `id`. `holder`: the worker to tell.
    """

    id: str
    effect: Effect
    status: Status | None = None
    outcome: str = ""
    newest: str = ""
    holder: str = ""
    ref: Ref | None = None


class Found(NamedTuple):
    """One row as a cancel sees it; the columns of `cancelling`."""

    row: int
    status: int
    lane: int
    fence: int
    holder: str | None
    outcome: str | None
    continued_as: str | None
    retry_attempts: int


class Cancelling:
    def __init__(self, store: SqliteStore, departures: Departures) -> None:
        self._store = store
        self._departures = departures

    def cancel(self, ids: Sequence[str], why: str, now: Now, *, even_unknown: bool) -> list[Cancelled]:
        """Cancel each, in the order given. `even_unknown`: refuse what is not here, should it arrive.

        `why`: who and for what reason, stored as the error. Nothing is published for what is cancelled.
        """
        return [self._cancel(id_, why, now, even_unknown) for id_ in ids]

    def _cancel(self, id_: str, why: str, now: Now, even_unknown: bool) -> Cancelled:
        newest, lane, retry_dropped = id_, None, False
        while (found := self._find(newest)) is not None:
            follower = found.continued_as
            if found.status == Status.RETRY:  # what follows it may have been published just now
                self._departures.drop(found.row, found.lane, Status.RETRY, now, CANCELLED, why)
                follower, retry_dropped = retry_id(newest, found.retry_attempts + 1), True
            if not follower:
                break
            newest, lane = follower, found.lane
        told = "" if newest == id_ else newest
        if found is not None:
            return self._cancel_row(id_, newest, told, found, why, now)
        if lane is None and not even_unknown:
            return Cancelled(id_, Effect.UNKNOWN)
        self._expect(newest, lane or self._store.lane_of("", "").number, why, now)
        if retry_dropped:
            return Cancelled(id_, Effect.DROPPED, Status.RETRY, newest=told)
        return Cancelled(id_, Effect.EXPECTED, newest=told)

    def _cancel_row(self, id_: str, newest: str, told: str, found: Found, why: str, now: Now) -> Cancelled:
        status = Status(found.status)
        if status not in WAITING | HELD:
            effect = Effect.ENDED if status is Status.GONE else Effect.LEAVING
            return Cancelled(id_, effect, status, found.outcome or "", told)
        self._departures.drop(found.row, found.lane, status, now, CANCELLED, why)
        effect = Effect.DROPPED
        if status in HELD:
            effect = Effect.STOPPING if found.holder else Effect.UNTOLD
        holder = found.holder or ""
        return Cancelled(id_, effect, status, newest=told, holder=holder, ref=Ref(newest, found.fence))

    def _find(self, id_: str) -> Found | None:
        found = self._store.one("cancelling", id_)
        return None if found is None else Found(*found)

    def _expect(self, id_: str, lane: int, why: str, now: Now) -> None:
        """Leave a tombstone before the activation comes, so that it is known when it does."""
        tombstone = {
            "id": id_,
            "status": Status.GONE,
            "seq": self._store.next_seq(),
            "taskname": "",
            "topic": "",
            "partition": 0,
            "offset": 0,
            "received_at_ms": 0,
            "stored_at_ms": now.wall_ms,
            "deadline_ms": 0,
            "retry_attempts": 0,
            "dead_letter": 0,
            "at_most_once": 0,
            "outcome": Outcome.DROPPED.value,
            "reason": CANCELLED,
            "error": why,
            "finished_at_ms": now.wall_ms,
        }
        self._store.adopt(self._store.lanes[lane], Status.GONE, tombstone)
