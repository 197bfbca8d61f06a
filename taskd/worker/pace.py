"""How far ahead to take work: measured, so that slow tasks are not hoarded and quick ones come in batches."""

from __future__ import annotations

from collections.abc import Iterable

PREFETCH_S = 0.05  # work to keep waiting in the worker, per slot: covers the way to the broker and back
AHEAD_S = 0.02  # work to keep waiting inside a child: covers the way between two processes
MAX_AHEAD = 512
LINGER_S = 0.005  # longest time for reports of quick tasks to gather in the pipe of their child
AROUND_S = 1.5e-5  # what a child needs around each task
WEIGHT = 0.2  # of the newest duration in the average; forty quick tasks forget a slow one
SHORTEST_S = 1e-6
FEW = 8
UNREAD_S = 0.02  # so young a task may have ended, and its report lies unread in the pipe


class Pace:
    """The average run time of recent tasks, the newest counting most."""

    def __init__(self) -> None:
        self.average_s: float | None = None

    def observe(self, duration_s: float) -> None:
        if self.average_s is None:
            self.average_s = duration_s
        else:
            self.average_s += WEIGHT * (duration_s - self.average_s)

    def prefetch(self, running_s: Iterable[float], max_prefetch: int) -> int:
        """How many activations may wait in the worker.

        `running_s`: for every slot, how long its task has been running, 0 when it is free. A
        task that already takes longer than the average says more than the average does, once it is certain
        that it does: each credit that shrinks is a recall to the broker, and the next one has to grow again.
        """
        if self.average_s is None:
            return 0
        average_s = max(self.average_s, SHORTEST_S)
        ages_s = (age_s if age_s >= UNREAD_S else 0.0 for age_s in running_s)
        return min(int(sum(PREFETCH_S / max(average_s, age_s) for age_s in ages_s)), max_prefetch)

    def ahead(self) -> int:
        """How many activations may wait inside a child, behind the one it runs."""
        if self.average_s is None:
            return 0
        return min(int(AHEAD_S / max(self.average_s, SHORTEST_S)), MAX_AHEAD)

    def linger_s(self, inside_count: int) -> float:
        """How long to leave a child alone that has so many tasks: it has enough for twice that time.

        Otherwise each task would wake the worker up, for no more than a report or two.
        """
        if self.average_s is None or inside_count < FEW:
            return 0.0
        return min((self.average_s + AROUND_S) * inside_count / 2, LINGER_S)
