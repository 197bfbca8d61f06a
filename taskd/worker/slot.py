"""One slot of a pool: a child process and its successors, one task at a time.

The slot feeds its child from the backlog, a little ahead when tasks are quick; it holds the deadline
of the running task against the child, and turns whatever ends a run - a report, a kill, a crash - into
one result.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import structlog
import trio

from taskd.errors import StartupError
from taskd.telemetry import metrics
from taskd.wire.frames import Result, ResultStatus
from taskd.worker import entry_pipe as pipe
from taskd.worker.backlog import Backlog
from taskd.worker.child import Child, ChildGone, Spawner
from taskd.worker.pace import Pace
from taskd.worker.results import Job

log = structlog.get_logger("taskd.worker")

STALLED_AFTER_S = 0.1  # a task that runs this long gets nothing queued behind it
BEGIN_WITHIN_S = 30.0  # between two tasks a child only decodes; one that takes longer hangs
RETIRE_WITHIN_S = 10.0  # for a child that was dismissed with nothing left to do
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
        on_change: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self.number = number
        self.health: Health = "starting"
        self.ended_count = 0
        self.crashes_count = 0
        self.timeouts_count = 0
        self.failed_starts_count = 0
        self._spawner = spawner
        self._backlog = backlog
        self._pace = pace
        self._slots = slots
        self._max_tasks_per_child = max_tasks_per_child
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
        self._on_timeout: pipe.Verdict | None = None
        self._quiet = False
        self._timed_out: int | None = None  # the task that was killed for its deadline
        self._stuck = False
        self._retiring = False

    # ---- what the pool asks

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
            remaining_s += job.deadline_s - (now - self._since if number == self._running else 0.0)
        return max(remaining_s, 0.0)

    def wake(self) -> None:
        """There may be work."""
        self._wake.set()

    def recall(self) -> None:
        """Give back to the backlog what the child has not begun."""
        if self._child is not None:
            back = self._take_back(self._child)
            if back:
                self._backlog.put_back(back)

    def end_stopped(self) -> None:
        """End what was stopped by an operator: a running task with its child, others before they begin."""
        if self._child is None:
            return
        if any(job.stopped for job in self._inside.values()):
            self.recall()  # also before a kill: what is queued behind must not begin in a child that dies
        if self._running is not None and self._inside[self._running].stopped:
            self._child.kill()

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

    def _announce_ready(self, child: Child) -> None:
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
        ended_before = self.ended_count
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed, child)
                why = await self._follow(child)
                nursery.cancel_scope.cancel()
            self._settle(child, why)
        finally:
            if self._inside:
                child.kill()  # cancelled while a task runs; its lease will end
            self._child = None
        return self._retiring or self.ended_count > ended_before

    # ---- feeding

    async def _feed(self, child: Child) -> None:
        while self._sent < self._max_tasks_per_child:
            jobs = self._next_jobs()
            if not jobs:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            now = trio.current_time()
            if not self._inside:
                self._since = now
            for job in jobs:
                self._sent += 1
                self._inside[self._sent] = job
            self._due.deadline = self._check_at()
            await child.send(
                [(job.activation, None if job.expires_at is None else job.expires_at - now) for job in jobs]
            )
        while self._inside:
            self._wake = trio.Event()
            await self._wake.wait()
        self._retiring, self._since = True, trio.current_time()
        self._due.deadline = self._check_at()
        child.dismiss()

    def _next_jobs(self) -> list[Job]:
        if self._stuck:
            return []
        room = 1 + self._pace.ahead() - len(self._inside)
        room = min(room, self._max_tasks_per_child - self._sent)
        return self._backlog.take(room, self._slots, trio.current_time()) if room > 0 else []

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
                    reports = await child.receive()
                except ChildGone as error:
                    return str(error)
                except pipe.ProtocolViolation as error:
                    return f"child {child.pid} broke the protocol of its pipe: {error}"
            if due.cancelled_caught:
                self._overdue(child)
                continue
            for report in reports:
                if not self._handle(report):
                    return f"child {child.pid} reported {report!r:.100}, which it was not asked for"
            self._after_reports()

    def _check_at(self) -> float:
        """When to look after the child even though it says nothing."""
        if self._timed_out is not None:
            return float("inf")
        if self._running is not None:
            end = self._since + self._inside[self._running].deadline_s
            return end if self._stuck else min(end, self._since + STALLED_AFTER_S)
        if self._inside:
            return self._since + BEGIN_WITHIN_S
        return self._since + RETIRE_WITHIN_S if self._retiring else float("inf")

    def _overdue(self, child: Child) -> None:
        now = trio.current_time()
        if self._running is None:
            # It hangs between two tasks, or did not leave. What follows is the same as after a crash.
            self._since = float("inf")
            child.kill()
        elif now >= self._since + self._inside[self._running].deadline_s:
            self._timed_out = self._running
            child.kill()
        else:
            self._stuck = True
            self.recall()

    def _handle(self, report: pipe.Report) -> bool:
        match report:
            case pipe.Started(number, on_timeout, quiet) if number in self._inside and self._running is None:
                self._running, self._on_timeout, self._quiet = number, on_timeout, quiet
                self._since, self._stuck = trio.current_time(), False
                job = self._inside[number]
                job.account.start(job)
                if job.stopped:
                    self.end_stopped()
            case pipe.Done(number, verdict, duration_us, quiet) if number in self._inside:
                self._running, self._since, self._stuck = None, trio.current_time(), False
                self._pace.observe(duration_us / 1e6)
                metrics.worker_task_seconds.observe(duration_us / 1e6)
                self._finish(self._inside.pop(number), verdict, quiet=quiet)
            case pipe.Expired(number) if number in self._inside and self._running is None:
                self._since, self._stuck = trio.current_time(), False
                job = self._inside.pop(number)
                job.account.hand_back(job)
            case _:
                return False
        return True

    def _after_reports(self) -> None:
        self._on_change()
        if len(self._inside) <= self._pace.ahead() // 2:
            self.wake()

    # ---- endings

    def _settle(self, child: Child, why: str) -> None:
        """The child ended: what it had not begun goes back, what it was at gets its result."""
        if self._inside or not self._retiring:
            child.kill()  # it may live on, when it broke the protocol
            log.warning("child ended", slot=self.number, why=why, timeout=self._timed_out is not None)
        back = self._take_back(child)
        for number, job in self._inside.items():
            if job.stopped:
                self._forget(job)
            elif number == self._timed_out and self._on_timeout is not None:
                self.timeouts_count += 1
                self._pace.observe(job.deadline_s)
                text = f"killed at its processing deadline of {job.deadline_s:g} s"
                self._finish(job, self._on_timeout._replace(reason="timeout", error=text), quiet=self._quiet)
            else:
                self.crashes_count += 1
                self._finish(job, pipe.Verdict(ResultStatus.CRASHED, "crashed", why))
        self._inside.clear()
        self._running = None
        if back:
            self._backlog.put_back(back)
        self._on_change()

    def _forget(self, job: Job) -> None:
        job.account.forget(job)
        self.ended_count += 1
        metrics.worker_tasks.labels("stopped").inc()

    def _finish(self, job: Job, verdict: pipe.Verdict, *, quiet: bool = False) -> None:
        if job.stopped:
            self._forget(job)
            return
        status = ResultStatus(verdict.status)
        result = Result(
            *job.lease,
            status,
            verdict.reason,
            verdict.error,
            verdict.max_attempts,
            verdict.delay_on_retry_s,
        )
        if status is ResultStatus.CRASHED:
            job.account.crash(job, result)
        else:
            job.account.finish(job, result)
        self.ended_count += 1
        metrics.worker_tasks.labels(status.name.lower()).inc()
        if status is not ResultStatus.COMPLETE and not quiet:
            log.warning(
                "task did not complete",
                id=job.lease.id,
                status=status.name.lower(),
                reason=verdict.reason,
                error=verdict.error,
            )
