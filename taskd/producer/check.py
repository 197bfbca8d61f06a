"""What a producer refuses, because no broker could store it, hand it out or start it in time.

Brokers still meet such records from elsewhere; here their author can be told.
"""

from __future__ import annotations

from taskd.errors import DeliveryError
from taskd.tasks.outbox import Call
from taskd.wire.envelope import MAX_DURATION_S, MAX_ID_BYTES, MAX_NAME_BYTES, UINT32_MAX

MAX_ACTIVATION_BYTES = 10_000_000  # the largest record that both logs take by default


class Unsendable(DeliveryError):
    """The call can never be sent as it is; it was not scheduled."""


def check_call(call: Call) -> None:
    """Raise Unsendable when a field of `call` is out of bounds."""
    _check_text(call, "id", call.id, MAX_ID_BYTES)
    _check_text(call, "namespace", call.namespace, MAX_NAME_BYTES)
    _check_text(call, "task name", call.taskname, MAX_NAME_BYTES)
    if call.application and not _fits(call.application, MAX_NAME_BYTES):
        raise refusal(call, f"the application has at most {MAX_NAME_BYTES} bytes")
    _check_number(call, "processing deadline", call.processing_deadline_s, 1, MAX_DURATION_S)
    if call.expires_s is not None:
        _check_number(call, "expires", call.expires_s, 1, MAX_DURATION_S)
    if call.delay_s is not None:
        _check_number(call, "delay", call.delay_s, 0, MAX_DURATION_S)
    if call.delay_on_retry_s is not None:
        _check_number(call, "delay on retry", call.delay_on_retry_s, 0, MAX_DURATION_S)
    _check_number(call, "attempts", call.attempts, 0, UINT32_MAX)
    if call.max_attempts is not None:
        _check_number(call, "max attempts", call.max_attempts, 0, UINT32_MAX)
    if call.expires_s is not None and call.delay_s is not None and call.expires_s <= call.delay_s:
        raise refusal(call, f"it would expire after {call.expires_s} s, before its delay of {call.delay_s} s")


def check_size(call: Call, size_bytes: int) -> None:
    """Raise Unsendable when the serialized activation is larger than logs take."""
    if size_bytes > MAX_ACTIVATION_BYTES:
        raise refusal(
            call,
            f"it takes {size_bytes:,} bytes with its headers, the limit is {MAX_ACTIVATION_BYTES:,}; "
            "put the data where the task can fetch it and pass its address",
        )


def _check_text(call: Call, what: str, value: str, max_bytes: int) -> None:
    if not value or not _fits(value, max_bytes):
        raise refusal(call, f"the {what} has 1 to {max_bytes} bytes, found {value[:50]!r}")


def _fits(value: str, max_bytes: int) -> bool:
    # A character has 4 bytes at most, so names of a usual length need not be encoded to know.
    return len(value) * 4 <= max_bytes or len(value.encode()) <= max_bytes


def _check_number(call: Call, what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise refusal(call, f"{what}: expected {low} to {high}, found {value}")


def refusal(call: Call, why: str) -> Unsendable:
    """The error that says why this call can never be sent."""
    return Unsendable(f"{call.namespace[:50]}:{call.taskname[:50]} was not scheduled: {why}")
