"""How a task that must end is ended: asked first, then told, then killed, each after its grace.

It decides and counts the time, and never waits: whoever follows the child looks at `next_at`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from taskd.worker.entry_pipe import OrderKind


class Step(IntEnum):
    INTERRUPTED = 1  # by an exception in the task
    TERMINATED = 2  # the child was ordered to leave, and its process group got SIGTERM
    KILLED = 3  # SIGKILL, to whatever there is of it


SIGNALS = {Step.TERMINATED: "SIGTERM", Step.KILLED: "SIGKILL"}


@dataclass(frozen=True, slots=True)
class Graces:
    """Seconds: for the task to end by the exception, then for its processes to end by SIGTERM."""

    exception_s: float = 1.0
    terminate_s: float = 1.0

    @property
    def total_s(self) -> float:
        return self.exception_s + self.terminate_s


class Climbed(Protocol):
    """The part of a child that a ladder uses."""

    def order(self, kind: OrderKind, number: int) -> None: ...
    def terminate(self, number: int) -> None: ...
    def kill(self) -> None: ...


class Ladder:
    """The end of task `number` in `child`, which has nothing else left to begin.

    So whatever a step hits is that task. `asked`: the exception is on its way already, by the child's own
    timer, since `now`; else it is ordered here and now.
    """

    def __init__(self, child: Climbed, number: int, graces: Graces, now: float, *, asked: bool) -> None:
        self.number = number
        self.step = Step.INTERRUPTED
        self.next_at = now + graces.exception_s
        self._child = child
        self._graces = graces
        self._asked = asked
        if not asked:
            child.order(OrderKind.CANCEL, number)

    @property
    def signal_name(self) -> str | None:
        """Of the hardest signal that was sent."""
        return SIGNALS.get(self.step)

    @property
    def may_be_left(self) -> bool:
        """It was the deadline, and nothing was done about it from here: a heartbeat may have moved it."""
        return self._asked and self.step is Step.INTERRUPTED

    def climb(self, now: float) -> None:
        """Take the next step if its time has come."""
        if now < self.next_at:
            return
        if self.step is Step.INTERRUPTED:
            self.step, self.next_at = Step.TERMINATED, now + self._graces.terminate_s
            self._child.terminate(self.number)
        else:
            self.step, self.next_at = Step.KILLED, float("inf")
            self._child.kill()
