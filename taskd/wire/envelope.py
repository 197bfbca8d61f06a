"""Reads what the broker and the child need from a serialized TaskActivation, without building a message.

Last value wins, as protobuf demands, unknown fields are passed over, and so is a field whose wire
type is not the schema's. Absurd numbers are brought into range here, in one place: durations end at
`MAX_DURATION_S`, unknown enum values count as unspecified, a time before 1970 is 1970.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from taskd.errors import Undecodable
from taskd.wire.protobuf import (
    LENGTH,
    VARINT,
    bytes_field,
    fields,
    read_varint,
    signed,
    text_field,
    varint_field,
)

# Field numbers of sentry_protos.taskbroker.v1.TaskActivation
ID, NAMESPACE, TASKNAME, PARAMETERS_JSON, HEADERS, RECEIVED_AT, RETRY_STATE = 1, 2, 3, 4, 5, 6, 7
PROCESSING_DEADLINE, EXPIRES, DELAY, APPLICATION, PARAMETERS = 8, 9, 11, 12, 13
# ... and of RetryState
ATTEMPTS, MAX_ATTEMPTS, ON_ATTEMPTS_EXCEEDED, AT_MOST_ONCE, DELAY_ON_RETRY = 1, 2, 3, 4, 5

ON_ATTEMPTS_EXCEEDED_DISCARD = 1
ON_ATTEMPTS_EXCEEDED_DEADLETTER = 2

MAX_DURATION_S = 100 * 366 * 86_400  # a hundred years; sums with a time of day stay far inside 64 bits
MAX_TIMESTAMP_S = 253_402_300_799  # end of the year 9999, the last a protobuf Timestamp may name
MAX_ID_BYTES = 1_024
MAX_NAME_BYTES = 1_024
UINT32_MAX = 2**32 - 1


@dataclass(slots=True)
class Envelope:
    """The fields that decide an activation's way. Durations in seconds; `received_at_ms` is wall clock.

    Without a policy in its retry state, an activation that fails is discarded and at_most_once is off.
    """

    id: str = ""
    namespace: str = ""
    taskname: str = ""
    application: str = ""
    received_at_ms: int | None = None
    processing_deadline_s: int = 0
    expires_s: int | None = None
    delay_s: int | None = None
    has_retry_state: bool = False
    attempts: int = 0
    max_attempts: int = 0
    dead_letter: bool = False
    at_most_once: bool = False
    delay_on_retry_s: int | None = None
    on_attempts_exceeded: int = 0


@dataclass(slots=True)
class CallBody(Envelope):
    """An envelope with what the child needs to make the call."""

    headers: dict[str, str] = field(default_factory=dict)
    parameters_bytes: bytes = b""
    parameters_json: str = ""


E = TypeVar("E", bound=Envelope)


def scan(raw: bytes) -> Envelope:
    """The envelope of a serialized activation.

    Raises Undecodable when the bytes are not a TaskActivation, or lack an id or a task name.
    """
    return _usual(Envelope, raw, _OF_CALLS, {}, []) or _any(raw)


def _any(raw: bytes) -> Envelope:
    envelope = Envelope()
    for number, wire_type, value, _, _ in fields(raw):
        _read(envelope, number, wire_type, value)
    return _checked(envelope)


# Each field's number with its wire type: the first byte of the field.
_ID, _NAMESPACE, _TASKNAME, _HEADERS = 0x0A, 0x12, 0x1A, 0x2A
_RECEIVED_AT, _RETRY_STATE, _APPLICATION, _PARAMETERS = 0x32, 0x3A, 0x62, 0x6A
_PROCESSING_DEADLINE, _EXPIRES, _DELAY = 0x40, 0x48, 0x58
_ENTRY_NAME, _ENTRY_VALUE = 0x0A, 0x12  # of a header
_PARAMETERS_JSON = 0x22
_OF_CALLS = frozenset(
    (_HEADERS, _PARAMETERS, _PARAMETERS_JSON)
)  # they may be long, and the broker needs none
_NOTHING: frozenset[int] = frozenset()
_LONGEST_NAME = max(MAX_ID_BYTES, MAX_NAME_BYTES)


def _usual(
    kind: type[E], raw: bytes, passed_over: frozenset[int], found: dict[int, Any], more_headers: list[bytes]
) -> E | None:
    """In one pass, because every record of the log comes here; None: it has something unusual.

    Unusual is a field that comes twice, has a number beyond 15 or a fixed width, and whatever is not right.
    Fields are put into `found` by their first byte; of headers all but the first into `more_headers`.
    """
    position, stop = 0, len(raw)
    try:
        while position < stop:
            key = raw[position]
            size = raw[position + 1]  # or the value of a number
            begin = position + 2
            if size > 0x7F:
                size, begin = read_varint(raw, position + 1, stop)
            wire_type = key & 7
            if wire_type == LENGTH:
                position = begin + size
                if key not in passed_over:
                    if key not in found and (size <= _LONGEST_NAME or key in _OF_CALLS):
                        found[key] = raw[begin:position]
                    elif key == _HEADERS:
                        more_headers.append(raw[begin:position])
                    else:
                        return None
            elif wire_type == VARINT and key not in found:
                position = begin
                found[key] = size
            else:
                return None
            if not 8 <= key <= 0x7F:
                return None
        return _envelope(kind, found) if position == stop else None
    except (IndexError, Undecodable, UnicodeDecodeError):
        return None


def _envelope(kind: type[E], found: dict[int, Any]) -> E | None:
    """Of fields by their first byte, each of which was found once."""
    id_: bytes = found.get(_ID, b"")
    taskname: bytes = found.get(_TASKNAME, b"")
    if not id_ or not taskname:
        return None
    received_at = found.get(_RECEIVED_AT)
    expires_s = found.get(_EXPIRES)
    delay_s = found.get(_DELAY)
    envelope = kind(
        id_.decode(),
        found.get(_NAMESPACE, b"").decode(),
        taskname.decode(),
        found.get(_APPLICATION, b"").decode(),
        None if received_at is None else _usual_timestamp_ms(received_at),
        min(found.get(_PROCESSING_DEADLINE, 0), MAX_DURATION_S),
        None if expires_s is None else min(expires_s, MAX_DURATION_S),
        None if delay_s is None else min(delay_s, MAX_DURATION_S),
    )
    if _RETRY_STATE in found:
        _read_retry_state(envelope, found[_RETRY_STATE])
        _checked(envelope)
    return envelope


def scan_call(raw: bytes) -> CallBody:
    """The envelope, headers and still encoded parameters of a serialized activation; raises as `scan`."""
    found: dict[int, Any] = {}
    more_headers: list[bytes] = []
    body = _usual(CallBody, raw, _NOTHING, found, more_headers)
    if body is None:
        return _any_call(raw)
    body.parameters_bytes = found.get(_PARAMETERS, b"")
    if _PARAMETERS_JSON in found:
        body.parameters_json = _text(found[_PARAMETERS_JSON], "parameters")
    if _HEADERS in found:
        body.headers.update(map(_map_entry, (found[_HEADERS], *more_headers)))
    return body


def _any_call(raw: bytes) -> CallBody:
    body = CallBody()
    for number, wire_type, value, _, _ in fields(raw):
        if wire_type != LENGTH:
            _read(body, number, wire_type, value)
            continue
        assert isinstance(value, bytes)
        if number == PARAMETERS:
            body.parameters_bytes = value
        elif number == PARAMETERS_JSON:
            body.parameters_json = _text(value, "parameters")
        elif number == HEADERS:
            name, content = _map_entry(value)
            body.headers[name] = content
        else:
            _read(body, number, wire_type, value)
    _checked(body)
    return body


def _read(envelope: Envelope, number: int, wire_type: int, value: int | bytes) -> None:
    if wire_type == LENGTH:
        assert isinstance(value, bytes)
        if number == ID:
            envelope.id = _name(value, "id", MAX_ID_BYTES)
        elif number == NAMESPACE:
            envelope.namespace = _name(value, "namespace", MAX_NAME_BYTES)
        elif number == TASKNAME:
            envelope.taskname = _name(value, "taskname", MAX_NAME_BYTES)
        elif number == APPLICATION:
            envelope.application = _name(value, "application", MAX_NAME_BYTES)
        elif number == RECEIVED_AT:
            envelope.received_at_ms = _timestamp_ms(value, envelope.received_at_ms)
        elif number == RETRY_STATE:
            _read_retry_state(envelope, value)
    elif wire_type == VARINT:
        assert isinstance(value, int)
        if number == PROCESSING_DEADLINE:
            envelope.processing_deadline_s = min(value, MAX_DURATION_S)
        elif number == EXPIRES:
            envelope.expires_s = min(value, MAX_DURATION_S)
        elif number == DELAY:
            envelope.delay_s = min(value, MAX_DURATION_S)


def _read_retry_state(envelope: Envelope, raw: bytes) -> None:
    envelope.has_retry_state = True
    for number, wire_type, value, _, _ in fields(raw):
        if wire_type != VARINT:
            continue
        assert isinstance(value, int)
        if number == ATTEMPTS:
            envelope.attempts = value & UINT32_MAX
        elif number == MAX_ATTEMPTS:
            envelope.max_attempts = value & UINT32_MAX
        elif number == ON_ATTEMPTS_EXCEEDED:
            envelope.on_attempts_exceeded = value & UINT32_MAX
        elif number == AT_MOST_ONCE:
            envelope.at_most_once = value != 0
        elif number == DELAY_ON_RETRY:
            envelope.delay_on_retry_s = min(value, MAX_DURATION_S)


def _checked(envelope: Envelope) -> Envelope:
    if not envelope.id:
        raise Undecodable("the activation has no id")
    if not envelope.taskname:
        raise Undecodable("the activation has no task name")
    policy = envelope.on_attempts_exceeded
    envelope.dead_letter = policy == ON_ATTEMPTS_EXCEEDED_DEADLETTER
    if policy not in (ON_ATTEMPTS_EXCEEDED_DISCARD, ON_ATTEMPTS_EXCEEDED_DEADLETTER):
        envelope.at_most_once = False
    return envelope


def _name(value: bytes, name: str, limit_bytes: int) -> str:
    if len(value) > limit_bytes:
        raise Undecodable(f"the {name} has {len(value)} bytes, at most {limit_bytes} are taken")
    return _text(value, name)


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Undecodable(f"the {name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _usual_timestamp_ms(raw: bytes) -> int:
    """Of a timestamp alone, with both of its fields in order where possible."""
    if len(raw) == 12:  # three in four are: both numbers of five bytes, which are read without a loop
        first, a, b, c, d, e, second, v, w, x, y, z = raw
        if first == 0x08 and second == 0x10 and a & b & c & d & v & w & x & y & 0x80 and (e | z) < 0x80:
            seconds = a & 0x7F | (b & 0x7F) << 7 | (c & 0x7F) << 14 | (d & 0x7F) << 21 | e << 28
            nanos = v & 0x7F | (w & 0x7F) << 7 | (x & 0x7F) << 14 | (y & 0x7F) << 21 | z << 28
            if nanos < 1_000_000_000:
                return seconds * 1000 + nanos // 1_000_000
    if len(raw) > 2 and raw[0] == 0x08:
        seconds, behind = read_varint(raw, 1, len(raw))
        if raw[behind : behind + 1] == b"\x10" and seconds <= MAX_TIMESTAMP_S:
            nanos, behind = read_varint(raw, behind + 1, len(raw))
            if behind == len(raw) and nanos < 1_000_000_000:
                return seconds * 1000 + nanos // 1_000_000
    return _timestamp_ms(raw, None)


def _timestamp_ms(raw: bytes, before_ms: int | None) -> int:
    seconds, nanos = divmod(before_ms or 0, 1000)
    nanos *= 1_000_000
    for number, wire_type, value, _, _ in fields(raw):
        if wire_type == VARINT and number == 1:
            assert isinstance(value, int)
            seconds = signed(value)
        elif wire_type == VARINT and number == 2:
            assert isinstance(value, int)
            nanos = max(signed(value), 0)
    return min(max(seconds, 0), MAX_TIMESTAMP_S) * 1000 + min(nanos, 999_999_999) // 1_000_000


def _map_entry(raw: bytes) -> tuple[str, str]:
    if (
        len(raw) > 3 and raw[0] == _ENTRY_NAME and raw[1] < min(len(raw) - 3, 0x80)
    ):  # the usual: both, and both short
        middle = 2 + raw[1]
        if raw[middle] == _ENTRY_VALUE and raw[middle + 1] == len(raw) - middle - 2 < 0x80:
            return _text(raw[2:middle], "headers"), _text(raw[middle + 2 :], "headers")
    name = content = ""
    for number, wire_type, value, _, _ in fields(raw):
        if wire_type == LENGTH:
            assert isinstance(value, bytes)
            if number == 1:
                name = _text(value, "headers")
            elif number == 2:
                content = _text(value, "headers")
    return name, content


def timestamp(at_ms: int) -> bytes:
    """A serialized google.protobuf.Timestamp."""
    seconds, rest_ms = divmod(at_ms, 1000)
    return (varint_field(1, seconds) if seconds else b"") + (
        varint_field(2, rest_ms * 1_000_000) if rest_ms else b""
    )


def next_attempt(
    raw: bytes,
    *,
    new_id: str,
    received_at_ms: int,
    max_attempts: int | None = None,
    delay_on_retry_s: int | None = None,
) -> bytes:
    """The retry of a serialized activation: a new one that differs where a retry must, and nowhere else.

    New id, attempts + 1, received now, delayed by delay_on_retry (not at all when that is absent);
    `max_attempts` and `delay_on_retry_s` replace the stored ones. Fields unknown to us survive.
    """
    kept = bytearray()
    old_state = bytearray()
    for number, wire_type, value, start, end in fields(raw):
        if number == RETRY_STATE and wire_type == LENGTH:
            assert isinstance(value, bytes)
            old_state += value  # parts of one message, merged by concatenation
        elif number not in (ID, RECEIVED_AT, DELAY):
            kept += raw[start:end]
    state, delay_s = _next_retry_state(bytes(old_state), max_attempts, delay_on_retry_s)
    delay = b"" if delay_s is None else varint_field(DELAY, delay_s)
    return (
        text_field(ID, new_id)
        + bytes(kept)
        + bytes_field(RECEIVED_AT, timestamp(received_at_ms))
        + bytes_field(RETRY_STATE, state)
        + delay
    )


def with_received_at(raw: bytes, received_at_ms: int) -> bytes:
    """The same activation; one that does not say when it was received says it now.

    So its delay and its expiry count from then on, wherever it is read again.
    """
    if any(number == RECEIVED_AT for number, *_ in fields(raw)):
        return raw
    return raw + bytes_field(RECEIVED_AT, timestamp(received_at_ms))


def _next_retry_state(
    raw: bytes, max_attempts: int | None, delay_on_retry_s: int | None
) -> tuple[bytes, int | None]:
    kept = bytearray()
    attempts = 0
    delay_s = delay_on_retry_s
    for number, wire_type, value, start, end in fields(raw):
        if number == ATTEMPTS and wire_type == VARINT:
            assert isinstance(value, int)
            attempts = value & UINT32_MAX
        elif number == MAX_ATTEMPTS and max_attempts is not None:
            continue
        elif number == DELAY_ON_RETRY and wire_type == VARINT:
            assert isinstance(value, int)
            if delay_on_retry_s is None:
                delay_s = min(value, MAX_DURATION_S)
                kept += raw[start:end]
        else:
            kept += raw[start:end]
    state = varint_field(ATTEMPTS, min(attempts + 1, UINT32_MAX)) + bytes(kept)
    if max_attempts is not None:
        state += varint_field(MAX_ATTEMPTS, max_attempts)
    if delay_on_retry_s is not None:
        state += varint_field(DELAY_ON_RETRY, delay_on_retry_s)
    return state, delay_s
