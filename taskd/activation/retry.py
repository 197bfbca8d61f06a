"""Whether a task that did not complete runs again: policy in, decision out.

Whatever ends a run - return, exception, deadline, death of the process - becomes one `Outcome` first,
and `decide` alone turns it into a `Decision`. Pure: no clock, no I/O, no state.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from typing import Literal

from taskd.errors import TaskdError

Reason = Literal["", "error", "timeout", "crashed", "requested", "exhausted"]


def _is_exception_type(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_delay(delay: int | None) -> None:
    if delay is not None and (not _is_int(delay) or delay < 0):
        raise ValueError(f"delay: expected seconds as an int of at least 0, or None; found {delay!r}")


class RetryTaskError(TaskdError):
    """The task asked to be run again.

    `delay`: seconds until then, such as a service's Retry-After; None leaves it to the task's policy.
    """

    def __init__(self, message: str | None = None, *, delay: int | None = None) -> None:
        super().__init__(message)
        _check_delay(delay)
        self.delay = delay


class NoRetriesRemainingError(TaskdError):
    """The task asked to be run again, but this was its last run."""


class ProcessingDeadlineExceeded(BaseException):
    """The task ran longer than its processing deadline.

    Not an Exception, so that an `except Exception` of the task does not swallow the order to stop;
    for the same reason `Retry(on=(Exception,))` does not include it.
    """


class TaskCancelled(BaseException):
    """The run is to end: an operator cancelled it, or somebody else has its activation now.

    Not an Exception, for the same reason. Clean up and let it pass: whatever the task does then, no
    outcome of this run counts any more.
    """


class LastAction(enum.Enum):
    """What becomes of the activation when its last run failed."""

    Discard = "discard"
    Deadletter = "deadletter"


@dataclass(frozen=True, slots=True)
class Retry:
    """When to run a task again.

    `times` counts runs, the first included. An exception of a type in `on` leads to a retry unless
    its type is in `ignore`; RetryTaskError always does. `delay`: seconds before the next run, None
    is at once.
    """

    times: int = 1
    on: tuple[type[BaseException], ...] = ()
    ignore: tuple[type[BaseException], ...] = ()
    times_exceeded: LastAction = LastAction.Discard
    delay: int | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.times) or self.times < 1:
            raise ValueError(f"Retry.times counts runs: expected an int of at least 1, found {self.times!r}")
        for name, types in (("on", self.on), ("ignore", self.ignore)):
            if not isinstance(types, tuple) or not all(map(_is_exception_type, types)):
                raise TypeError(f"Retry.{name}: expected a tuple of exception types, found {types!r}")
        if not isinstance(self.times_exceeded, LastAction):
            raise TypeError(f"Retry.times_exceeded: expected a LastAction, found {self.times_exceeded!r}")
        _check_delay(self.delay)

    @property
    def max_attempts(self) -> int:
        """What travels in `RetryState.max_attempts`; other clients of the protocol send this number too."""
        return self.times + 1

    def retries_remaining(self, attempts: int) -> int:
        """How often a run with this attempt number (0 is the first) may still be followed by another."""
        return max(self.times - 1 - attempts, 0)


@dataclass(frozen=True, slots=True)
class Completed:
    """The function returned."""


@dataclass(frozen=True, slots=True)
class Raised:
    """The function raised."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The deadline passed; whether the run was stopped from inside or killed makes no difference."""


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process died under the task."""


Outcome = Completed | Raised | TimedOut | Crashed


@dataclass(frozen=True, slots=True)
class Decision:
    """What to report. `reason`: one word on what ended the run, for machines.

    `max_attempts` and `delay_on_retry` (seconds) are set for `retry` only.
    """

    status: Literal["complete", "retry", "failure"]
    reason: Reason = ""
    max_attempts: int | None = None
    delay_on_retry: int | None = None


_NO_RETRY = Retry()


def decide(policy: Retry | None, attempts: int, outcome: Outcome) -> Decision:
    """Judge one run. `attempts`: of the activation, 0 in the first; no policy means one run.

    A crash is never of an allowed type, so here it is a failure. Workers that speak the stream
    report it as a crash instead, and the broker decides by the attempts made.
    """
    if isinstance(outcome, Completed):
        return Decision("complete")
    if isinstance(outcome, Crashed):
        return Decision("failure", "crashed")
    error = ProcessingDeadlineExceeded() if isinstance(outcome, TimedOut) else outcome.error
    policy = policy or _NO_RETRY
    reason = _reason(error)
    if policy.retries_remaining(attempts) == 0:
        return Decision("failure", "exhausted" if reason == "requested" else reason)
    if isinstance(error, RetryTaskError):
        delay = policy.delay if error.delay is None else error.delay
        return Decision("retry", reason, policy.max_attempts, delay)
    if isinstance(error, policy.ignore):
        return Decision("failure", reason)
    if isinstance(error, policy.on) or _is_multiprocessing_timeout(error):
        return Decision("retry", reason, policy.max_attempts, policy.delay)
    return Decision("failure", reason)


def _reason(error: BaseException) -> Reason:
    if isinstance(error, RetryTaskError):
        return "requested"
    if isinstance(error, NoRetriesRemainingError):
        return "exhausted"
    return "timeout" if isinstance(error, ProcessingDeadlineExceeded) else "error"


def _is_multiprocessing_timeout(error: BaseException) -> bool:
    # Whoever raised it has imported the module; importing it here would slow every `import taskd`.
    module = sys.modules.get("multiprocessing.context")
    return module is not None and isinstance(error, module.TimeoutError)
