"""The async child: runs `async def` tasks on one Trio loop, many at once, as its worker orders through pipes.

Started as `python -m taskd.worker.entry_async`, with the pipes and the protocol of entry.py. What differs:
what it is given begins at once, so the worker gives it no more than may run; an operator's order cancels
the scope of one task; starts are reported; and the loop makes a step every quarter of a second while tasks
run. The memory that the worker shares counts its steps (entry_async_step.py), so a task that blocks it is
noticed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Sequence

import trio

import taskd.worker.entry_pipe as pipe
from taskd.worker import entry_output, entry_run
from taskd.worker.entry_async_step import Stepping, activation_number
from taskd.worker.entry_async_task import Activity, Host
from taskd.worker.entry_run import EXIT_PIPES_BROKEN

READ_BYTES = 65_536
TOKENS_AT_ONCE = 64
BEAT_S = 0.25


class Pipes:
    """The child's ends; reading waits in the loop, writing blocks it: the worker always reads.

    A broken one ends the process: nobody could learn what it does from then on.
    """

    def __init__(self, work: int, tokens: int, reports: int) -> None:
        for fd in (work, tokens, reports):
            os.set_inheritable(fd, False)
        for fd in (work, tokens):
            os.set_blocking(fd, False)
        self._work, self._tokens, self._reports = work, tokens, reports
        self._splitter = pipe.Splitter(pipe.MAX_WORK_BYTES)
        self._frames: list[bytes] = []
        self._unsent = bytearray()

    async def tokens(self) -> bytes:
        """At least one; b"" when the worker wants no more."""
        while True:
            try:
                return os.read(self._tokens, TOKENS_AT_ONCE)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._tokens)  # the worker may take it back meanwhile

    async def frame(self) -> bytes:
        """The frame that belongs to the next of the tokens taken."""
        while not self._frames:
            try:
                data = os.read(self._work, READ_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._work)
                continue
            if not data:
                os._exit(EXIT_PIPES_BROKEN)  # a token without its frame: the worker is gone
            self._frames = self._splitter.frames(data)[::-1]
        return self._frames.pop()

    def report(self, report: pipe.Report) -> None:
        """Say it with the next `flush`."""
        self._unsent += pipe.encode_report(report)

    def flush(self) -> None:
        data = memoryview(bytes(self._unsent))
        self._unsent.clear()
        while data:
            data = data[os.write(self._reports, data) :]

    def close(self) -> None:
        for fd in (self._work, self._tokens, self._reports):
            os.close(fd)


class Loop(Host):
    """All that runs in this child."""

    def __init__(self, pipes: Pipes, stepping: Stepping) -> None:
        self._pipes = pipes
        self._stepping = stepping
        self._given = 0  # the number of the newest piece of work
        self._running: dict[int, Activity] = {}
        self._news = trio.Event()
        self._begun = trio.Event()  # replaced whenever tasks begin
        self._ended = trio.Event()  # ... and when one ends

    async def run(self) -> None:
        """Until the worker wants no more, and what runs has ended."""
        self._stepping.attend(self._running)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell)
            nursery.start_soon(self._beat)
            nursery.start_soon(self._stepping.obey)
            await self._take(nursery)
            while self._running:
                await self._ended.wait()
            nursery.cancel_scope.cancel()
        self._pipes.flush()

    async def _take(self, nursery: trio.Nursery) -> None:
        while tokens := await self._pipes.tokens():
            begun: list[Activity] = []
            for token in tokens:
                self._given += 1
                frame = await self._pipes.frame()
                if token == pipe.TOKEN_RUN[0]:
                    begun += self._prepare(pipe.decode_work(frame))
            self._pipes.flush()  # before the first line of a task: a crash from here on is its own
            for activity in begun:
                activation_number.set(activity.number)  # the new task inherits it, for its very first step
                nursery.start_soon(activity.run, name=str(activity))
            activation_number.set(0)
            self._begun.set()
            self._begun = trio.Event()

    def _prepare(self, work: pipe.Work) -> list[Activity]:
        """One to start, or none and a report that says why."""
        if pipe.is_too_late(work):
            self._pipes.report(pipe.Expired(self._given))
            return []
        run = entry_run.prepare(work.activation, is_async=True)
        if isinstance(run, pipe.Verdict):
            self._pipes.report(pipe.Done(self._given, run, 0))
            return []
        activity = self._running[self._given] = Activity(self, self._given, work, run)
        self._pipes.report(pipe.Started(self._given, run.on_timeout, not run.task.report_timeout_errors))
        return [activity]

    # ---- what activities say

    def done(self, report: pipe.Done) -> None:
        del self._running[report.number]
        self._say(report)
        self._ended.set()
        self._ended = trio.Event()

    def heartbeat(self, report: pipe.Heartbeat) -> None:
        self._say(report)

    def _say(self, report: pipe.Report) -> None:
        self._pipes.report(report)
        self._news.set()

    async def _tell(self) -> None:
        """Write what was said, of many tasks at once when many have something to say."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            self._pipes.flush()
            entry_run.flush_prints()

    async def _beat(self) -> None:
        """Make a step now and then: the worker counts them."""
        while True:
            await trio.sleep(BEAT_S)
            while not self._running:
                await self._begun.wait()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m taskd.worker.entry_async", description=__doc__)
    for name in ("work", "tokens", "reports", "orders", "step", "parent"):  # descriptors, and a process id
        parser.add_argument(name, type=int)
    parser.add_argument("--memory-limit", type=int, default=0, help="bytes of data; 0: no limit")
    parser.add_argument("--tasks", action="append", default=[], help="a module that registers tasks")
    arguments = parser.parse_args(argv)
    entry_run.bind_to_parent(arguments.parent)
    pipes = Pipes(arguments.work, arguments.tokens, arguments.reports)
    stepping = Stepping(arguments.step, arguments.orders)
    entry_run.guard_forks(pipes.close, stepping.forget)
    entry_output.install(activation_number.get)
    if arguments.memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory_limit, arguments.memory_limit))
    try:
        pipes.report(entry_run.load_tasks(arguments.tasks))
        pipes.flush()
        trio.run(Loop(pipes, stepping).run)
    except* OSError as errors:
        print(f"taskd: the pipes to the worker are broken: {errors.exceptions}", file=sys.stderr, flush=True)
        os._exit(EXIT_PIPES_BROKEN)


if __name__ == "__main__":
    main()
