"""Which task a child began, as its worker sees it: by looking at the note in their memory, now and then.

A child wakes nobody when it begins a task, and reports only the end (entry_note.py). So a quick task is told
by its report alone, and one that lasts is found by a look: a moment after the child got work or ended a task,
and whenever it gives another sign of life. Once a start is known nobody looks until that task ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from mmap import mmap

from taskd.worker import entry_note
from taskd.worker import entry_pipe as pipe

LOOK_AFTER_S, LOOK_AFTER_MOST_S = 0.003, 0.05  # less and less often while nothing begins
LASTS_S = 0.001  # the end of a task that began less long ago is awaited

_NEVER = float("inf")


class Starts:
    """Of one child. `now` is Trio's clock; nothing here waits.

    Numbers are those of work, in the order it was given, and the child begins it in that order. Without
    memory, the child reports its starts, and nobody looks.
    """

    def __init__(self, memory: mmap | None) -> None:
        self.look_at = _NEVER
        self._memory = memory
        self._given = 0  # the newest number
        self._kept: list[tuple[int, int]] = []  # first and last number of what was not taken back
        self._last = 0  # the newest of these
        self._begun = 0  # the newest that is known to have begun
        self._over = 0  # ... and to have ended
        self._after_s = LOOK_AFTER_S

    def given(self, count: int, now: float) -> None:
        if self._memory is None:
            return
        was_idle = self._over >= self._last
        while self._kept and self._kept[0][1] <= self._over:
            del self._kept[0]
        first, self._given = self._given + 1, self._given + count
        if self._kept and self._last == first - 1:
            first, _ = self._kept.pop()
        self._kept.append((first, self._given))
        self._last = self._given
        if was_idle:
            self._await(now)

    def taken_back(self, count: int) -> None:
        """The newest so many; among them may be some that were taken back before."""
        left = self._given - count
        while self._kept and self._kept[-1][0] > left:
            self._kept.pop()
        self._last = 0
        if self._kept:
            first, last = self._kept[-1]
            self._last = min(last, left)
            self._kept[-1] = first, self._last

    def look(self, now: float, *, early: bool = False) -> pipe.Started | None:
        """The start that nobody was told of, when it is time to look. `early`: it is, if there can be any.

        What ended before it is in the pipe by now; the caller reads that first, and then says `heard`.
        """
        if not (early or now >= self.look_at):
            return None
        if self._begun > self._over or self._over >= self._last:
            self.look_at = _NEVER
            return None
        started = self._noted()
        if started is None or started.number <= self._over:
            if not early:
                self._after_s = min(2 * self._after_s, LOOK_AFTER_MOST_S)
                self.look_at = now + self._after_s
            return None
        self.look_at = now + max(LASTS_S - started.ago_s, 0.0)
        return started

    def heard(
        self, reports: Iterable[pipe.Report], started: pipe.Started | None, now: float
    ) -> list[pipe.Report]:
        """What the child reported, with the starts that it leaves out. `started`: found by `look` before."""
        told: list[pipe.Report] = []
        for report in reports:
            if isinstance(report, pipe.Done | pipe.Expired):
                self._begun = self._over = report.number
            elif isinstance(report, pipe.Started):
                self._begun = report.number
            elif isinstance(report, pipe.Heartbeat) and report.number > self._begun:
                noted = self._noted()
                if noted is not None and noted.number == report.number:  # else it ended meanwhile
                    told.append(self.tell(noted))
            told.append(report)
        if started is not None and started.number > self._begun and started.ago_s >= LASTS_S:
            told.append(self.tell(started))
        elif told:
            self._await(now)
        return told

    def tell(self, started: pipe.Started) -> pipe.Started:
        """It is told: nobody looks before it ended."""
        self._begun = started.number
        self.look_at = _NEVER
        return started

    def _await(self, now: float) -> None:
        is_seen = self._begun > self._over or self._over >= self._last
        self._after_s = LOOK_AFTER_S
        self.look_at = _NEVER if is_seen else now + LOOK_AFTER_S

    def _noted(self) -> pipe.Started | None:
        return None if self._memory is None else entry_note.read(self._memory)
