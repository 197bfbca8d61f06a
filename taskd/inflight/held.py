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
from taskd.inflight.sqlite import SqliteStore

MAX_REMEMBERED = 20_000  # some 7 MB; beyond, all are forgotten and their reports cost a look-up each
# Rows that lie beside each other are completed by a statement for all of them, which is a third cheaper than
# one that is given each row. But between two statements the thread waits for its turn to run Python.
ROWS_PER_RUN = 24


# What a report names: id, and the fence it comes under; None: by a unary call, which knows no fences.
SaidOf = tuple[str, int | None]
# One row as it was handed out: row, lane, fence, received_at_ms, and whether its holder said that it started.
# No class: one is made for each hand-out.
HeldRow = tuple[int, int, int, int, bool]


class Run(NamedTuple):
    """Rows of a lane that lie beside each other, and so do their fences: each is its row and `offset`."""

    first: int
    last: int
    lane: int
    offset: int


class HeldRows:
    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._rows: dict[SaidOf, HeldRow] = {}

    def remember(self, rows: Iterable[tuple[SaidOf, HeldRow]]) -> None:
        """These were handed out."""
        if len(self._rows) > MAX_REMEMBERED:
            self._rows.clear()
        self._rows.update(rows)

    def forget(self, said_of: SaidOf) -> None:
        self._rows.pop(said_of, None)

    def has(self, said_of: SaidOf) -> bool:
        """Whether it was handed out like this; something newer may be known of it."""
        return said_of in self._rows

    def has_not_started(self, ref: SaidOf) -> bool:
        found = self._rows.get(ref)
        return found is not None and not found[-1]

    def start(self, refs: Sequence[SaidOf], now: Now) -> bool:
        """Their holders began these. False: not all are held as remembered, and nothing was done."""
        store = self._store
        held = self._found(refs)
        times = (now.mono_ms + store.policy.grace_ms, now.wall_ms, now.mono_ms)
        if held is None or not self._run("start_held", times, held):
            return False
        for ref, (row, lane, fence, received_at_ms, _) in zip(refs, held, strict=True):
            self._rows[ref] = (row, lane, fence, received_at_ms, True)
        store.measure_since(
            "received_to_started", [received_at_ms for _, _, _, received_at_ms, _ in held], now
        )
        return True

    def complete(self, done: Sequence[SaidOf], now: Now) -> bool:
        """The work of these is done. False: not all are held as remembered, and nothing was done.

        One that was not known to have started is counted as started now.
        """
        store = self._store
        held = self._found(done)
        if held is None or not self._complete(held, now):
            return False
        if started_now := [at_ms for _, _, _, at_ms, started in held if not started]:
            store.measure_since("received_to_started", started_now, now)
        store.measure_since(
            "received_to_finished", [received_at_ms for _, _, _, received_at_ms, _ in held], now
        )
        for said_of in done:
            self._rows.pop(said_of, None)
        return True

    def _complete(self, held: list[HeldRow], now: Now) -> bool:
        store, at_ms = self._store, now.wall_ms
        runs = _runs(held)
        if len(runs) <= 1 + len(held) // ROWS_PER_RUN:
            each = [(at_ms, at_ms, *run) for run in runs]
            rows: list[tuple[int, Sequence[int]]] = [(r.lane, range(r.first, r.last + 1)) for r in runs]
            complete = store.run_if_all("complete_run", each, len(held))
        else:
            rows = [(lane, list(fences)) for lane, fences in by_lane(held).items()]
            complete = self._run("complete_held", (at_ms, at_ms), held)
        for lane, its in rows if complete else ():
            status = store.move_all(its, lane, Status.PROCESSING, Event.COMPLETED)
            store.move_all(its, lane, status, Event.SETTLED)
        return complete

    def _run(self, statement: str, values: tuple[int, ...], held: list[HeldRow]) -> bool:
        # One statement for many rows: SQLite works through them without Python's lock in between.
        each = [(*values, json.dumps(fences), lane) for lane, fences in by_lane(held).items()]
        return self._store.run_if_all(statement, each, len(held))

    def _found(self, said_of: Iterable[SaidOf]) -> list[HeldRow] | None:
        """What is remembered of these; None: not of all, as what came before in this write ended some."""
        try:
            return [self._rows[its] for its in said_of]
        except KeyError:
            return None


def by_lane(held: Iterable[HeldRow]) -> dict[int, dict[int, int]]:
    """The fences of rows, by lane and row."""
    found: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for row, lane, fence, _, _ in held:
        found[lane][row] = fence
    return found


def _runs(held: Iterable[HeldRow]) -> list[Run]:
    """These rows in as few runs as there are; one that comes twice is in two of them."""
    runs: list[Run] = []
    first = lane = next_fence = next_row = -1
    for row, its_lane, fence, _, _ in sorted(held):
        if row != next_row or fence != next_fence or its_lane != lane:
            if next_row >= 0:
                runs.append(Run(first, next_row - 1, lane, next_fence - next_row))
            first, lane = row, its_lane
        next_row, next_fence = row + 1, fence + 1
    if next_row >= 0:
        runs.append(Run(first, next_row - 1, lane, next_fence - next_row))
    return runs
