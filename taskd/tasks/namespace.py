"""Namespaces: where tasks are registered, with defaults they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, Unpack

from taskd.activation.durations import Duration, optional_seconds, seconds
from taskd.activation.retry import Retry
from taskd.tasks import registry
from taskd.tasks.task import Task, TaskOptions

P = ParamSpec("P")
R = TypeVar("R")


class TaskNamespace:
    """A named group of an application's tasks.

    `topic`: of the log, None is the configured one. `retry`, `processing_deadline_duration` and
    `expires` hold for tasks that do not say otherwise; durations in seconds, or a timedelta.
    Several namespaces of the same application and name, say of two plugins, are one.
    """

    _reserved = frozenset({registry.INTERNAL})

    def __init__(
        self,
        name: str,
        application: str = "",
        topic: str | None = None,
        retry: Retry | None = None,
        processing_deadline_duration: Duration = 10,
        expires: Duration | None = None,
    ) -> None:
        what = f"namespace {name!r}"
        _check_text(name, "the namespace's name")
        if name in self._reserved:
            raise ValueError(f"{what} is reserved for taskd's own tasks; choose another name")
        if not isinstance(application, str):
            raise TypeError(f"{what}: application: expected text, found {application!r}")
        if topic is not None:
            _check_text(topic, f"{what}: topic")
        if retry is not None and not isinstance(retry, Retry):
            raise TypeError(f"{what}: retry: expected a Retry, found {retry!r}")
        self.name = name
        self.application = application
        self.topic = topic
        self.retry = retry
        self.processing_deadline_s = seconds(
            processing_deadline_duration, f"{what}: processing_deadline_duration", at_least=1
        )
        self.expires_s = optional_seconds(expires, f"{what}: expires", at_least=1)

    def register(self, name: str, **options: Unpack[TaskOptions]) -> Callable[[Callable[P, R]], Task[P, R]]:
        """Make a function a task of this namespace; a decorator. `name` travels, so keep it when you rename.

        Raises ValueError or TypeError for options that make no sense, and when the name is taken.
        """
        _check_text(name, f"namespace {self.name!r}: the task's name")

        def make_task(function: Callable[P, R]) -> Task[P, R]:
            task = Task(function, name=name, namespace=self, **options)
            registry.add(task)
            return task

        return make_task

    def __repr__(self) -> str:
        return f"TaskNamespace({self.name!r}, application={self.application!r})"


def instrumented_task(
    *, name: str, namespace: TaskNamespace, **options: Unpack[TaskOptions]
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """`namespace.register(name=...)`, for those who like the namespace among the arguments."""
    return namespace.register(name, **options)


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{what}: expected text that is not empty, found {value!r}")
