"""What a running task can know about itself, and how it asks to be run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NoReturn

from taskd.activation.retry import NoRetriesRemainingError, RetryTaskError


@dataclass(frozen=True, slots=True)
class CurrentTask:
    """The activation being run. `attempts` is 0 in the first run, one more in each retry."""

    id: str
    namespace: str
    taskname: str
    application: str = ""
    attempts: int = 0
    retries_remaining: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    processing_deadline_s: int = 10


_current: ContextVar[CurrentTask | None] = ContextVar("taskd.current_task", default=None)


def current_task() -> CurrentTask | None:
    """The activation this code runs for; None when the function was called directly."""
    return _current.get()


@contextmanager
def running(task: CurrentTask) -> Iterator[None]:
    """Let `current_task()` answer `task` while the block lasts. For what runs tasks: workers, eager mode."""
    token = _current.set(task)
    try:
        yield
    finally:
        _current.reset(token)


def retry_task(delay: int | None = None, *, message: str | None = None) -> NoReturn:
    """End this run and ask for another, after `delay` seconds or as the task's policy says.

    Raises RetryTaskError, or NoRetriesRemainingError when this is the last run: catch that to do
    something else instead. Outside a running task it always raises RetryTaskError.
    """
    task = current_task()
    if task is not None and task.retries_remaining == 0:
        raise NoRetriesRemainingError(message)
    raise RetryTaskError(message, delay=delay)
