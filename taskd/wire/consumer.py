"""Requests and replies of `sentry_protos.taskbroker.v1.ConsumerService`, coded by hand.

A reply embeds the stored activation as it is, so that fields unknown to us reach the worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from taskd.errors import Undecodable
from taskd.wire.envelope import MAX_DURATION_S, UINT32_MAX
from taskd.wire.protobuf import LENGTH, VARINT, bytes_field, fields

SERVICE = "sentry_protos.taskbroker.v1.ConsumerService"
FAILURE, RETRY, COMPLETE = 3, 4, 5  # of TaskActivationStatus


@dataclass(frozen=True, slots=True)
class Filter:
    """Which task is wanted. None: any; a present empty application matches only ''."""

    namespace: str | None = None
    application: str | None = None


@dataclass(frozen=True, slots=True)
class StatusUpdate:
    """SetTaskStatusRequest. `delay_on_retry_s` in seconds."""

    id: str = ""
    status: int = 0
    fetch_next: Filter | None = None
    max_attempts: int | None = None
    delay_on_retry_s: int | None = None


def decode_filter(raw: bytes) -> Filter:
    """GetTaskRequest and FetchNextTask, which have the same fields. Raises Undecodable."""
    texts = {
        number: _text(value)
        for number, wire_type, value, _, _ in fields(raw)
        if wire_type == LENGTH and isinstance(value, bytes) and number in (1, 2)
    }
    return Filter(namespace=texts.get(1), application=texts.get(2))


def decode_status_update(raw: bytes) -> StatusUpdate:
    """SetTaskStatusRequest. Raises Undecodable."""
    id_ = ""
    status = 0
    fetch_next: bytes | None = None
    max_attempts: int | None = None
    delay_on_retry_s: int | None = None
    for number, wire_type, value, _, _ in fields(raw):
        if wire_type == LENGTH and isinstance(value, bytes):
            if number == 1:
                id_ = _text(value)
            elif number == 3:
                fetch_next = (fetch_next or b"") + value  # parts of one message, merged by concatenation
        elif wire_type == VARINT and isinstance(value, int):
            if number == 2:
                status = value & UINT32_MAX
            elif number == 4:
                max_attempts = value & UINT32_MAX
            elif number == 5:
                delay_on_retry_s = min(value, MAX_DURATION_S)
    wanted = None if fetch_next is None else decode_filter(fetch_next)
    return StatusUpdate(id_, status, wanted, max_attempts, delay_on_retry_s)


def decode_status_batch(raw: bytes) -> list[StatusUpdate]:
    """SetBatchActivationStatusRequest. Raises Undecodable."""
    return [
        decode_status_update(value)
        for number, wire_type, value, _, _ in fields(raw)
        if number == 1 and wire_type == LENGTH and isinstance(value, bytes)
    ]


def encode_task(activation: bytes | None) -> bytes:
    """GetTaskResponse and SetTaskStatusResponse, which have the same field."""
    return b"" if activation is None else bytes_field(1, activation)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Undecodable(f"a text of the request is not UTF-8: {error.reason}") from None
