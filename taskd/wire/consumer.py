"""Requests and replies of `sentry_protos.taskbroker.v1.ConsumerService`, coded by hand.

A reply embeds the stored activation as it is, so that fields unknown to us reach the worker. The broker
decodes requests and encodes replies; a worker of the plain protocol does the reverse.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from taskd.errors import Undecodable
from taskd.wire.envelope import MAX_DURATION_S, UINT32_MAX
from taskd.wire.protobuf import LENGTH, VARINT, bytes_field, fields, text_field, varint_field

SERVICE = "sentry_protos.taskbroker.v1.ConsumerService"
GET_TASK = f"/{SERVICE}/GetTask"
SET_TASK_STATUS = f"/{SERVICE}/SetTaskStatus"
SET_BATCH_STATUS = f"/{SERVICE}/SetBatchActivationStatus"
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


# ---- what a worker says and hears


def encode_filter(wanted: Filter) -> bytes:
    """GetTaskRequest and FetchNextTask. An empty text is sent too: it is not the same as none."""
    raw = b"" if wanted.namespace is None else text_field(1, wanted.namespace)
    return raw if wanted.application is None else raw + text_field(2, wanted.application)


def encode_status_update(update: StatusUpdate) -> bytes:
    """SetTaskStatusRequest."""
    raw = text_field(1, update.id) + varint_field(2, update.status)
    if update.fetch_next is not None:
        raw += bytes_field(3, encode_filter(update.fetch_next))
    if update.max_attempts is not None:
        raw += varint_field(4, update.max_attempts)
    if update.delay_on_retry_s is not None:
        raw += varint_field(5, update.delay_on_retry_s)
    return raw


def encode_status_batch(updates: Iterable[StatusUpdate]) -> bytes:
    """SetBatchActivationStatusRequest."""
    return b"".join(bytes_field(1, encode_status_update(update)) for update in updates)


def decode_task(raw: bytes) -> bytes | None:
    """The activation in a GetTaskResponse, SetTaskStatusResponse or PushTaskRequest, as it came.

    None when there is none. Raises Undecodable.
    """
    task: bytes | None = None
    for number, wire_type, value, _, _ in fields(raw):
        if number == 1 and wire_type == LENGTH and isinstance(value, bytes):
            task = (task or b"") + value  # parts of one message, merged by concatenation
    return task


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Undecodable(f"a text of the request is not UTF-8: {error.reason}") from None
