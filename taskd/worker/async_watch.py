"""Looks after the loop of one async child, for what the child cannot help.

That is a task that does not let itself be cancelled, and a loop that is blocked. Both end by the ladder, as
in other children. A loop is blocked when it makes no step: one that is merely busy is not, nor is a task to
blame for not ending while another one keeps its cancellation from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import structlog

from taskd.telemetry import metrics
from taskd.worker import entry_pipe as pipe
from taskd.worker.async_blame import Activation, ChildEnd, Tally
from taskd.worker.child import Child
from taskd.worker.ladder import Graces, Ladder, Step

log = structlog.get_logger("taskd.worker")

MAX_NAMED = 20


class AsyncChild(Child, Protocol):
    def step(self) -> pipe.Step:
        """What its loop is at, also when it is dead."""
        ...


class LoopWatch:
    """Have it `look` again and again. It decides and never waits.

    `inside`: what is in the child, by number. `stall_s`: how long the loop may be at one step.
    `before_end`: called before anything is ended; it takes back what the child has not begun.
    """

    def __init__(
        self,
        child: AsyncChild,
        inside: Mapping[int, Activation],
        tally: Tally,
        stall_s: float,
        graces: Graces,
        *,
        before_end: Callable[[], None],
    ) -> None:
        self.still_s = 0.0  # how long the loop has been at its newest step
        self.ladder: Ladder | None = None
        self._child = child
        self._inside = inside
        self._tally = tally
        self._stall_s = stall_s
        self._graces = graces
        self._before_end = before_end
        self._steps = 0  # of the loop, when last looked at
        self._stalled_by: int | None = None  # whose step it is in which the loop is blocked; 0: nobody knows
        self._interrupted: set[int] = set()  # the activations that were
        self._stuck: set[int] = set()  # those that do not end

    @property
    def gave_up(self) -> bool:
        """Whether the child is being ended."""
        return self.ladder is not None and self.ladder.step is not Step.INTERRUPTED

    def look(self, now: float, since_s: float) -> None:
        """`since_s`: since the last look."""
        steps = self._child.step().steps
        self.still_s = self.still_s + since_s if steps == self._steps else 0.0
        self._steps = steps
        if self.ladder is not None and not self._goes_on(self.ladder):
            self.ladder.climb(now)
        elif self._inside and self.still_s >= self._stall_s:
            self._end_stall(now)
        elif not self.still_s:
            self._look_for_stuck(now)

    def _goes_on(self, ladder: Ladder) -> bool:
        """Whether the interruption was enough."""
        if self._stalled_by is None or self.still_s or ladder.step is not Step.INTERRUPTED:
            return False
        self.ladder = self._stalled_by = None
        return True

    def _end_stall(self, now: float) -> None:
        """Interrupt the task the loop is at; if that does not help, end the child."""
        self._tally.stalls += 1
        metrics.worker_loop_stalls.inc()
        self._stalled_by = number = self._child.step().number
        self._interrupted.add(number)
        self._tell_who_is_there("the loop of async tasks is blocked", {number}, still_s=self.still_s)
        self._before_end()
        self.ladder = Ladder(self._child, number, self._graces, now, asked=False)

    def _look_for_stuck(self, now: float) -> None:
        """Those that do not end though the loop goes on, so that their scopes were cancelled for sure."""
        for number, one in self._inside.items():
            if now >= one.end:
                if one.asked_at is None:
                    one.asked_at = now
                elif now >= one.asked_at + self._graces.exception_s:
                    self._stuck.add(number)
        if self._stuck:
            self._end_stuck(now)

    def _end_stuck(self, now: float) -> None:
        """They were cancelled in time, by the child itself or by an order, and shield themselves."""
        self._tell_who_is_there("async tasks do not let themselves be cancelled", self._stuck)
        self._before_end()
        asked_at = now - self._graces.exception_s
        self.ladder = Ladder(self._child, min(self._stuck), self._graces, asked_at, asked=True)
        self.ladder.climb(now)

    def _tell_who_is_there(self, what: str, culprits: Collection[int], **more: object) -> None:
        ids = {number: one.job.lease.id for number, one in self._inside.items() if one.since is not None}
        guilty = [id_ for number, id_ in ids.items() if number in culprits]
        others = [id_ for number, id_ in ids.items() if number not in culprits]
        log.error(
            what,
            pid=self._child.pid,
            guilty=guilty[:MAX_NAMED],
            others=others[:MAX_NAMED],
            others_count=len(others),
            **more,
        )

    # ---- what became of it

    def corrected(self, number: int, one: Activation, verdict: pipe.Verdict) -> pipe.Verdict:
        """The verdict on one that ended, where the child cannot know why it was to cancel it."""
        if verdict.reason != "cancelled" or one.job.stopped or number not in self._interrupted:
            return verdict
        text = f"it blocked the loop that it shares with other tasks for {self._stall_s:g} s\n{verdict.error}"
        return verdict._replace(reason="blocked", error=pipe.cut(text))

    def how_it_ended(self, why: str, *, is_garbled: bool) -> ChildEnd:
        """`is_garbled`: somebody wrote into the pipe of reports, and it is not known who."""
        number = self._child.step().number if self.ladder is None else self._stalled_by
        is_known = number in self._inside and not is_garbled
        return ChildEnd(
            why,
            culprit=number if number and is_known else 0,
            was_blocked=self._stalled_by is not None,
            was_ordered=self.ladder is not None,
            is_explained=is_known or bool(self._stuck),
        )
