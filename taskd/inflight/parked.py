"""Rows that nobody can run now are parked: out of the way of claims, and back when somebody can.

Push parks whole applications, those that no worker is mapped for. A claim of a worker that tells which
tasks it knows parks single rows on its way (gated.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection

from taskd.activation.lifecycle import Event, Status
from taskd.inflight.known import KnownTasks
from taskd.inflight.sqlite import Lane, SqliteStore


class Parked:
    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    def sort(self, served: Collection[str], limit: int) -> int:
        """Park what belongs to no application of `served`, and bring back the rest.

        Handles at most `limit` rows; returns how many.
        """
        handled = 0
        for lane in list(self._store.lanes.values()):
            if lane.application in served:
                handled += self._bring_back(lane, None, limit - handled)
            else:
                handled += self._park(lane, limit - handled)
        return handled

    def bring_back(self, known: KnownTasks, limit: int) -> int:
        """Bring back what somebody knows now. Handles at most `limit` rows; returns how many."""
        handled = 0
        for lane in list(self._store.lanes.values()):
            names = known.in_lane(lane.application, lane.namespace)
            if names is None or names:
                handled += self._bring_back(lane, names, limit - handled)
        return handled

    def _park(self, lane: Lane, limit: int) -> int:
        if limit <= 0 or not lane.counts[Status.PENDING]:
            return 0
        rows = self._store.run("park", lane.number, limit).fetchall()
        for (row,) in rows:
            self._store.move(row, lane.number, Status.PENDING, Event.PARKED)
        return len(rows)

    def _bring_back(self, lane: Lane, names: frozenset[str] | None, limit: int) -> int:
        if limit <= 0 or not lane.counts[Status.PARKED]:
            return 0
        if names is None:
            rows = self._store.run("unpark", lane.number, limit).fetchall()
        else:
            rows = self._store.run("unpark_tasks", lane.number, json.dumps(sorted(names)), limit).fetchall()
        for (row,) in rows:
            self._store.move(row, lane.number, Status.PARKED, Event.UNPARKED)
        return len(rows)
