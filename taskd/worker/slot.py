"""One slot of a pool: a child process and its successors, one task at a time.

The slot feeds its child from the backlog, a little ahead when tasks are quick; it sees to it that a task
ends which must, and turns whatever ends a run - a report, a kill, a crash - into one result.

Before a task is ended from outside, all work that the child has not begun is taken back. The child takes
its next piece only after a task ended, so if another one is missing then, the task is over and its report
is on the way; if none is, whatever hits the child hits that task, or nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import structlog
import trio

from taskd.errors import StartupError
from taskd.telemetry import metrics
from taskd.wire.frames import ResultStatus
from taskd.worker import endings
from taskd.worker import entry_pipe as pipe
from taskd.worker.backlog import Backlog
from taskd.worker.child import Child, ChildGone, Piece, Spawner
from taskd.worker.ladder import Graces, Ladder, Step
from taskd.worker.output import nobody
from taskd.worker.pace import Pace
from taskd.worker.results import Job

log = structlog.get_logger("taskd.worker")

STALLED_AFTER_S = 0.1  # a task that runs this long gets nothing queued behind it
LOOK_EVERY_S = 1.0  # at the memory of a child whose task runs long
BEGIN_WITHIN_S = 30.0  # between two tasks a child only decodes; one that takes longer hangs
LAST_WORD_S = 1.0  # ... if it says nothing within this time either
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.5, 30.0

Health = Literal["starting", "warm", "failing"]


class Slot:
    """Run it with `run`; everything else may be called from other tasks at any time.

    `on_change`: called when a task ended or the slot's health changed.
    """

    def __init__(
        self,
        number: int,
        spawner: Spawner,
        backlog: Backlog,
        pace: Pace,
        *,
        slots: int,
        max_tasks_per_child: int,
        max_rss_bytes: int | None,
        graces: Graces,
        on_change: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self.number = number
        self.health: Health = "starting"
        self.tasks: tuple[pipe.KnownTask, ...] = ()  # what its newest child knows
        self.ended_count = 0
        self.crashes_count = 0
        self.timeouts_count = 0
        self.failed_starts_count = 0
        self._spawner = spawner
        self._backlog = backlog
        self._pace = pace
        self._slots = slots
        self._max_tasks_per_child = max_tasks_per_child
        self._max_rss_bytes = max_rss_bytes
        self._graces = graces
        self._on_change = on_change
        self._rng = rng
        self._wake = trio.Event()
        self._reset()

    def _reset(self) -> None:
        self._child: Child | None = None
        self._due = trio.CancelScope()  # its deadline: when to look after the child though it is silent
        self._sent = 0  # the number of the newest piece of work
        self._inside: dict[int, Job] = {}  # in the child, by number
        self._running: int | None = None
        self._since = 0.0  # of the running task; else of the last sign of life
        self._doubted = -1.0  # a value of `_since`: the child is given a last word
        self._must_end_at = 0.0  # the running task's deadline
        self._on_timeout: pipe.Verdict | None = None
        self._quiet = False
        self._ladder: Ladder | None = None  # while the running task is being ended
        self._stuck = False
        self._is_hungry = False  # the feeding task waits for work
        self._recalls = False  # it is being taken back
        self._worn = False  # the child gets nothing more, and leaves when it has done what it has
        self._most_bytes: int | None = None  # of memory, after a task
        self._leftovers = False
        self._retired = False

    # ---- what the pool asks

    @property
    def load(self) -> int:
        """How many activations are in here."""
        return len(self._inside)

    @property
    def jobs(self) -> list[Job]:
        return list(self._inside.values())

    def running_s(self, now: float) -> float:
        """How long the task in here has been running; 0 when there is none."""
        return now - self._since if self._running is not None else 0.0

    def remaining_s(self, now: float) -> float:
        """When the work in here must have ended, counted from now."""
        remaining_s = 0.0
        for number, job in self._inside.items():
            remaining_s += max(self._must_end_at - now, 0.0) if number == self._running else job.deadline_s
        return remaining_s

    def overdue_s(self, now: float) -> float:
        """For how long the running task should be over, all graces included; 0 or less: not yet."""
        return 0.0 if self._running is None else now - self._must_end_at - self._graces.total_s

    def wake(self, sharing: int | None = None) -> None:
        """There may be work, for so many slots; None: for all. Its share goes to the child at once."""
        if self._child is not None and self._is_hungry and not self._recalls:
            if not self._hand_over(self._child, sharing or self._slots) and not self._worn:
                return
            self._is_hungry = False
        self._wake.set()

    def recall(self) -> None:
        """Give back to the backlog what the child has not begun."""
        if self._child is not None:
            back = self._take_back(self._child)
            if back:
                self._recalls = True  # whoever recalls has not yet done what it does it for
                self._backlog.put_back(back)
                self._recalls = False

    def end_stopped(self) -> None:
        """End what was stopped: the running task, and others before they begin."""
        child, number = self._child, self._running
        if child is None or not any(job.stopped for job in self._inside.values()):
            return
        self.recall()
        if number is not None and self._inside[number].stopped and self._ladder is None:
            self._end_running(child, number, asked=False)
            self._due.deadline = self._check_at()

    # ---- one child after the other

    async def run(self) -> None:
        """Keep a child in this slot until cancelled; then end it, whatever it does."""
        failures = 0
        while True:
            try:
                async with self._spawner.open() as child:
                    self._announce_ready(child)
                    useful = await self._serve(child)
                failures = 0 if useful else failures + 1
            except StartupError as error:
                failures += 1
                self.failed_starts_count += 1
                log.error("child did not start", slot=self.number, error=str(error), failures=failures)
            if failures:
                self._set_health("failing")
                await trio.sleep(self._backoff_s(failures))

    def _backoff_s(self, failures: int) -> float:
        longest_s = min(BACKOFF_FIRST_S * 2 ** min(failures - 1, 10), BACKOFF_MOST_S)
        return self._rng.uniform(longest_s / 2, longest_s)

    def _whose(self, number: int) -> str | None:
        """Who printed, given the newest task that is known to have printed."""
        job = self._inside.get(max(number, self._running or 0))
        if job is None and self._running is None:
            job = next(iter(self._inside.values()), None)  # it began, and that is not read yet
        return None if job is None else job.lease.id

    def _announce_ready(self, child: Child) -> None:
        self.tasks = child.ready.tasks
        if self.health == "starting" and self.number == 0:
            log.info("child ready", pid=child.pid, tasks_count=len(child.ready.tasks))
            for where, why in child.ready.failures:
                log.error("tasks could not be imported", plugin=where, error=why)
        self._set_health("warm")

    def _set_health(self, health: Health) -> None:
        self.health = health
        self._on_change()

    async def _serve(self, child: Child) -> bool:
        """Work with this child until it ends. False: it ended by itself and before it did anything."""
        self._reset()
        self._child, self._since = child, trio.current_time()
        child.whose = self._whose
        self._mind_memory(child)
        ended_before = self.ended_count
        try:
            why: str | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed, child, nursery.cancel_scope)
                why = await self._follow(child)
                nursery.cancel_scope.cancel()
            if why is not None:
                self._settle(child, why)
        finally:
            if self._inside:
                child.kill()  # cancelled while a task runs; its lease will end
            child.whose = nobody  # it may print while it leaves, and then its successor is at work here
            self._child = None
        return self._retired or self.ended_count > ended_before

    def _mind_memory(self, child: Child) -> None:
        child.look()
        self._most_bytes = self._max_rss_bytes
        if self._most_bytes is not None and child.rss_bytes > self._most_bytes:
            # Replacing it would not help: the next one would be as large.
            self._most_bytes = None
            text = "a child without work has more memory than children may have; none is replaced for it"
            log.warning(text, slot=self.number, rss_bytes=child.rss_bytes, limit_bytes=self._max_rss_bytes)

    # ---- feeding

    async def _feed(self, child: Child, serving: trio.CancelScope) -> None:
        """Until the child is worn and has done what it has: that ends `serving`."""
        try:
            while not self._worn:
                if self._hand_over(child, self._slots):
                    await child.flush()
                    continue
                self._wake, self._is_hungry = trio.Event(), True
                await self._wake.wait()
                self._is_hungry = False
                await child.flush()
        finally:
            self._is_hungry = False
        while self._inside:
            self._wake = trio.Event()
            await self._wake.wait()
        self._retired = True
        child.dismiss(alone=self._leftovers)
        serving.cancel()

    def _hand_over(self, child: Child, sharing: int) -> bool:
        """Give the child its share of what waits. True: `_feed` has something to do.

        What it leaves to others and they do not take is there when it has done half of what it has.
        """
        room = self._room()
        now = trio.current_time()
        jobs = self._backlog.take(room, sharing, now) if room > 0 else []
        if not jobs:
            return False
        if not self._inside:
            self._since = now
        for job in jobs:
            self._sent += 1
            self._inside[self._sent] = job
        self._worn |= self._sent >= self._max_tasks_per_child
        self._due.deadline = self._check_at()
        is_written = child.give([piece(job, now) for job in jobs])
        return not is_written or self._worn

    def _room(self) -> int:
        if self._stuck or self._worn or self._ladder is not None:
            return 0
        room = 1 + self._pace.ahead() - len(self._inside)
        return min(room, self._max_tasks_per_child - self._sent)

    def _take_back(self, child: Child) -> list[Job]:
        """Remove from the child what it has not begun; oldest first."""
        count = child.take_back()
        numbers = range(self._sent - count + 1, self._sent + 1)
        return [self._inside.pop(number) for number in numbers if number in self._inside]

    # ---- following

    async def _follow(self, child: Child) -> str:
        """Handle what the child reports until it ended; how it ended is returned."""
        while True:
            self._due = trio.CancelScope(deadline=self._check_at())
            with self._due as due:
                try:
                    if self._ladder is None and (linger_s := self._pace.linger_s(len(self._inside))):
                        await trio.sleep(linger_s)
                    reports = await child.receive()
                except ChildGone as error:
                    return str(error)
                except pipe.ProtocolViolation as error:
                    return f"child {child.pid} broke the protocol of its pipe: {error}"
            if due.cancelled_caught:
                self._overdue(child)
                continue
            strange = self._handle_all(reports)
            if strange is not None:
                return f"child {child.pid} reported {strange!r:.100}, which it was not asked for"
            self._after_reports(child)

    def _check_at(self) -> float:
        """When to look after the child even though it says nothing."""
        if self._ladder is not None:
            return self._ladder.next_at
        if self._running is not None:
            stalled_at = self._since + STALLED_AFTER_S
            return min(self._must_end_at, trio.current_time() + LOOK_EVERY_S if self._stuck else stalled_at)
        if self._inside:
            return self._since + BEGIN_WITHIN_S
        return float("inf")

    def _overdue(self, child: Child) -> None:
        now = trio.current_time()
        if self._ladder is not None:
            self._ladder.climb(now)
        elif not self._inside:
            return  # what it was to begin was taken back
        elif self._running is None and self._since != self._doubted:
            # Perhaps it was this process that slept: what the child did meanwhile is to be read first.
            self._since = self._doubted = now + LAST_WORD_S - BEGIN_WITHIN_S
        elif self._running is None:
            # It hangs between two tasks. What follows is the same as after a crash.
            self._since = float("inf")
            child.kill()
        else:
            self._stuck = True
            self.recall()
            child.look()
            if now >= self._must_end_at:
                self._end_running(child, self._running, asked=True)

    def _end_running(self, child: Child, number: int, *, asked: bool) -> None:
        """See to it that this task ends; everything else was taken back."""
        now = trio.current_time()
        if len(self._inside) == 1:
            self._ladder = Ladder(child, number, self._graces, now, asked=asked)
        else:
            self._running, self._since = None, now  # it is over, and the child is about to say so

    def _handle_all(self, reports: Iterable[pipe.Report]) -> pipe.Report | None:
        """What came together, in its order. Stops at a report that it was not asked for, and returns it."""
        # Most tasks complete, by the hundred when they are quick: `_handle` once for all of these.
        completed: list[Job] = []
        durations_us: list[int] = []
        try:
            for report in reports:
                if isinstance(report, pipe.Done) and report.verdict is pipe.COMPLETE:
                    job = self._inside.get(report.number)
                    if job is not None and not job.stopped:
                        del self._inside[report.number]
                        self._running = self._ladder = None
                        completed.append(job)
                        durations_us.append(report.duration_us)
                        continue
                if not self._handle(report):
                    return report
        finally:
            if completed:
                self._completed(completed, durations_us)
        return None

    def _completed(self, jobs: Sequence[Job], durations_us: Sequence[int]) -> None:
        if self._running is None:
            self._since, self._stuck = trio.current_time(), False
        for duration_us in durations_us:
            self._pace.observe(duration_us / 1e6)
        metrics.worker_task_seconds.observe_all(durations_us)
        endings.end_completed(jobs)
        self.ended_count += len(jobs)

    def _handle(self, report: pipe.Report) -> bool:
        match report:
            case pipe.Started(number, on_timeout, quiet, ago_s) if (
                number in self._inside and self._running is None
            ):
                self._running, self._on_timeout, self._quiet = number, on_timeout, quiet
                self._since, self._stuck = trio.current_time() - ago_s, False
                job = self._inside[number]
                self._must_end_at = self._since + job.deadline_s
                job.account.start(job)
                if job.stopped:
                    self.end_stopped()
            case pipe.Done(number, verdict, duration_us, quiet) if number in self._inside:
                self._running, self._since, self._stuck = None, trio.current_time(), False
                self._ladder = None
                self._pace.observe(duration_us / 1e6)
                metrics.worker_task_seconds.observe_all((duration_us,))
                self.timeouts_count += verdict.reason == "timeout"
                job = self._inside.pop(number)
                self._finish(job, verdict, quiet=quiet)
                if (job.stopped or verdict.reason == "timeout") and self._child and self._child.has_started():
                    self._leftovers = True  # what the interrupted task started ends with the child
                    self._wear()
            case pipe.Heartbeat(number, progress, message):
                if number == self._running:  # else it is late
                    self._alive(self._inside[number], progress, message)
            case pipe.Expired(number) if number in self._inside and self._running is None:
                self._since, self._stuck = trio.current_time(), False
                job = self._inside.pop(number)
                job.account.hand_back(job)
            case _:
                return False
        return True

    def _wear(self) -> None:
        """Replace the child as soon as it is idle."""
        self._worn = True
        self.recall()
        self.wake()

    def _alive(self, job: Job, progress: float | None, message: str) -> None:
        if job.account.moves_deadlines:
            most_s = job.account.max_deadline_s
            latest = float("inf") if most_s is None else self._since + max(most_s, job.deadline_s)
            now = trio.current_time()
            self._must_end_at = min(now + job.deadline_s, latest)
            if self._ladder is not None and self._ladder.may_be_left and self._must_end_at > now:
                self._ladder = None  # said in time, and read too late
        job.account.heartbeat(job, progress, message)

    def _after_reports(self, child: Child) -> None:
        if self._most_bytes is not None and child.rss_bytes > self._most_bytes and not self._worn:
            log.info("child replaced for its memory", slot=self.number, rss_bytes=child.rss_bytes)
            self._wear()
        self._on_change()
        if len(self._inside) <= self._pace.ahead() // 2:
            self.wake()

    # ---- endings

    def _settle(self, child: Child, why: str) -> None:
        """The child ended: what it had not begun goes back, what it was at gets its result."""
        if self._ladder is None or self._ladder.step is not Step.TERMINATED:  # then the rest has a grace
            child.kill()  # it may live on, when it broke the protocol
        log.warning("child ended", slot=self.number, why=why)
        back = self._take_back(child)
        for number, job in self._inside.items():
            if job.stopped:
                self._finish(job, pipe.Verdict(ResultStatus.CRASHED))
            elif self._ladder is not None and number == self._ladder.number and self._on_timeout is not None:
                self.timeouts_count += 1
                self._pace.observe(job.deadline_s)
                text = f"{_how(self._ladder)} its processing deadline of {job.deadline_s:g} s: {why}"
                self._finish(job, self._on_timeout._replace(reason="timeout", error=text), quiet=self._quiet)
            else:
                self.crashes_count += 1
                self._finish(job, pipe.Verdict(ResultStatus.CRASHED, "crashed", why))
        self._inside.clear()
        self._running = self._ladder = None
        if back:
            self._backlog.put_back(back)
        self._on_change()

    def _finish(self, job: Job, verdict: pipe.Verdict, *, quiet: bool = False) -> None:
        endings.end(job, verdict, quiet=quiet)
        self.ended_count += 1


def piece(job: Job, now: float) -> Piece:
    """The job as its child gets it. Where nobody can be told that it lives, that moves no deadline."""
    most_s = job.account.max_deadline_s if job.account.moves_deadlines else job.deadline_s
    start_within_s = None if job.expires_at is None else job.expires_at - now
    return Piece(job.activation, start_within_s, job.lease.fence, job.deadline_s, most_s)


def _how(ladder: Ladder) -> str:
    return "ended at" if ladder.step is Step.INTERRUPTED else f"killed by {ladder.signal_name} at"
