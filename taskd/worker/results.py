"""What this worker owes to each store: results until they were taken, and every lease it still has.

One account per store id, whatever address the store answers at. Links send from it, slots write to it.
Nothing here waits or sends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from taskd.wire.frames import (
    HandBack,
    Heartbeat,
    LeaseRef,
    Result,
    Results,
    Started,
    TaskProgress,
    WorkerFrame,
)

MAX_RESULTS_PER_FRAME = 1_024
MAX_RESULT_BYTES_PER_FRAME = 1_000_000
REMEMBERED_HAND_BACKS = 1_024
MAX_UNTAKEN = 10_000  # a store that takes no results gives no work
DEFAULT_DEADLINE_MS = 10_000  # of an activation that names none (contract: namespaces' default)


@dataclass(eq=False, slots=True)
class Job:
    """One assignment on its way through this worker. Times are Trio's clock, in seconds."""

    account: Account
    lease: LeaseRef
    activation: bytes
    deadline_s: float
    expires_at: float | None
    waiting_since: float
    stopped: bool = False  # it must end, and is not to be started; nor reported, unless it says
    broken_off: str = ""  # ... why it was stopped through no fault of its own: then it is to run again
    is_async: bool = False


@dataclass(eq=False, slots=True)
class Account:
    """Everything between this worker and one store.

    `lease_until`: when the leases end unless the store hears from this worker; while connected,
    every frame sent moves it. `max_deadline_s`: how far after its start the heartbeats of a task move its
    deadline; None: as far as they like. `address`: where a link talks with the store, or is about to; or "".
    """

    moves_deadlines: ClassVar[bool] = True  # whether the store hears of a task's own signs of life

    store_id: str
    address: str = ""
    lease_until: float = float("inf")
    max_deadline_s: float | None = None
    jobs: dict[LeaseRef, Job] = field(default_factory=dict)
    untaken: dict[LeaseRef, Result] = field(default_factory=dict)
    running: set[LeaseRef] = field(default_factory=set)
    _started: dict[LeaseRef, None] = field(default_factory=dict)
    _progress: dict[LeaseRef, TaskProgress] = field(default_factory=dict)  # the newest of each running task
    _progress_unsent: dict[LeaseRef, None] = field(default_factory=dict)
    _results: deque[Result] = field(default_factory=deque)
    _crashed: bool = False  # a result whose start the broker must have first
    _kept_back: frozenset[LeaseRef] = frozenset()  # starts that waited once
    _back: dict[LeaseRef, None] = field(default_factory=dict)
    _back_sent: deque[LeaseRef] = field(default_factory=lambda: deque(maxlen=REMEMBERED_HAND_BACKS))

    # ---- what slots and the backlog tell

    def accept(self, job: Job) -> bool:
        """False for a lease that is here already."""
        if job.lease in self.jobs or job.lease in self.untaken:
            return False
        self.jobs[job.lease] = job
        return True

    def start(self, job: Job) -> None:
        self.running.add(job.lease)
        self._started[job.lease] = None

    def heartbeat(self, job: Job, progress: float | None, message: str) -> None:
        """A task is alive, and 0 to 1 of its work is done. What it does not say is as it said before."""
        lease = job.lease
        if lease not in self.running:
            return
        before = self._progress.get(lease)
        permille = None if progress is None else round(progress * 1000)
        if before is not None:
            permille = before.permille if permille is None else permille
            message = message or before.message
        self._progress[lease] = TaskProgress(*lease, permille, message)
        self._progress_unsent[lease] = None

    def finish(self, job: Job, result: Result) -> None:
        """Keep the result until the store has it. A start nobody was told of yet is implied by it."""
        self._end(job.lease)
        self.untaken[job.lease] = result
        self._results.append(result)

    def crash(self, job: Job, result: Result) -> None:
        """As `finish`, but the start is told too: the broker judges crashes by the starts it counted."""
        told = job.lease not in self._started and job.lease in self.running
        self.finish(job, result)
        self._crashed = True
        if not told:
            self._started[job.lease] = None

    def forget(self, job: Job) -> None:
        """It was stopped: the store knows, and expects to hear nothing."""
        self._end(job.lease)

    def _end(self, lease: LeaseRef) -> None:
        self.jobs.pop(lease, None)
        self.running.discard(lease)
        self._started.pop(lease, None)
        if self._progress:
            self._progress.pop(lease, None)
            self._progress_unsent.pop(lease, None)

    def hand_back(self, job: Job) -> None:
        """Not started here, and not going to be."""
        self.jobs.pop(job.lease, None)
        self._back[job.lease] = None

    # ---- what links do

    @property
    def is_full(self) -> bool:
        """The store takes no results, so nothing more is to be run for it."""
        return len(self.untaken) >= MAX_UNTAKEN

    @property
    def holding(self) -> tuple[LeaseRef, ...]:
        return (*self.jobs, *self.untaken, *self._back)

    @property
    def has_news(self) -> bool:
        return bool(self._results or self._started or self._back or self._progress_unsent)

    @property
    def settled(self) -> bool:
        return not (self.untaken or self.has_news)

    def taken(self, leases: Iterable[LeaseRef]) -> None:
        for lease in leases:
            self.untaken.pop(lease, None)

    def connection_lost(self) -> None:
        """What was sent may not have arrived: be ready to tell all of it again."""
        for lease in self._back_sent:
            self._back.setdefault(lease, None)
        self._back_sent.clear()
        for lease in self.running:
            self._started.setdefault(lease, None)
        self._progress_unsent = dict.fromkeys(self._progress)
        self._results = deque(self.untaken.values())

    @property
    def unsent_results(self) -> int:
        return len(self._results)

    @property
    def unsent_starts(self) -> int:
        return len(self._started)

    @property
    def urgent(self) -> bool:
        """Something is to be told that does not wait for other news."""
        return bool(self._crashed or self._back or self._progress_unsent)

    def news(self, *, starts: bool = True, results: bool = True) -> list[WorkerFrame]:
        """What there is to tell, as frames in the order they must be sent; it counts as sent.

        `starts` False: of those only the ones that waited once already. `results` False: none.
        """
        frames: list[WorkerFrame] = []
        if self._started and (told := self._starts(everything=starts or self._crashed)):
            frames.append(Started(told))
        results |= self._crashed
        if self._progress_unsent:
            frames.append(Heartbeat(tuple(self._progress[lease] for lease in self._progress_unsent)))
            self._progress_unsent.clear()
        while self._results and results:
            frames.append(Results(self._batch()))
        self._crashed &= not results
        if self._back:
            frames.append(HandBack(tuple(self._back)))
            self._back_sent.extend(self._back)
            self._back.clear()
        return frames

    def _starts(self, *, everything: bool) -> tuple[LeaseRef, ...]:
        told = tuple(lease for lease in self._started if everything or lease in self._kept_back)
        for lease in told:
            del self._started[lease]
        self._kept_back = frozenset(self._started)
        return told

    def _batch(self) -> tuple[Result, ...]:
        batch: list[Result] = []
        size = 0
        while self._results and len(batch) < MAX_RESULTS_PER_FRAME and size < MAX_RESULT_BYTES_PER_FRAME:
            result = self._results.popleft()
            size += 100 + len(result.error)
            batch.append(result)
        return tuple(batch)
