"""When news for a broker goes out: at once while it is idle, and together with more of it while it is not.

Each frame of results costs the broker a write of its own, however few it holds. So results wait for the
answer to those before them, and meanwhile others come along; that wait is short, and none when nothing is
unanswered. While they come in numbers and more are to come, they gather for as long also when the answer is
quicker. Of a task that starts and ends meanwhile only the result is told.
"""

from __future__ import annotations

GATHER_S = 0.02  # longest wait
ENOUGH = 1_024  # results that wait no longer
MANY = 16  # results in one frame: tasks are so quick that most starts need not be told


class Gathering:
    """Of one stream. Times are Trio's clock."""

    def __init__(self) -> None:
        self._unanswered = 0  # frames of results
        self._until = float("-inf")
        self._many = False

    def sent(self, results_count: int, now: float) -> None:
        """A frame of results goes out."""
        self._unanswered += 1
        self._until = now + GATHER_S
        self._many = results_count >= MANY

    def answered(self) -> None:
        self._unanswered -= 1

    def until(self, results_count: int, now: float, *, more: bool = False) -> float:
        """When to send so many results; not after `now`: at once. `more`: this worker has further work."""
        waits = self._unanswered > 0 or (more and self._many)
        return self._until if waits and results_count < ENOUGH else now

    def starts_until(self, now: float) -> float:
        """When to tell which tasks started."""
        return self._until if self._many and self._unanswered > 0 else now
