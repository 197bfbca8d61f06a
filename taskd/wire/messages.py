"""Generated messages read strictly: what a stranger sent has the declared types, or is an error."""

from __future__ import annotations

from typing import TypeVar

import betterproto2

from taskd.errors import Undecodable
from taskd.wire.protobuf import check_whole

M = TypeVar("M", bound=betterproto2.Message)


def read_message(kind: type[M], raw: bytes) -> M:
    """Raises Undecodable.

    The generated code takes a field that is cut off for what is left of it, and a field of another type
    than declared for its value: a number where text should be. Such a message cannot be written again.
    """
    try:
        check_whole(raw)
        message = kind.parse(raw)
        bytes(message)
    except Exception as error:  # the generated code raises many kinds
        raise Undecodable(f"not a {kind.__name__}: {error}") from None
    return message
