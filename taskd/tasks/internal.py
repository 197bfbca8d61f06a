"""Tasks that every worker knows without a plugin."""

from __future__ import annotations

from taskd.tasks.namespace import TaskNamespace
from taskd.tasks.registry import INTERNAL


class _InternalNamespace(TaskNamespace):
    _reserved = frozenset()


internal = _InternalNamespace(INTERNAL)


@internal.register(name="canary_task", processing_deadline_duration=10)
def canary_task(*args: object, **kwargs: object) -> None:
    """Does nothing. Existing brokers hand it out at their start to see whether anybody works."""
