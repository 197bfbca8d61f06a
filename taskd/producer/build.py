"""Makes of a call the bytes that travel: a serialized TaskActivation, and the record that carries it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from taskd.log.base import Outgoing
from taskd.producer.check import check_call, check_size, refusal
from taskd.tasks.outbox import Call
from taskd.wire import envelope, parameters
from taskd.wire.protobuf import bytes_field, text_field, varint_field


def outgoing(call: Call, now_ms: int, topic: str) -> Outgoing:
    """The record of a call; `topic` for calls that name none. Keyed by id, so that copies meet in one store.

    Raises DeliveryError when the call can never be sent.
    """
    return Outgoing(topic=call.topic or topic, value=build(call, now_ms), key=call.id.encode())


def build(call: Call, now_ms: int) -> bytes:
    """The serialized TaskActivation of a call that was made at `now_ms` (wall clock).

    Raises DeliveryError when the call can never be sent: arguments that cannot be serialized, sizes
    and numbers beyond the protocol's.
    """
    try:
        check_call(call)
        body = parameters.encode(call.args, call.kwargs, call.compression_type)
        raw = _serialized(call, body, now_ms)
    except parameters.Unserializable as error:
        raise refusal(call, str(error)) from error
    except UnicodeEncodeError as error:
        raise refusal(call, f"a name or header is not valid Unicode: {error}") from error
    check_size(call, len(raw))
    return raw


def _serialized(call: Call, body: bytes, now_ms: int) -> bytes:
    out = [
        text_field(envelope.ID, call.id),
        text_field(envelope.NAMESPACE, call.namespace),
        text_field(envelope.TASKNAME, call.taskname),
    ]
    for name, value in _headers(call.headers, body).items():
        out.append(bytes_field(envelope.HEADERS, text_field(1, name) + text_field(2, value)))
    out.append(_received_at(now_ms))
    if call.max_attempts is not None or call.at_most_once:
        out.append(bytes_field(envelope.RETRY_STATE, _retry_state(call)))
    out.append(varint_field(envelope.PROCESSING_DEADLINE, call.processing_deadline_s))
    if call.expires_s is not None:
        out.append(varint_field(envelope.EXPIRES, call.expires_s))
    if call.delay_s is not None:
        out.append(varint_field(envelope.DELAY, call.delay_s))
    out.append(text_field(envelope.APPLICATION, call.application))  # present also when empty
    out.append(bytes_field(envelope.PARAMETERS, body))
    return b"".join(out)


def _headers(headers: Mapping[str, str], body: bytes) -> Mapping[str, str]:
    """The call's headers, with the truth about the parameters whatever the caller wrote there."""
    kept = dict(headers)
    kept.pop(parameters.COMPRESSION_HEADER, None)
    if parameters.is_compressed(body):
        kept[parameters.COMPRESSION_HEADER] = parameters.ZSTD
    return kept


@lru_cache(maxsize=1)  # calls that are sent together have it in common
def _received_at(now_ms: int) -> bytes:
    return bytes_field(envelope.RECEIVED_AT, envelope.timestamp(now_ms))


def _retry_state(call: Call) -> bytes:
    after = (
        envelope.ON_ATTEMPTS_EXCEEDED_DEADLETTER
        if call.dead_letter
        else envelope.ON_ATTEMPTS_EXCEEDED_DISCARD
    )
    out = varint_field(envelope.ATTEMPTS, call.attempts) if call.attempts else b""
    out += varint_field(envelope.MAX_ATTEMPTS, call.max_attempts or 0)
    out += varint_field(envelope.ON_ATTEMPTS_EXCEEDED, after)
    out += varint_field(envelope.AT_MOST_ONCE, call.at_most_once)
    if call.delay_on_retry_s is not None:
        out += varint_field(envelope.DELAY_ON_RETRY, call.delay_on_retry_s)
    return out
