"""All that runs in one async child: fed, followed, watched, and settled when the child ends.

The child ends its tasks at their deadlines by itself. For what it cannot help it is watched (async_watch.py),
and who is to blame for its end is decided in async_blame.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
import trio

from taskd.telemetry import metrics
from taskd.wire.frames import ResultStatus
from taskd.worker import endings
from taskd.worker import entry_pipe as pipe
from taskd.worker.async_blame import Activation, Tally, judge
from taskd.worker.async_watch import AsyncChild, LoopWatch
from taskd.worker.backlog import Backlog
from taskd.worker.child import ChildGone
from taskd.worker.ladder import Graces
from taskd.worker.results import Job
from taskd.worker.slot import piece

log = structlog.get_logger("taskd.worker")

TICK_S = 0.25
RETIRE_WITHIN_S = 10.0  # for a child that was dismissed with nothing left to do


@dataclass(frozen=True, slots=True)
class Limits:
    """`stall_s`: how long a loop may be at one step, in seconds."""

    max_tasks: int
    max_rss_bytes: int | None
    stall_s: float
    graces: Graces


class Crowd:
    """Run it with `serve`; everything else may be called from other tasks at any time.

    `room`: how many more activations may be taken from the backlog now. `over` is set as soon as the child
    gets no more: what runs in it goes on until it ends.
    """

    def __init__(
        self,
        child: AsyncChild,
        backlog: Backlog,
        limits: Limits,
        tally: Tally,
        *,
        room: Callable[[], int],
        on_change: Callable[[], None],
    ) -> None:
        self.pid = child.pid
        child.whose = self._whose
        self.over = trio.Event()
        self.is_useful = False
        self._child = child
        self._backlog = backlog
        self._limits = limits
        self._tally = tally
        self._room = room
        self._on_change = on_change
        self._wake = trio.Event()
        self._busy = trio.Event()
        self._inside: dict[int, Activation] = {}  # by number, in the order they were sent
        self._sent = 0
        self._is_garbled = False  # somebody wrote into its pipe
        self._watch = LoopWatch(
            child, self._inside, tally, limits.stall_s, limits.graces, before_end=self.recall
        )

    # ---- what the slot asks

    @property
    def jobs(self) -> list[Job]:
        return [one.job for one in self._inside.values()]

    @property
    def takes_work(self) -> bool:
        return not self.over.is_set() and self._watch.ladder is None

    @property
    def count(self) -> int:
        return len(self._inside)

    def remaining_s(self, now: float) -> float:
        """When the last of these must have ended, counted from now."""
        ends = (now + one.job.deadline_s if one.since is None else one.end for one in self._inside.values())
        return max(max(ends, default=now) - now, 0.0)

    def wake(self) -> None:
        self._wake.set()

    def recall(self) -> None:
        """Give back to the backlog what the child has not begun."""
        count = self._child.take_back()
        numbers = range(self._sent - count + 1, self._sent + 1)
        back = [self._inside.pop(number).job for number in numbers if number in self._inside]
        if back:
            self._backlog.put_back(back)

    def end_stopped(self) -> None:
        """Cancel what was stopped, and take it back where it has not begun."""
        stopped = {number: one for number, one in self._inside.items() if one.job.stopped}
        if not stopped:
            return
        self.recall()
        for number, one in stopped.items():
            if one.since is not None and not one.cancel_ordered:
                one.cancel_ordered = True
                one.end = min(one.end, trio.current_time())
                self._child.order(pipe.OrderKind.CANCEL, number)

    def _whose(self, number: int) -> str | None:
        """Who prints. What carries no number is anybody's."""
        one = self._inside.get(number)
        return None if one is None else one.job.lease.id

    # ---- its life

    async def serve(self) -> None:
        """Work with the child until it ends, and see to what it leaves. Cancelling ends the child."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed)
                nursery.start_soon(self._keep_watch)
                why = await self._follow()
                nursery.cancel_scope.cancel()
            self._settle(why)
        finally:
            self.over.set()
            if self._inside:
                self._child.kill()

    async def _feed(self) -> None:
        while not self.over.is_set():
            jobs = self._next_jobs()
            if not jobs:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            now = trio.current_time()
            if not self._inside:
                self._watch.still_s = 0.0
                self._busy.set()
            for job in jobs:
                self._sent += 1
                self._inside[self._sent] = Activation(job)
            if self._sent >= self._limits.max_tasks:
                self.is_useful = True  # though nothing of its share has ended yet
                self.over.set()
            self._child.give([piece(job, now) for job in jobs])
            await self._child.flush()
        self._busy.set()
        if self._watch.ladder is None:
            self._child.dismiss()  # it leaves when it has done what it has

    def _next_jobs(self) -> list[Job]:
        room = min(self._room(), self._limits.max_tasks - self._sent)
        if room <= 0 or not self.takes_work:
            return []
        return self._backlog.take_async(room, trio.current_time())

    async def _follow(self) -> str:
        """Handle what the child reports until it ended; how it ended is returned."""
        while True:
            try:
                reports = await self._child.receive()
            except ChildGone as error:
                return str(error)
            except pipe.ProtocolViolation as error:
                self._is_garbled = True
                return f"child {self._child.pid} broke the protocol of its pipe: {error}"
            for report in reports:
                if not self._handle(report):
                    self._is_garbled = True
                    return f"child {self._child.pid} reported {report!r:.100}, which it was not asked for"
            self._on_change()
            self._wake.set()

    def _handle(self, report: pipe.Report) -> bool:
        match report:
            case pipe.Started(number, on_timeout, quiet) if number in self._inside:
                self._started(number, on_timeout, quiet)
            case pipe.Done(number, verdict, duration_us, quiet) if number in self._inside:
                metrics.worker_task_seconds.observe_all((duration_us,))
                self._tally.timeouts += verdict.reason == "timeout"
                one = self._inside.pop(number)
                self._finish(one.job, self._watch.corrected(number, one, verdict), quiet=quiet)
            case pipe.Heartbeat(number, progress, message):
                if number in self._inside:  # else it is late
                    self._alive(self._inside[number], progress, message)
            case pipe.Expired(number) if number in self._inside:
                job = self._inside.pop(number).job
                job.account.hand_back(job)
            case _:
                return False
        return True

    def _started(self, number: int, on_timeout: pipe.Verdict, quiet: bool) -> None:
        one = self._inside[number]
        one.since, one.on_timeout, one.quiet = trio.current_time(), on_timeout, quiet
        one.end = one.since + one.job.deadline_s
        one.job.account.start(one.job)
        if one.job.stopped:
            self.end_stopped()

    def _alive(self, one: Activation, progress: float | None, message: str) -> None:
        account = one.job.account
        if account.moves_deadlines and one.since is not None and not one.cancel_ordered:
            one.end, one.asked_at = trio.current_time() + one.job.deadline_s, None
            if account.max_deadline_s is not None:
                one.end = min(one.end, one.since + max(account.max_deadline_s, one.job.deadline_s))
        account.heartbeat(one.job, progress, message)

    # ---- watching

    async def _keep_watch(self) -> None:
        while True:
            # What is being ended is watched to its end, though nothing may be left in here.
            while not (self._inside or self._watch.ladder or self.over.is_set()):
                self._busy = trio.Event()
                await self._busy.wait()
            before = trio.current_time()
            await trio.sleep(TICK_S)
            now = trio.current_time()
            if now - before > 4 * TICK_S:
                continue  # this process slept; what the child said meanwhile is not read yet
            self._look(now)

    def _look(self, now: float) -> None:
        took_work = self.takes_work
        self._watch.look(now, TICK_S)
        if self.takes_work and not took_work:
            self.wake()  # the loop goes on, and more may have come meanwhile
        if self._watch.gave_up:
            self._retire()  # nothing will come of this child: let another one begin
        elif self._inside:
            self._look_at_memory()
        elif self.over.is_set() and self._watch.still_s >= RETIRE_WITHIN_S:
            self._child.kill()

    def _look_at_memory(self) -> None:
        """Replace a child that grew too big. One that is so from its start works all the same."""
        self._child.look()
        most_bytes = self._limits.max_rss_bytes
        if most_bytes is None or self._child.rss_bytes <= most_bytes:
            return
        if self.is_useful and not self.over.is_set():
            log.info("async child replaced for its memory", pid=self.pid, rss_bytes=self._child.rss_bytes)
            self._retire()

    def _retire(self) -> None:
        self.over.set()
        self._wake.set()

    # ---- endings

    def _settle(self, why: str) -> None:
        """The child ended: what it had not begun goes back, the rest gets its result."""
        if self._inside or not self.over.is_set():
            self._child.kill()  # it may live on, when it broke the protocol
            log.warning("async child ended", why=why, running=len(self._inside))
        self.is_useful = self.is_useful or self.over.is_set()
        now = trio.current_time()
        end = self._watch.how_it_ended(why, is_garbled=self._is_garbled)
        left = dict(self._inside)
        self._inside.clear()
        back = [left.pop(number).job for number in self._not_begun(left)]
        for number, one in left.items():
            self._end(one, judge(number, one, end, self._tally, now))
        if back:
            self._backlog.put_back(back)
        self._on_change()

    def _not_begun(self, left: Mapping[int, Activation]) -> list[int]:
        """What the dead child did not begin, for sure: from a garbled pipe not every start was read."""
        if not self._is_garbled:
            return [number for number, one in left.items() if one.since is None]
        first = self._sent - self._child.take_back() + 1
        return [number for number in range(first, self._sent + 1) if number in left]

    def _end(self, one: Activation, verdict: pipe.Verdict) -> None:
        self._tally.timeouts += verdict.reason == "timeout"
        self._tally.crashes += verdict.status == ResultStatus.CRASHED and not one.job.stopped
        self._finish(one.job, verdict, quiet=one.quiet and verdict.reason == "timeout")

    def _finish(self, job: Job, verdict: pipe.Verdict, *, quiet: bool) -> None:
        endings.end(job, verdict, quiet=quiet)
        self._tally.ended += 1
        self.is_useful = True
