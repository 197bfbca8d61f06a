"""The child process: runs tasks, one at a time, as its worker orders through pipes.

Started as `python -m taskd.worker.entry WORK TOKENS REPORTS PARENT`: three inherited descriptors and
the worker's process id. It imports no Trio, gRPC or Kafka, so it starts quickly and a task can start
any event loop of its own. Standard output and error are the worker's; nothing a task prints gets
into the protocol.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import CoroutineType, TracebackType

import taskd.worker.entry_pipe as pipe
from taskd.activation.retry import Decision, Raised, Retry, TimedOut, decide
from taskd.errors import Undecodable, UnknownTask
from taskd.tasks import internal, registry
from taskd.tasks.current import CurrentTask, running
from taskd.tasks.task import AnyTask
from taskd.wire import parameters
from taskd.wire.envelope import CallBody, scan_call
from taskd.wire.frames import ResultStatus

PR_SET_PDEATHSIG = 1
READ_BYTES = 65_536
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
EXIT_PIPES_BROKEN = 74  # EX_IOERR of sysexits.h
_STATUS = {
    "complete": int(ResultStatus.COMPLETE),
    "failure": int(ResultStatus.FAILURE),
    "retry": int(ResultStatus.RETRY),
}
_OURS = (__name__, "taskd.tasks.task")
_COMPLETE = pipe.Verdict(_STATUS["complete"])

assert internal  # imported to register its tasks


class Pipes:
    """The child's ends. A broken one ends the process: nobody could learn what it does from then on."""

    def __init__(self, work: int, tokens: int, reports: int) -> None:
        for fd in (work, tokens, reports):
            os.set_inheritable(fd, False)
        self._work, self._tokens, self._reports = work, tokens, reports
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
        if not self._frames:
            self._frames = list(self._splitter)
        while not self._frames:
            self.flush()
            data = os.read(self._work, READ_BYTES)
            if not data:
                os._exit(EXIT_PIPES_BROKEN)  # a token without its frame: the worker is gone
            self._splitter.feed(data)
            self._frames = list(self._splitter)
        return self._frames.pop(0)

    def report(self, report: pipe.Report) -> None:
        """Say it with the next `flush`."""
        self._unsent += pipe.encode_report(report)

    def flush(self) -> None:
        data = memoryview(self._unsent)
        while data:
            data = data[os.write(self._reports, data) :]
        self._unsent = b""

    def close(self) -> None:
        for fd in (self._work, self._tokens, self._reports):
            os.close(fd)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m taskd.worker.entry", description=__doc__)
    for name in ("work", "tokens", "reports", "parent"):
        parser.add_argument(name, type=int)
    parser.add_argument("--tasks", action="append", default=[], help="a module that registers tasks")
    arguments = parser.parse_args(argv)
    _bind_to_parent(arguments.parent)
    pipes = Pipes(arguments.work, arguments.tokens, arguments.reports)
    _guard_forks(pipes)
    # What tasks log must be seen; a plugin that wants it otherwise configures logging when imported.
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    try:
        pipes.report(_load(arguments.tasks))
        pipes.flush()
        _serve(pipes)
    except OSError as error:
        print(f"taskd: the pipes to the worker are broken: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_PIPES_BROKEN)


def _bind_to_parent(parent: int) -> None:
    """Die with the worker, and only when it says so: signals to a whole group or service are not for us."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_PIPES_BROKEN)  # it died before we could ask
    # Handlers rather than SIG_IGN: programs that a task starts would inherit the latter.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def _guard_forks(pipes: Pipes) -> None:
    """A process that a task forks is not a child of the worker: it may not report, and signals end it."""

    def in_fork() -> None:
        pipes.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=in_fork)


def _load(modules: Sequence[str]) -> pipe.Ready:
    failures = [
        (str(plugin), pipe.cut(plugin.traceback)) for plugin in registry.load_plugins() if plugin.error
    ]
    for module in modules:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            failures.append((f"module {module}", _describe(error)))
    names = (f"{task.namespace.name}:{task.name}" for task in registry.registered())
    return pipe.Ready(tuple(names), tuple(failures))


def _serve(pipes: Pipes) -> None:
    pid = os.getpid()
    number = 0
    while token := pipes.token():
        number += 1
        frame = pipes.frame()
        if token == pipe.TOKEN_RUN:
            _run(pipes, number, pipe.decode_work(frame))
            if os.getpid() != pid:
                os._exit(0)  # a task forked, and this copy of it returned here
            _flush_prints()
    pipes.flush()


def _run(pipes: Pipes, number: int, work: pipe.Work) -> None:
    """One activation. Nothing a task raises gets out of here."""
    if pipe.is_too_late(work):
        pipes.report(pipe.Expired(number))
        return
    try:
        body = scan_call(work.activation)
        task = registry.find(body.application, body.namespace, body.taskname)
    except UnknownTask as error:
        pipes.report(pipe.Done(number, _failure("unknown_task", str(error)), 0))
        return
    except Undecodable as error:
        pipes.report(pipe.Done(number, _failure("undecodable", str(error)), 0))
        return
    policy = None if body.at_most_once else task.retry
    on_timeout = _verdict(decide(policy, body.attempts, TimedOut()), "")
    pipes.report(pipe.Started(number, on_timeout, not task.report_timeout_errors))
    pipes.flush()  # before the first line of the task: its deadline begins, and a crash is its own
    begin_ns = time.perf_counter_ns()
    verdict, quiet = _call(task, body, policy)
    pipes.report(pipe.Done(number, verdict, (time.perf_counter_ns() - begin_ns) // 1000, quiet))


def _call(task: AnyTask, body: CallBody, policy: Retry | None) -> tuple[pipe.Verdict, bool]:
    """The verdict, and whether the author wants it kept quiet."""
    try:
        args, kwargs = parameters.decode(body.parameters_bytes, body.parameters_json, body.headers)
    except Exception as error:
        text = str(error) if isinstance(error, Undecodable) else _describe(error)
        return _failure("undecodable", text), False
    current = CurrentTask(
        id=body.id,
        namespace=body.namespace,
        taskname=body.taskname,
        application=body.application,
        attempts=body.attempts,
        retries_remaining=(policy or Retry()).retries_remaining(body.attempts),
        headers=body.headers,
        processing_deadline_s=body.processing_deadline_s,
    )
    try:
        with running(current):
            returned = task.run(args, kwargs, body.headers)
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: they end the task, not the child
        decision = decide(policy, body.attempts, Raised(error))
        return _verdict(decision, _describe(error)), isinstance(error, task.silenced_exceptions)
    if isinstance(returned, CoroutineType):
        returned.close()
        return _failure(
            "error", f"{task} returned a coroutine, which nobody runs; make it a plain function"
        ), False
    return _COMPLETE, False


def _verdict(decision: Decision, error: str) -> pipe.Verdict:
    status = _STATUS[decision.status]
    return pipe.Verdict(status, decision.reason, error, decision.max_attempts, decision.delay_on_retry)


def _failure(reason: str, error: str) -> pipe.Verdict:
    return pipe.Verdict(_STATUS["failure"], reason, pipe.cut(error))


def _describe(error: BaseException) -> str:
    """The traceback, cut to size. An error that cannot even be printed is named by its type."""
    try:
        text = "".join(
            traceback.format_exception(type(error), error, _below_us(error.__traceback__))
        ).rstrip()
    except BaseException as unprintable:
        text = f"{type(error).__name__} (printing it raised {type(unprintable).__name__})"
    return pipe.cut(text).encode("utf-8", "backslashreplace").decode()


def _below_us(trace: TracebackType | None) -> TracebackType | None:
    """Without the frames that call the task: they are the same in every traceback."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in _OURS:
        trace = trace.tb_next
    return trace


def _flush_prints() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue  # a task closed or replaced it


if __name__ == "__main__":
    main()
