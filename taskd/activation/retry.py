"""Whether a task that did not complete runs again: policy in, decision out.

Whatever ends a run - return, exception, deadline, death of the process - becomes one `Outcome` first,
and `decide` alone turns it into a `Decision`. Pure: no clock, no I/O, no state, and chance is given.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from taskd.activation.backoff import Backoff, RetryRule, after_seconds, asked_by_headers, check_backoff
from taskd.activation.durations import Duration, optional_seconds, seconds
from taskd.errors import TaskdError

if TYPE_CHECKING:
    from random import Random

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


class RetryAfter(RetryTaskError):
    """The task asked to be run again after a time of its own, not that of its policy.

    `after`: seconds, rounded up to whole ones, or a timedelta. Raises ValueError when it is less than none.
    """

    def __init__(self, after: float | timedelta, message: str | None = None) -> None:
        super().__init__(message, delay=after_seconds(after, "RetryAfter"))

    @classmethod
    def from_headers(
        cls, headers: Mapping[str, str], *, at_most: Duration = 86_400, message: str | None = None
    ) -> RetryTaskError:
        """What an HTTP answer asks for by its `Retry-After`; no more than `at_most`, by default a day.

        To be raised. An answer that does not clearly ask leaves the delay to the task's policy.
        """
        asked_s = asked_by_headers(headers, seconds(at_most, "RetryAfter: at_most"))
        return RetryTaskError(message) if asked_s is None else cls(asked_s, message)


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
    its type is in `ignore`; RetryTaskError always does. `delay`: seconds (or a timedelta) before the
    next run, None is at once. `backoff`: let that delay grow with each run. `per_exception`: types that
    lead to a retry too, by rules of their own; of several that fit, the most specific counts.
    """

    times: int = 1
    on: tuple[type[BaseException], ...] = ()
    ignore: tuple[type[BaseException], ...] = ()
    times_exceeded: LastAction = LastAction.Discard
    delay: Duration | None = None
    backoff: Backoff | None = None
    per_exception: Mapping[type[BaseException], RetryRule] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _is_int(self.times) or self.times < 1:
            raise ValueError(f"Retry.times counts runs: expected an int of at least 1, found {self.times!r}")
        for name, types in (("on", self.on), ("ignore", self.ignore)):
            if not isinstance(types, tuple) or not all(map(_is_exception_type, types)):
                raise TypeError(f"Retry.{name}: expected a tuple of exception types, found {types!r}")
        if not isinstance(self.times_exceeded, LastAction):
            raise TypeError(f"Retry.times_exceeded: expected a LastAction, found {self.times_exceeded!r}")
        optional_seconds(self.delay, "Retry.delay")
        check_backoff(self.backoff, "Retry")
        self._check_rules()

    def _check_rules(self) -> None:
        for type_, rule in self.per_exception.items():
            if not _is_exception_type(type_) or not isinstance(rule, RetryRule):
                raise TypeError(
                    f"Retry.per_exception: expected a RetryRule for each type, found {type_!r}: {rule!r}"
                )
            if type_ in self.ignore:
                raise ValueError(f"Retry: {type_.__name__} is in both `ignore` and `per_exception`: keep one")
        for rule in (RetryRule(), *self.per_exception.values()):
            if (rule.backoff or self.backoff) and not (rule.delay or self.delay):
                raise ValueError("Retry: a backoff needs a delay to begin with, such as delay=10")
        object.__setattr__(self, "per_exception", MappingProxyType(dict(self.per_exception)))

    @property
    def delay_s(self) -> int | None:
        """The delay before the first retry, in whole seconds."""
        return optional_seconds(self.delay, "Retry.delay")

    def allows(self, error: BaseException) -> bool:
        """Whether an exception that the task did not raise for the purpose leads to a retry."""
        if isinstance(error, self.ignore):
            return False
        allowed = isinstance(error, (*self.on, *self.per_exception))
        return allowed or _is_multiprocessing_timeout(error)

    def rule_for(self, error: BaseException) -> RetryRule | None:
        """The rule of the most specific type in `per_exception` that `error` is of."""
        if not self.per_exception:
            return None
        return next((rule for type_ in type(error).__mro__ if (rule := self.per_exception.get(type_))), None)

    def next_delay_s(self, rule: RetryRule | None, attempts: int, rng: Random | None) -> int | None:
        """The delay after run number `attempts`, 0 is the first; None: at once."""
        first_s = self.delay_s
        backoff = self.backoff
        if rule is not None:
            first_s = first_s if rule.delay is None else optional_seconds(rule.delay, "RetryRule.delay")
            backoff = rule.backoff or backoff
        return first_s if first_s is None or backoff is None else backoff.delay_s(first_s, attempts, rng)

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


def decide(policy: Retry | None, attempts: int, outcome: Outcome, rng: Random | None = None) -> Decision:
    """Judge one run. `attempts`: of the activation, 0 in the first; no policy means one run.

    The delay follows from the policy and `attempts`; `rng` is for its jitter, without there is none.

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
    rule = policy.rule_for(error)
    if rule is not None and rule.times is not None and attempts >= rule.times - 1:
        return Decision("failure", "exhausted" if reason == "requested" else reason)
    if isinstance(error, RetryTaskError) and error.delay is not None:
        return Decision("retry", reason, policy.max_attempts, error.delay)
    if isinstance(error, RetryTaskError) or policy.allows(error):
        return Decision("retry", reason, policy.max_attempts, policy.next_delay_s(rule, attempts, rng))
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
