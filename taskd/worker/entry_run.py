"""What every kind of child does around a task: load plugins, find the task, judge how its run ended.

Nothing here waits or writes to a pipe; entry.py runs tasks one at a time, and knows its worker.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import taskd.worker.entry_pipe as pipe
from taskd.activation.retry import (
    Decision,
    NoRetriesRemainingError,
    Raised,
    Retry,
    RetryTaskError,
    TimedOut,
    decide,
)
from taskd.errors import Undecodable, UnknownTask
from taskd.tasks import internal, registry
from taskd.tasks.current import CurrentTask, Supervisor
from taskd.tasks.task import AnyTask
from taskd.wire import parameters
from taskd.wire.envelope import CallBody, scan_call
from taskd.wire.status import ResultStatus

PR_SET_PDEATHSIG = 1
EXIT_PIPES_BROKEN = 74  # EX_IOERR of sysexits.h
_STATUS = {
    "complete": int(ResultStatus.COMPLETE),
    "failure": int(ResultStatus.FAILURE),
    "retry": int(ResultStatus.RETRY),
}
_OURS = (
    "taskd.worker.entry_async_task",
    "__main__",
    "taskd.worker.entry",
    "taskd.worker.entry_run",
    "taskd.tasks.task",
)
_ASYNC_ELSEWHERE = "the task is async, and this pool runs none: set its `async_slots`"

_rng = random.Random()  # for the jitter of retries; a child process is a root

assert internal  # imported to register its tasks
assert _STATUS["complete"] == pipe.COMPLETE.status


class Run(NamedTuple):
    """One activation whose task is known. `on_timeout`: what its policy says if the deadline ends it."""

    task: AnyTask
    body: CallBody
    policy: Retry | None
    on_timeout: pipe.Verdict


# ---- the process


def bind_to_parent(parent: int) -> None:
    """Die with the worker."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_PIPES_BROKEN)  # it died before we could ask


def guard_forks(close_pipes: Callable[[], None], forget_signals: Callable[[], None]) -> None:
    """A process that a task forks is not a child of the worker: it may not report, and signals end it."""

    def in_fork() -> None:
        close_pipes()
        forget_signals()

    os.register_at_fork(after_in_child=in_fork)


def load_tasks(modules: Sequence[str]) -> pipe.Ready:
    """Import every installed plugin, and `modules` besides. What fails is told, and the rest is used."""
    failures = [
        (str(plugin), pipe.cut(plugin.traceback)) for plugin in registry.load_plugins() if plugin.error
    ]
    for module in modules:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            failures.append((f"module {module}", describe(error)))
    tasks = (
        pipe.KnownTask(task.namespace.application, task.namespace.name, task.name, task.is_async)
        for task in registry.registered()
    )
    return pipe.Ready(tuple(tasks), tuple(failures))


def flush_prints() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue  # a task closed or replaced it


# ---- one activation


def prepare(activation: bytes, *, is_async: bool = False) -> Run | pipe.Verdict:
    """What to run; a verdict when the bytes are no activation, or name no task of this kind of child."""
    try:
        body = scan_call(activation)
        task = registry.find(body.application, body.namespace, body.taskname)
    except UnknownTask as error:
        return failure("unknown_task", str(error))
    except Undecodable as error:
        return failure("undecodable", str(error))
    if task.is_async != is_async:
        return failure("wrong_child", _ASYNC_ELSEWHERE if task.is_async else f"{task} is not async")
    policy = None if body.at_most_once else task.retry
    return Run(task, body, policy, _NO_RETRY if policy is None else _on_timeout(policy, body.attempts))


def _on_timeout(policy: Retry | None, attempts: int) -> pipe.Verdict:
    return _verdict(decide(policy, attempts, TimedOut(), _rng), "")


def arguments(run: Run) -> tuple[list[Any], dict[str, Any]] | pipe.Verdict:
    """The parameters, or the verdict on parameters that cannot be decoded."""
    body = run.body
    try:
        return parameters.decode(body.parameters_bytes, body.parameters_json, body.headers)
    except Exception as error:
        return failure("undecodable", str(error) if isinstance(error, Undecodable) else describe(error))


def context(run: Run, fence: int, supervisor: Supervisor) -> CurrentTask:
    """What the task can know about itself."""
    body = run.body
    return CurrentTask(
        id=body.id,
        namespace=body.namespace,
        taskname=body.taskname,
        application=body.application,
        attempts=body.attempts,
        retries_remaining=run.policy.retries_remaining(body.attempts) if run.policy else 0,
        headers=body.headers,
        processing_deadline_s=body.processing_deadline_s,
        fence=fence,
        supervisor=supervisor,
    )


def raised(run: Run, error: BaseException) -> tuple[pipe.Verdict, bool]:
    """The verdict on what the task raised, and whether the author wants it kept quiet."""
    decision = decide(run.policy, run.body.attempts, Raised(error), _rng)
    return _verdict(decision, describe(error)), isinstance(error, run.task.silenced_exceptions)


def timed_out(run: Run, error: BaseException) -> tuple[pipe.Verdict, bool]:
    """As `raised`, for what a task raised when its deadline had interrupted it: that is what ended it.

    Unless it asked for another run: then it did so knowingly.
    """
    if isinstance(error, RetryTaskError | NoRetriesRemainingError):
        return raised(run, error)
    return run.on_timeout._replace(error=describe(error)), not run.task.report_timeout_errors


def failure(reason: str, error: str) -> pipe.Verdict:
    return pipe.Verdict(_STATUS["failure"], reason, pipe.cut(error))


def _verdict(decision: Decision, error: str) -> pipe.Verdict:
    status = _STATUS[decision.status]
    return pipe.Verdict(status, decision.reason, error, decision.max_attempts, decision.delay_on_retry)


_NO_RETRY = _on_timeout(None, 0)  # whichever attempt it is


def describe(error: BaseException) -> str:
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
