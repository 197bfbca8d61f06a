"""What a running task can know about itself, what it tells of itself, and how it asks to be run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from taskd.activation.retry import NoRetriesRemainingError, RetryTaskError
from taskd.tasks.heartbeats import checked


class Supervisor(Protocol):
    """Whoever runs a task, as the task sees it. Called from any thread of the task; nothing here waits."""

    def heartbeat(self, progress: float | None, message: str) -> None:
        """The task lives: its deadline begins again. `progress` is 0 to 1; may be called very often."""
        ...

    def is_cancelled(self) -> bool: ...

    def remaining_s(self) -> float:
        """Seconds until the deadline; negative when it is over."""
        ...


class _Unwatched:
    """Nobody waits for the task: no deadline, nobody to tell."""

    def heartbeat(self, progress: float | None, message: str) -> None:
        pass

    def is_cancelled(self) -> bool:
        return False

    def remaining_s(self) -> float:
        return float("inf")


@dataclass(frozen=True, slots=True)
class CurrentTask:
    """The activation being run. `attempts` is 0 in the first run, one more in each retry.

    `fence` names this very hand-out: larger than that of any earlier run of the same activation, so a
    service that remembers the largest can refuse a run that was superseded; 0 where there is none.
    `retries_remaining`: how many runs may follow this one. `processing_deadline_s`: how long a run may
    take, counted from its start or its last heartbeat.
    """

    id: str
    namespace: str
    taskname: str
    application: str = ""
    attempts: int = 0
    retries_remaining: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    processing_deadline_s: int = 10
    fence: int = 0
    supervisor: Supervisor = field(default=_Unwatched(), repr=False, compare=False)

    @property
    def attempt(self) -> int:
        """The same as `attempts`, as the published client calls it."""
        return self.attempts

    @property
    def deadline(self) -> float:
        """Seconds until this run is stopped, `inf` where nothing stops it. A heartbeat moves it."""
        return self.supervisor.remaining_s()

    @property
    def cancelled(self) -> bool:
        """Whether an operator cancelled this run, or somebody else has its activation now."""
        return self.supervisor.is_cancelled()

    def heartbeat(self, progress: float | None = None, message: str = "") -> None:
        """Say that the task is alive: its deadline begins again, and operators see how far it is.

        `progress`: 0 to 1, cut to that; `message`: for people, cut to 200 characters. It is cheap, call
        it for each row: at most four a second are passed on, the last one always. The deadline never
        moves further than the broker's `max_processing_deadline_s` after the start of the run. Without
        an effect where no worker runs the task, and for tasks that a worker without a stream runs.
        """
        self.supervisor.heartbeat(*checked(progress, message))


_current: ContextVar[running | None] = ContextVar("taskd.current_task", default=None)


def current_task() -> CurrentTask | None:
    """The activation this code runs for; None when the function was called directly."""
    block = _current.get()
    return None if block is None else block.task


def heartbeat(progress: float | None = None, message: str = "") -> None:
    """`CurrentTask.heartbeat` of the running task; does nothing when the function was called directly.

    A thread that the task starts does not know the task: hand it `current_task()`.
    """
    task = current_task()
    if task is not None:
        task.heartbeat(progress, message)


class running:
    """Let `current_task()` answer `task` while the block lasts. For what runs tasks: workers, eager mode.

    A function makes it when it is asked for first: most tasks never ask.
    """

    __slots__ = ("_task", "_token")

    def __init__(self, task: CurrentTask | Callable[[], CurrentTask]) -> None:
        self._task = task
        self._token: Token[running | None] | None = None

    @property
    def task(self) -> CurrentTask:
        if not isinstance(self._task, CurrentTask):
            self._task = self._task()
        return self._task

    def __enter__(self) -> None:
        self._token = _current.set(self)

    def __exit__(self, *error: object) -> None:
        assert self._token is not None
        _current.reset(self._token)


def retry_task(delay: int | None = None, *, message: str | None = None) -> NoReturn:
    """End this run and ask for another, after `delay` seconds or as the task's policy says.

    Raises RetryTaskError, or NoRetriesRemainingError when this is the last run: catch that to do
    something else instead. Outside a running task it always raises RetryTaskError.
    """
    task = current_task()
    if task is not None and task.retries_remaining == 0:
        raise NoRetriesRemainingError(message)
    raise RetryTaskError(message, delay=delay)
