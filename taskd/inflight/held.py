"""Rows that workers hold, as they were handed out: many are started or completed at once, without a look-up.

What is remembered is a guess. Every statement that relies on it names lane, fence and status, so it finds
no row where the guess is wrong; all of them are then left to whoever looks at each row. So nothing has to
keep the memory in step with the rows, also when a transaction is undone: fences are never used again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from taskd.activation.lifecycle import Event, Status
from taskd.clock import Now
from taskd.inflight.base import Ref, Report
from taskd.inflight.sqlite import SqliteStore

MAX_REMEMBERED = 20_000  # some 7 MB; beyond, all are forgotten and their reports cost a look-up each


class HeldRow(NamedTuple):
    """One row as it was handed out on the stream. `started`: its holder said so."""

    row: int
    lane: int
    fence: int
    received_at_ms: int
    started: bool = False


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
        """Whether it was handed out under this fence, and nothing newer is known of it."""
        found = self._rows.get(id_)
        return found is not None and found.fence == fence

    def has_not_started(self, id_: str, fence: int) -> bool:
        found = self._rows.get(id_)
        return found is not None and found.fence == fence and not found.started

    def start(self, refs: Sequence[Ref], now: Now) -> bool:
        """Their holders began these. False: not all are held as remembered, and nothing was done."""
        store, end_ms = self._store, now.mono_ms + self._store.policy.grace_ms
        held = self._found(ref.id for ref in refs)
        if held is None or not store.run_if_each(
            "start_held",
            [
                (end_ms, now.wall_ms, now.mono_ms, row.row, row.lane, ref.fence)
                for row, ref in zip(held, refs, strict=True)
            ],
        ):
            return False
        for ref, row in zip(refs, held, strict=True):
            self._rows[ref.id] = row._replace(started=True)
        store.measure_since("received_to_started", (row.received_at_ms for row in held), now)
        return True

    def complete(self, reports: Sequence[Report], now: Now) -> bool:
        """The work of these is done. False: not all are held as remembered, and nothing was done.

        One that was not known to have started is counted as started now.
        """
        store, at_ms = self._store, now.wall_ms
        held = self._found(report.id for report in reports)
        if held is None or not store.run_if_each(
            "complete_held",
            [
                (at_ms, at_ms, row.row, row.lane, report.fence)
                for row, report in zip(held, reports, strict=True)
            ],
        ):
            return False
        by_lane: defaultdict[int, list[int]] = defaultdict(list)
        for row in held:
            by_lane[row.lane].append(row.row)
        for lane, rows in by_lane.items():
            status = store.move_all(rows, lane, Status.PROCESSING, Event.COMPLETED)
            store.move_all(rows, lane, status, Event.SETTLED)
        store.measure_since("received_to_started", (r.received_at_ms for r in held if not r.started), now)
        store.measure_since("received_to_finished", (row.received_at_ms for row in held), now)
        for report in reports:
            self._rows.pop(report.id, None)
        return True

    def _found(self, ids: Iterable[str]) -> list[HeldRow] | None:
        """What is remembered of these; None: not of all, as what came before in this write ended some."""
        try:
            return [self._rows[id_] for id_ in ids]
        except KeyError:
            return None
