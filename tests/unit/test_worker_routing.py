"""Which activations go to async children, whatever their bytes look like."""

from __future__ import annotations

import pytest

from taskd.wire.frames import TaskName
from taskd.wire.protobuf import bytes_field, text_field
from taskd.worker.routing import SHORT_BYTES, AsyncTasks

tasks = AsyncTasks(
    [TaskName("app", "ns", "waits"), TaskName("app", "ns", "a.b(c"), TaskName("", "internal", "x")]
)


def activation(
    taskname: str, namespace: str = "ns", application: str = "app", parameters: bytes = b""
) -> bytes:
    return (
        text_field(1, "id")
        + text_field(2, namespace)
        + text_field(3, taskname)
        + text_field(12, application)
        + bytes_field(13, parameters)
    )


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (activation("waits"), True),
        (activation("a.b(c"), True),
        (activation("waits", parameters=b"x" * 3 * SHORT_BYTES), True),
        (activation("x", "internal", ""), True),
        (activation("wait"), False),
        (activation("waits2"), False),
        (activation("axb(c"), False),
        (activation("waits", "other"), False),
        (activation("waits", application="other"), False),
        (activation("other", parameters=text_field(3, "waits")), False),
        (activation("other", parameters=b"x" * 3 * SHORT_BYTES), False),
        (text_field(3, "waits"), False),
        (b"\xff\xff" + text_field(3, "waits"), False),
        (b"", False),
    ],
)
def test_an_activation_is_known_by_all_three_names(raw: bytes, expected: bool) -> None:
    assert tasks.calls(raw) is expected


def test_without_async_tasks_nothing_is_async() -> None:
    assert not AsyncTasks().calls(activation("waits"))
    assert not AsyncTasks()
    assert AsyncTasks() == AsyncTasks([])
    assert tasks != AsyncTasks()
