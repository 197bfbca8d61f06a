"""A function that can be called later."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypedDict, TypeVar

from taskd.activation.durations import Duration, optional_seconds, seconds
from taskd.activation.ids import new_id
from taskd.activation.retry import LastAction, Retry
from taskd.tasks.outbox import Call, current_outbox

if TYPE_CHECKING:
    from taskd.tasks.namespace import TaskNamespace

P = ParamSpec("P")
R = TypeVar("R")

CompressionType = Literal["plaintext", "zstd"]


class TaskOptions(TypedDict, total=False):
    """Options of one task; what is left out is the namespace's. Durations: seconds, or a timedelta.

    `expires`: not started later than this after it was produced. `at_most_once`: never started
    twice, so never retried. `wait_for_delivery`: `.delay()` returns when the log has the activation
    durably. `pass_headers`: the function takes them as the keyword `headers`. `silenced_exceptions`
    and `report_timeout_errors`: which failures the worker logs as errors.
    """

    retry: Retry | None
    expires: Duration | None
    processing_deadline_duration: Duration | None
    at_most_once: bool
    wait_for_delivery: bool
    compression_type: CompressionType
    pass_headers: bool
    silenced_exceptions: tuple[type[BaseException], ...]
    report_timeout_errors: bool


class Task(Generic[P, R]):
    """Made by `TaskNamespace.register`. Calling it runs the function here and now.

    An `async def` function is called with Trio: calling it here gives its coroutine, and workers run it
    in a child process that runs many of them at once.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str,
        namespace: TaskNamespace,
        retry: Retry | None = None,
        expires: Duration | None = None,
        processing_deadline_duration: Duration | None = None,
        at_most_once: bool = False,
        wait_for_delivery: bool = True,
        compression_type: CompressionType = "plaintext",
        pass_headers: bool = False,
        silenced_exceptions: tuple[type[BaseException], ...] = (),
        report_timeout_errors: bool = True,
    ) -> None:
        what = f"task {namespace.name}:{name}"
        _check_function(function, what, pass_headers)
        if compression_type not in ("plaintext", "zstd"):
            raise ValueError(f"{what}: compression_type is 'plaintext' or 'zstd', found {compression_type!r}")
        _check_exception_types(silenced_exceptions, f"{what}: silenced_exceptions")
        functools.update_wrapper(self, function)
        self.function = function
        self.is_async = inspect.iscoroutinefunction(function)
        self.name = name
        self.namespace = namespace
        self.retry = _policy(what, retry, namespace.retry, at_most_once)
        expires_s = optional_seconds(expires, f"{what}: expires", at_least=1)
        self.expires_s = namespace.expires_s if expires_s is None else expires_s
        deadline_s = optional_seconds(
            processing_deadline_duration, f"{what}: processing_deadline_duration", at_least=1
        )
        self.processing_deadline_s = namespace.processing_deadline_s if deadline_s is None else deadline_s
        self.at_most_once = at_most_once
        self.wait_for_delivery = wait_for_delivery
        self.compression_type: CompressionType = compression_type
        self.pass_headers = pass_headers
        self.silenced_exceptions = silenced_exceptions
        self.report_timeout_errors = report_timeout_errors

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Have the function called later with these arguments; returns the activation's id.

        Returns when the log has it durably (with `wait_for_delivery=False`: when it is handed over).
        Raises DeliveryError: it was not scheduled.
        """
        return self.apply_async(args, kwargs)

    def apply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, object] | None = None,
        expires: Duration | None = None,
        countdown: Duration | None = None,
    ) -> str:
        """`delay` with settings of this one call. `countdown`: not started before so long has passed."""
        call = self.to_call(args, kwargs, headers=headers, expires=expires, countdown=countdown)
        current_outbox().send(call, wait=self.wait_for_delivery)
        return call.id

    def to_call(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, object] | None = None,
        expires: Duration | None = None,
        countdown: Duration | None = None,
    ) -> Call:
        """What `apply_async` sends, for those who send it themselves. Raises ValueError."""
        expires_s = self.expires_s if expires is None else seconds(expires, f"{self}: expires", at_least=1)
        delay_s = None if countdown is None else seconds(countdown, f"{self}: countdown")
        if expires_s is not None and delay_s is not None and expires_s <= delay_s:
            raise ValueError(
                f"{self}: expires ({expires_s} s) must be longer than countdown ({delay_s} s), "
                "or it would expire before it may start"
            )
        namespace, policy = self.namespace, self.retry
        max_attempts = None
        if policy is not None:
            max_attempts = 1 if self.at_most_once else policy.max_attempts
        return Call(
            id=new_id(),
            namespace=namespace.name,
            taskname=self.name,
            application=namespace.application,
            topic=namespace.topic or "",
            args=tuple(args),
            kwargs=dict(kwargs) if kwargs else {},
            headers={str(name): str(value) for name, value in headers.items()} if headers else {},
            processing_deadline_s=self.processing_deadline_s,
            expires_s=expires_s,
            delay_s=delay_s or None,
            max_attempts=max_attempts,
            dead_letter=policy is not None and policy.times_exceeded is LastAction.Deadletter,
            at_most_once=self.at_most_once,
            delay_on_retry_s=None if policy is None else policy.delay_s,
            compression_type=self.compression_type,
        )

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], headers: Mapping[str, str]) -> object:
        """Call the function as an activation asks for; for what runs tasks. A coroutine if `is_async`."""
        function: Callable[..., object] = self.function
        if self.pass_headers:
            kwargs = {**kwargs, "headers": dict(headers)}
        return function(*args, **kwargs)

    @property
    def origin(self) -> str:
        """Module, name and place of the function, for messages."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        return f"{_name(self.function)}{place}"

    def __str__(self) -> str:
        return f"task {self.namespace.name}:{self.name}"

    def __repr__(self) -> str:
        return f"<{self} of {_name(self.function)}>"


AnyTask = Task[Any, Any]


def _name(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"


def _check_function(function: Callable[..., object], what: str, pass_headers: bool) -> None:
    if not callable(function):
        raise TypeError(f"{what}: expected a function, found {function!r}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{what}: {_name(function)} is a generator, calling it would run nothing of its body")
    if pass_headers:
        parameters = inspect.signature(function).parameters
        if "headers" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise TypeError(f"{what}: pass_headers=True, but {_name(function)} takes no `headers` keyword")


def _check_exception_types(types: object, what: str) -> None:
    if isinstance(types, tuple) and all(isinstance(t, type) and issubclass(t, BaseException) for t in types):
        return
    raise TypeError(f"{what}: expected a tuple of exception types, found {types!r}")


def _policy(what: str, own: Retry | None, inherited: Retry | None, at_most_once: bool) -> Retry | None:
    if own is not None and not isinstance(own, Retry):
        raise TypeError(f"{what}: retry: expected a Retry, found {own!r}")
    policy = inherited if own is None else own
    if not at_most_once:
        return policy
    if own is not None and own.times > 1:
        raise ValueError(
            f"{what}: at_most_once and Retry(times={own.times}) exclude each other, a retry is a second run; "
            "leave out one of them (Retry(times=1) may still name what happens on failure)"
        )
    # A default of the namespace gives way; what happens after a failure still counts.
    return replace(policy or Retry(), times=1)
