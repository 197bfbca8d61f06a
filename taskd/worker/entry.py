"""The child process: runs tasks, one at a time, as its worker orders through pipes.

Started as `python -m taskd.worker.entry WORK TOKENS REPORTS ORDERS NOTE PARENT`: inherited descriptors - of
four pipes, and of memory for entry_note.py - and the worker's process id. It imports no Trio, gRPC or Kafka,
so it starts quickly and a task can start any event loop of its own. Standard output and error lead to the
worker's log; nothing a task prints gets into the protocol.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import select
import sys
import threading
import time
from collections.abc import Sequence
from types import CoroutineType

import taskd.worker.entry_pipe as pipe
from taskd.tasks.current import running
from taskd.worker import entry_note, entry_output, entry_run
from taskd.worker.entry_run import EXIT_PIPES_BROKEN, Run
from taskd.worker.entry_watch import Supervised, Watch

READ_BYTES = 65_536


class Serving:
    """`number`: of the newest piece of work."""

    number = 0


class Pipes:
    """The child's ends. A broken one ends the process: nobody could learn what it does from then on."""

    def __init__(self, work: int, tokens: int, reports: int, orders: int, note: int) -> None:
        for fd in (work, tokens, reports, orders):
            os.set_inheritable(fd, False)
        self._note = mmap.mmap(note, entry_note.NOTE_BYTES)
        os.close(note)
        self._work, self._tokens, self._reports, self.orders = work, tokens, reports, orders
        self._writing = threading.Lock()
        self._splitter = pipe.Splitter(pipe.MAX_WORK_BYTES)
        self._frames: list[bytes] = []
        self._unsent = b""
        self._idle = select.poll()
        self._idle.register(tokens, select.POLLIN)

    def token(self) -> bytes:
        """The next token; b"" when the worker wants no more. Reports go out before this waits."""
        try:
            return os.read(self._tokens, 1)
        except BlockingIOError:
            self.flush()
        while True:
            self._idle.poll()
            try:
                return os.read(self._tokens, 1)
            except BlockingIOError:
                continue  # the worker took it back

    def frame(self) -> bytes:
        """The frame that belongs to the token just taken."""
        while not self._frames:
            self.flush()
            data = os.read(self._work, READ_BYTES)
            if not data:
                os._exit(EXIT_PIPES_BROKEN)  # a token without its frame: the worker is gone
            self._frames = self._splitter.frames(data)[::-1]
        return self._frames.pop()

    def report(self, report: pipe.Report) -> None:
        """Say it with the next `flush`."""
        self._unsent += pipe.encode_report(report)

    def complete(self, number: int, duration_us: int) -> None:
        """As `report`, that this task completed."""
        self._unsent += pipe.encode_completed(number, duration_us)

    def begin(self, started: pipe.Started) -> int:
        """Before the first line of a task: from here on it runs, and a crash is its own. When that was."""
        # What ended is in the pipe before the worker sees who is next. A full pipe is nobody's running time.
        self.flush()
        begun_ns = time.monotonic_ns()
        if not entry_note.write(self._note, started, begun_ns):
            self.say(started)
            begun_ns = time.monotonic_ns()
        return begun_ns

    def flush(self) -> None:
        if self._unsent:
            data, self._unsent = self._unsent, b""
            with self._writing:
                while data:
                    data = data[os.write(self._reports, data) :]

    def say(self, report: pipe.Report) -> None:
        """Say it at once, from any thread."""
        with self._writing:
            os.write(self._reports, pipe.encode_report(report))

    def close(self) -> None:
        for fd in (self._work, self._tokens, self._reports, self.orders):
            os.close(fd)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m taskd.worker.entry", description=__doc__)
    for name in ("work", "tokens", "reports", "orders", "note", "parent"):
        parser.add_argument(name, type=int)
    parser.add_argument("--memory-limit", type=int, default=0, help="bytes of data; 0: no limit")
    parser.add_argument("--tasks", action="append", default=[], help="a module that registers tasks")
    arguments = parser.parse_args(argv)
    entry_run.bind_to_parent(arguments.parent)
    pipes = Pipes(arguments.work, arguments.tokens, arguments.reports, arguments.orders, arguments.note)
    watch = Watch(pipes.orders, pipes.say)
    watch.install()
    entry_run.guard_forks(pipes.close, watch.forget)
    serving = Serving()
    entry_output.install(lambda: serving.number)
    if arguments.memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory_limit, arguments.memory_limit))
    try:
        pipes.report(entry_run.load_tasks(arguments.tasks))
        pipes.flush()
        _serve(pipes, watch, serving)
    except OSError as error:
        print(f"taskd: the pipes to the worker are broken: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_PIPES_BROKEN)


def _serve(pipes: Pipes, watch: Watch, serving: Serving) -> None:
    pid = os.getpid()
    while token := pipes.token():
        serving.number += 1
        frame = pipes.frame()
        if token == pipe.TOKEN_RUN:
            _run(pipes, watch, serving.number, pipe.decode_work(frame))
            if os.getpid() != pid:
                os._exit(0)  # a task forked, and this copy of it returned here
            watch.mend()
            entry_run.flush_prints()
    pipes.flush()


def _run(pipes: Pipes, watch: Watch, number: int, work: pipe.Work) -> None:
    """One activation. Nothing a task raises gets out of here."""
    if pipe.is_too_late(work):
        pipes.report(pipe.Expired(number))
        return
    run = entry_run.prepare(work.activation)
    if isinstance(run, pipe.Verdict):
        pipes.report(pipe.Done(number, run, 0))
        return
    begun_ns = pipes.begin(pipe.Started(number, run.on_timeout, not run.task.report_timeout_errors))
    failed = _call(run, watch.supervise(number, work, begun_ns / 1e9), work.fence, watch)
    duration_us = (time.monotonic_ns() - begun_ns) // 1000
    if failed is None:
        pipes.complete(number, duration_us)
    else:
        verdict, quiet = failed
        pipes.report(pipe.Done(number, verdict, duration_us, quiet))


def _call(run: Run, task: Supervised, fence: int, watch: Watch) -> tuple[pipe.Verdict, bool] | None:
    """None: it completed. Else the verdict, and whether the author wants it kept quiet."""
    arguments = entry_run.arguments(run)
    if isinstance(arguments, pipe.Verdict):
        return arguments, False
    try:
        with running(lambda: entry_run.context(run, fence, task)):
            try:
                watch.open(task)
                returned = run.task.run(*arguments, run.body.headers)
            finally:
                # Interrupted here at the last moment, it is shut all the same: it interrupts once.
                watch.shut()
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: they end the task, not the child
        return entry_run.timed_out(run, error) if task.overdue else entry_run.raised(run, error)
    finally:
        task.close()
    if isinstance(returned, CoroutineType):
        returned.close()
        text = f"{run.task} returned a coroutine, which nobody runs; make the outermost function `async def`"
        return entry_run.failure("error", text), False
    return None


if __name__ == "__main__":
    main()
