"""Rows go out: what must be published before they are gone, and the tombstones they leave."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from taskd.activation.lifecycle import Event, Status
from taskd.clock import Now
from taskd.inflight.base import Leaving, Left, Outcome, Settlement
from taskd.inflight.sqlite import SqliteStore

FORBIDDEN = "forbidden: "  # before the reason of rows that are set aside only until somebody allows them
MAX_LEAVING_BYTES = 16 * 1024 * 1024  # of activations read for one round of publishing

OUTCOMES = {
    Status.COMPLETE: Outcome.COMPLETE,
    Status.RETRY: Outcome.RETRIED,
    Status.FAILURE: Outcome.FAILED,
    Status.EXPIRED: Outcome.EXPIRED,
    Status.DROPPED: Outcome.DROPPED,
}


class Departures:
    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    def fail(
        self,
        row: int,
        lane: int,
        before: Status,
        event: Event,
        dead_letter: bool,
        now: Now,
        reason: str,
        error: str,
    ) -> None:
        """A row failed for good: keep it until its dead letter is published, or discard it at once."""
        status = self._store.move(row, lane, before, event)
        if dead_letter:
            self._store.run("leave", status, reason, error, None, None, row)
        else:
            self._store.discard(reason)
            self.finish(row, lane, status, now, reason=reason, error=error)

    def expire(self, row: int, lane: int, before: Status, dead_letter: bool, now: Now) -> None:
        self.fail(row, lane, before, Event.EXPIRED, dead_letter, now, "expired", "")

    def finish(
        self,
        row: int,
        lane: int,
        before: Status,
        now: Now,
        *,
        reason: str | None = None,
        error: str | None = None,
        continued_as: str | None = None,
        dead_lettered: bool = False,
    ) -> None:
        """Turn a row into its tombstone."""
        self._store.move(row, lane, before, Event.SETTLED)
        outcome = OUTCOMES[before].value
        self._store.run("gone", outcome, continued_as, dead_lettered, now.wall_ms, reason, error, row)

    def leaving(self, limit: int) -> list[Leaving]:
        """Rows whose retry, dead letter or copy is to be published, oldest first."""
        return self._leaving(self._store.run("leaving", limit))

    def demoted(self, limit: int) -> list[Leaving]:
        """Rows of demoted namespaces that are to be published, oldest first; `leaving` passes them over."""
        return self._leaving(self._store.run("demoted", limit))

    def _leaving(self, cursor: Any) -> list[Leaving]:
        """As many of the rows as one round may hold in memory, at least one."""
        found: list[Leaving] = []
        left_bytes = MAX_LEAVING_BYTES
        for (
            _, id_, status, activation, record_key, topic, partition, offset, retry_attempts, attempts,
            dead_letter, max_attempts, delay_s, reason, error, lane, received_at_ms, forward_topic,
        ) in cursor:  # fmt: skip
            left_bytes -= len(activation)
            if left_bytes < 0 and found:
                break
            found.append(
                Leaving(
                    id=id_,
                    status=Status(status),
                    activation=activation,
                    record_key=record_key,
                    topic=topic,
                    partition=partition,
                    offset=offset,
                    retry_attempts=retry_attempts,
                    attempts=attempts,
                    dead_letter=bool(dead_letter),
                    namespace=self._store.lanes[lane].namespace,
                    max_attempts=max_attempts,
                    delay_on_retry_s=delay_s,
                    reason=reason or "",
                    error=error or "",
                    received_at_ms=received_at_ms,
                    forward_topic=forward_topic,
                )
            )
        cursor.close()
        return found

    def drop(
        self, row: int, lane: int, before: Status, now: Now, reason: str, error: str | None = None
    ) -> None:
        """An operator wants this never to run: gone at once, without a dead letter."""
        status = self._store.move(row, lane, before, Event.DROPPED)
        self._store.discard(reason)
        self.finish(row, lane, status, now, reason=reason, error=error)

    def forward(self, row: int, lane: int, before: Status, topic: str | None, reason: str) -> None:
        """Send a waiting row elsewhere; None: to the topic it came from. It is published, then gone."""
        status = self._store.move(row, lane, before, Event.FORWARDED)
        self._store.run("forward", status, topic, reason, row)

    def forward_all(self, limit: int, reason: str) -> int:
        """Send whatever waits back to the log, oldest first in each lane. Returns how many."""
        rows = [(row, lane, Status.DELAYED) for row, lane in self._store.run("delayed", limit)]
        for lane in self._store.lanes.values():
            if lane.counts[Status.PENDING] and len(rows) < limit:
                found = self._store.run("pending_in_lane", lane.number, limit - len(rows))
                rows += [(row, lane.number, Status.PENDING) for (row,) in found]
            if lane.counts[Status.PARKED] and len(rows) < limit:
                found = self._store.run("parked_in_lane", lane.number, limit - len(rows))
                rows += [(row, lane.number, Status.PARKED) for (row,) in found]
        for row, number, status in rows:
            self.forward(row, number, status, None, reason)
        return len(rows)

    def left(self, limit: int) -> list[Left]:
        """Some of the activations that are not finished."""
        return [
            Left(id_, Status(status), stuck or "") for id_, status, stuck in self._store.run("left", limit)
        ]

    def _forget_forwarded(self, row: int, lane: int) -> None:
        # No tombstone: the copy has the same id, and may come back to this very store.
        self._store.move(row, lane, Status.FORWARDED, Event.SETTLED)
        self._delete([(row, lane)])

    def settle(self, settlements: Sequence[Settlement], now: Now) -> None:
        """What had to follow these rows is published: they are gone. Those gone already are passed over."""
        for settlement in settlements:
            found = self._store.one("settling", settlement.id)
            if found is None:
                continue
            row, status, lane, reason, error = found
            if status == Status.FORWARDED:
                self._forget_forwarded(row, lane)
                continue
            self.finish(
                row,
                lane,
                Status(status),
                now,
                reason=reason,
                error=error,
                continued_as=settlement.continued_as,
                dead_lettered=settlement.dead_lettered,
            )

    def stick(self, id_: str, why: str) -> None:
        """What follows this row can never be published: keep it, out of the way."""
        self._store.run("stick", why, id_)

    def set_aside(self, rows: Mapping[str, str]) -> None:
        """What follows these rows, by id, may not be published for now, and why: keep them out of the way."""
        for id_, why in rows.items():
            self.stick(id_, FORBIDDEN + why)

    def first_set_aside(self) -> dict[str, str]:
        """Take back one row for each reason, so that it is tried again. Returns the reasons by id."""
        found = {id_: why.removeprefix(FORBIDDEN) for id_, why in self._store.run("forbidden").fetchall()}
        for why in found.values():
            self.take_back(why, 1)
        return found

    def take_back(self, why: str, limit: int) -> int:
        """Have rows that were set aside for this reason published after all. Returns how many."""
        self._store.run("unstick", FORBIDDEN + why, limit)
        return int(self._store.db.changes())

    def forget(self, older_than_ms: int, max_count: int, limit: int) -> int:
        """Drop tombstones from before `older_than_ms` (wall) and beyond `max_count`. Returns how many."""
        if older_than_ms < self._store.finished_until_ms:  # see `remember_finished_until`
            older_than_ms = 0
        rows = self._store.run("forgettable", older_than_ms, limit).fetchall()
        excess = sum(lane.counts[Status.GONE] for lane in self._store.lanes.values()) - len(rows) - max_count
        if not rows and excess > 0:
            rows = self._store.run("oldest_gone", min(excess, limit)).fetchall()
        self._delete(rows)
        return len(rows)

    def _delete(self, rows: Sequence[tuple[int, int]]) -> None:
        """These tombstones, each with its lane."""
        self._store.run("forget", json.dumps([row for row, _ in rows]))
        for lane, count in Counter(lane for _, lane in rows).items():
            self._store.forget(lane, count)
