"""Rows that workers hold, as they were handed out: many are started or completed at once, without a look-up.

What is remembered is a guess. Every statement that relies on it names lane, fence and status, so it finds
no row where the guess is wrong; all of them are then left to whoever looks at each row. So nothing has to
keep the memory in step with the rows, also when a transaction is undone: fences are never used again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from taskd.activation.lifecycle import Event, Status
from taskd.clock import Now
from taskd.inflight.base import Ref, Report
from taskd.inflight.sqlite import SqliteStore

MAX_REMEMBERED = 20_000  # some 7 MB; beyond, all are forgotten and their reports cost a look-up each


class HeldRow(NamedTuple):
    """One row as it was handed out. `started`: its holder said so; `by_id`: it names no fence."""

    row: int
    lane: int
    fence: int
    received_at_ms: int
    started: bool = False
    by_id: bool = False


class HeldRows:
    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._rows: dict[str, HeldRow] = {}

    def remember(self, rows: Iterable[tuple[str, HeldRow]]) -> None:
        """These were handed out, by id."""
        if len(self._rows) > MAX_REMEMBERED:
            self._rows.clear()
        self._rows.update(rows)

    def forget(self, id_: str) -> None:
        self._rows.pop(id_, None)

    def has(self, id_: str, fence: int | None) -> bool:
        """Whether it was handed out under this fence, and nothing newer is known of it.

        None: to somebody who names none.
        """
        found = self._rows.get(id_)
        return found is not None and (found.fence == fence or (fence is None and found.by_id))

    def has_not_started(self, id_: str, fence: int) -> bool:
        found = self._rows.get(id_)
        return found is not None and found.fence == fence and not found.started

    def start(self, refs: Sequence[Ref], now: Now) -> bool:
        """Their holders began these. False: not all are held as remembered, and nothing was done."""
        store = self._store
        held = self._found(ref.id for ref in refs)
        times = (now.mono_ms + store.policy.grace_ms, now.wall_ms, now.mono_ms)
        if held is None or not self._run("start_held", times, held):
            return False
        for ref, row in zip(refs, held, strict=True):
            self._rows[ref.id] = row._replace(started=True)
        store.measure_since("received_to_started", (row.received_at_ms for row in held), now)
        return True

    def complete(self, reports: Sequence[Report], now: Now) -> bool:
        """The work of these is done. False: not all are held as remembered, and nothing was done.

        One that was not known to have started is counted as started now.
        """
        store = self._store
        held = self._found(report.id for report in reports)
        if held is None or not self._run("complete_held", (now.wall_ms, now.wall_ms), held):
            return False
        for lane, fences in by_lane(held).items():
            rows = list(fences)
            status = store.move_all(rows, lane, Status.PROCESSING, Event.COMPLETED)
            store.move_all(rows, lane, status, Event.SETTLED)
        store.measure_since("received_to_started", (r.received_at_ms for r in held if not r.started), now)
        store.measure_since("received_to_finished", (row.received_at_ms for row in held), now)
        for report in reports:
            self._rows.pop(report.id, None)
        return True

    def _run(self, statement: str, values: tuple[int, ...], held: list[HeldRow]) -> bool:
        # One statement for many rows: SQLite works through them without Python's lock in between.
        each = [(*values, json.dumps(fences), lane) for lane, fences in by_lane(held).items()]
        return self._store.run_if_all(statement, each, len(held))

    def _found(self, ids: Iterable[str]) -> list[HeldRow] | None:
        """What is remembered of these; None: not of all, as what came before in this write ended some."""
        try:
            return [self._rows[id_] for id_ in ids]
        except KeyError:
            return None


def by_lane(held: Iterable[HeldRow]) -> dict[int, dict[int, int]]:
    """The fences of rows, by lane and row."""
    found: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for row in held:
        found[row.lane][row.row] = row.fence
    return found
