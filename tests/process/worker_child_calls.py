"""Activations as a broker hands them out, for tests that drive a child without one."""

from __future__ import annotations

from taskd.wire.parameters import encode
from taskd.wire.protobuf import bytes_field, text_field


def activation(id_: str, task: str, *args: object) -> bytes:
    """A call of a task of namespace `tests`, application `app`."""
    return (
        text_field(1, id_)
        + text_field(2, "tests")
        + text_field(3, task)
        + text_field(12, "app")
        + bytes_field(13, encode(args, {}, "plaintext"))
    )
