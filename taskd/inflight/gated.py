"""Claims in lanes where it depends on the task whether a row may be handed out.

Some tasks are paused, some are under a killswitch, and a worker does not know every task. What may not go
is passed over, each row once as long as nothing changes: `SqliteStore.passed` remembers up to which `seq`
a lane has nothing for whom.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from taskd.activation.lifecycle import Event, Status
from taskd.activation.switches import Gate
from taskd.clock import Now
from taskd.inflight.departures import Departures
from taskd.inflight.sqlite import Lane, SqliteStore
from taskd.inflight.switches import KILLED, killed_by

SCAN_CHUNK = 64
SCAN_ROWS = 1_024  # rows passed over in one claim; the next goes on behind them


@dataclass(frozen=True, slots=True)
class Claimable:
    """Who claims in a lane. `known`: the names of its tasks, None: all; `known_to_any`: what is in none of
    these is parked, None: nothing is. `in_order`: nothing may overtake, so what may not go holds up all."""

    known: frozenset[str] | None = None
    known_to_any: frozenset[str] | None = None
    in_order: bool = False

    def is_unknown(self, taskname: str) -> bool:
        return self.known is not None and taskname not in self.known

    def is_known_to_nobody(self, taskname: str) -> bool:
        return self.known_to_any is not None and taskname not in self.known_to_any


class GatedLanes:
    def __init__(self, store: SqliteStore, departures: Departures) -> None:
        self._store = store
        self._departures = departures
        self.cut_short = False  # there was more to pass over than one claim does

    def rows(self, lane: Lane, wanted: int, now: Now, claimable: Claimable) -> Generator[Any, None, None]:
        """Rows that may be handed out, as `waiting_in_lane` has them.

        On the way, what is killed is dropped, and what nobody knows is parked.
        """
        for row in self._claimable(lane, wanted, now, claimable):
            yield self._store.one("waiting_row", row)

    def _claimable(self, lane: Lane, wanted: int, now: Now, claimable: Claimable) -> list[int]:
        store, gate = self._store, self._store.gate(lane)
        found: list[int] = []
        of_lane = store.passed.setdefault(lane.number, {})
        seq = passed = of_lane.get(claimable.known, 0)
        leaves_some = claimable.known in of_lane
        scanned, chunk = 0, max(SCAN_CHUNK, wanted)
        while len(found) < wanted:
            rows = store.run("tasks_in_lane", lane.number, seq, chunk).fetchall()
            for row, seq, taskname in rows:
                if taskname in gate.paused_tasks or claimable.is_unknown(taskname):
                    if claimable.in_order:
                        return found
                    if claimable.is_known_to_nobody(taskname):
                        self._park(lane, row, taskname)
                    else:
                        leaves_some = True
                elif not self._drop_killed(lane, gate, row, taskname, now):
                    found.append(row)
                    if len(found) == wanted:
                        break
                if not found:
                    passed = seq
            scanned += len(rows)
            if len(rows) < chunk:
                break
            if scanned >= SCAN_ROWS:
                self.cut_short |= not found  # else the next claim would find the same, and not one more
                break
        if leaves_some:
            of_lane[claimable.known] = passed
        return found

    def passes_over(self, lane: Lane, claimable: Claimable) -> bool:
        """Whether there surely is something in a lane that may not go."""
        return claimable.known in self._store.passed.get(lane.number, ()) or self._store.gate(lane).by_task

    def _park(self, lane: Lane, row: int, taskname: str) -> None:
        self._store.move(row, lane.number, Status.PENDING, Event.PARKED)
        self._store.run("park_row", row)
        self._store.note_unknown(lane, taskname)

    def _drop_killed(self, lane: Lane, gate: Gate, row: int, taskname: str, now: Now) -> bool:
        if taskname not in gate.kills:
            return False
        if killed_by(gate, taskname, self._store.one("activation", row)[0]) is None:
            return False
        self._departures.drop(row, lane.number, Status.PENDING, now, KILLED)
        return True
