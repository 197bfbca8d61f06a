"""Whose fault it is when an async child ends with tasks in it.

It is mostly known: that of the activation whose code the loop was at. What else ran there is reported as
interrupted: handed out again, and the attempt does not count. But only so often, as what a thread does looks
like the fault of another task, or of none. When nobody is to blame, all count as crashed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from taskd.wire.frames import ResultStatus
from taskd.worker.entry_pipe import Verdict
from taskd.worker.results import Job

SPARED_TIMES = 4  # an activation that is there more often when a child ends counts as crashed
MAX_SPARED = 10_000


@dataclass(eq=False, slots=True)
class Activation:
    """One of them. `since`: when it started, None before; `end`: when it must have ended."""

    job: Job
    since: float | None = None
    end: float = float("inf")
    on_timeout: Verdict | None = None
    quiet: bool = False
    asked_at: float | None = None  # when it was cancelled at the latest
    cancel_ordered: bool = False


@dataclass(slots=True)
class Tally:
    """What became of activations, and who was spared when a child had to be killed; over all children."""

    ended: int = 0
    crashes: int = 0
    timeouts: int = 0
    stalls: int = 0
    _spared: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def spare(self, job: Job) -> bool:
        """Whether this one is to be spared: the first few times it is."""
        times = self._spared.pop(job.lease.id, 0) + 1
        self._spared[job.lease.id] = times
        if len(self._spared) > MAX_SPARED:
            self._spared.popitem(last=False)
        return times <= SPARED_TIMES


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How a child ended. `culprit`: the number of the activation that was the cause; 0: it is not known.

    `was_blocked`: its loop was, and `was_ordered`: the worker ended it. `is_explained`: the cause is known,
    a culprit or tasks that did not let themselves be cancelled.
    """

    why: str
    culprit: int
    was_blocked: bool
    was_ordered: bool
    is_explained: bool


def judge(number: int, one: Activation, end: ChildEnd, tally: Tally, now: float) -> Verdict:
    """The verdict on an activation that ran in a child when it ended."""
    if end.was_ordered and now >= one.end and one.on_timeout is not None:
        text = f"ended with its child at its processing deadline of {one.job.deadline_s:g} s: {end.why}"
        return one.on_timeout._replace(reason="timeout", error=text)
    if number == end.culprit and end.was_blocked:
        text = f"it blocked the loop that it shares with other tasks; is everything it calls async? {end.why}"
        return Verdict(ResultStatus.CRASHED, "blocked", text)
    if number == end.culprit:
        return Verdict(ResultStatus.CRASHED, "crashed", f"{end.why}, while the code of this task ran")
    if end.is_explained and tally.spare(one.job):
        return Verdict(ResultStatus.INTERRUPTED, "interrupted", f"by another task in its child: {end.why}")
    return Verdict(ResultStatus.CRASHED, "crashed", f"{end.why}; any task in it may be the cause")
