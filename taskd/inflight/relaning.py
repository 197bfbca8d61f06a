"""When other tasks are limited than before, rows move to the lanes that this makes for them.

They move in rounds of bounded size, and keep their order. Until they are where they belong, nothing is
handed out in the namespaces concerned: a limit that counts half of its rows would be none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from taskd.activation.lifecycle import HELD, WAITING, Status
from taskd.clock import Now
from taskd.errors import StoreError
from taskd.inflight.limits import LanedTask, Limits
from taskd.inflight.sqlite import SqliteStore

MOVED = WAITING | HELD  # what leaves, and tombstones, stay where they are: nothing counts them
META = "laned_tasks"


class Round(NamedTuple):
    """One round through the rows. `last_row`: where the next begins; None: all are in their lanes."""

    looked: int
    last_row: int | None


class Relaning:
    """Opening it finds out whether the file was written under the limits that hold now."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._after_row: int | None = None  # None: nothing is to be moved
        self._begin()
        with suppress(StoreError):  # a full disk: the first round says so
            store.apply([self._note_begun])

    @property
    def is_due(self) -> bool:
        return self._after_row is not None or self._store.limits.rules != self._store.policy.limits

    def round(self, limit: int, now: Now) -> Round:
        """Look at `limit` rows and move those that are not in their lane; other limits take effect first."""
        store, policy = self._store, self._store.policy
        if store.limits.rules != policy.limits:
            strict_order = policy.strict_order_namespaces
            store.set_limits(Limits(policy.limits, strict_order, now.mono_ms, before=store.limits))
            self._begin()
        if self._after_row is None:
            return Round(0, None)
        self._note_begun()
        rows = store.run("rows_after", self._after_row, limit).fetchall()
        for row, number, lane_number, taskname, *_ in rows:
            status, lane = Status(number), store.lanes[lane_number]
            if status not in MOVED:
                continue
            to = store.lane_of(lane.application, lane.namespace, taskname)
            if to is not lane:
                store.relane(row, status, lane, to)
        if len(rows) == limit:
            return Round(limit, rows[-1][0])
        write_laned(store, store.limits.laned, settled=True)
        return Round(len(rows), None)

    def done(self, round_: Round) -> bool:
        """This round is committed. Whether it was the last one."""
        if self._after_row is not None:
            self._after_row = round_.last_row
        if self._after_row is None:
            self._store.unsettled = frozenset()
        return self._after_row is None

    def _note_begun(self) -> None:
        """What arrives from here on goes to the new lanes, and must be found there also by the next start."""
        if self._after_row == 0:
            write_laned(self._store, self._store.limits.laned | read_laned(self._store)[0], settled=False)

    def _begin(self) -> None:
        store = self._store
        before, settled = read_laned(store)
        changed = before ^ store.limits.laned if settled else before | store.limits.laned
        self._after_row = 0 if changed or not settled else None
        lanes = {lane.namespace for lane in store.lanes.values() if lane.taskname}
        store.unsettled = frozenset(task.namespace for task in changed) | (lanes if not settled else set())


def read_laned(store: SqliteStore) -> tuple[frozenset[LanedTask], bool]:
    """The tasks that have lanes of their own in this file, and whether all their rows are there."""
    found = store.one("read_meta", META)
    if found is None:
        return frozenset(), True
    stored = json.loads(found[0])
    return frozenset(LanedTask(*task) for task in stored["tasks"]), stored["settled"]


def write_laned(store: SqliteStore, tasks: Iterable[LanedTask], *, settled: bool) -> None:
    ordered = sorted(tasks, key=lambda task: [part or "" for part in task])
    store.run("write_meta", META, json.dumps({"tasks": ordered, "settled": settled}))
