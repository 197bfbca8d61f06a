"""Which activations are for async children: asked of each one, so it must cost little."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from taskd.errors import Undecodable
from taskd.wire.envelope import TASKNAME, scan
from taskd.wire.frames import TaskName
from taskd.wire.protobuf import text_field

SHORT_BYTES = 4_096  # longer ones are not searched for names: a scan skips their parameters


class AsyncTasks:
    """The async tasks of a pool. Searches an activation for their names before it reads it in turn."""

    def __init__(self, names: Iterable[TaskName] = ()) -> None:
        self._names = frozenset(names)
        fields = {text_field(TASKNAME, task.taskname) for task in self._names}
        self._mention = re.compile(b"|".join(map(re.escape, sorted(fields)))).search

    def __iter__(self) -> Iterator[TaskName]:
        return iter(self._names)

    def __bool__(self) -> bool:
        return bool(self._names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncTasks) and self._names == other._names

    __hash__ = None  # type: ignore[assignment]  # nobody needs it

    def calls(self, activation: bytes) -> bool:
        """Whether it calls one of them. False for bytes that are no activation."""
        if not self._names or (len(activation) <= SHORT_BYTES and self._mention(activation) is None):
            return False
        try:
            envelope = scan(activation)
        except Undecodable:
            return False
        return TaskName(envelope.application, envelope.namespace, envelope.taskname) in self._names
