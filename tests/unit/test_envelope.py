"""The envelope's scan against the generated messages, the contract, and noise."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import betterproto2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskd.errors import Undecodable
from taskd.wire.envelope import (
    MAX_DURATION_S,
    MAX_ID_BYTES,
    MAX_NAME_BYTES,
    CallBody,
    Envelope,
    _any,
    _any_call,
    _timestamp_ms,
    _usual_timestamp_ms,
    next_attempt,
    scan,
    scan_call,
    timestamp,
)
from taskd.wire.generated.sentry_protos.taskbroker.v1 import OnAttemptsExceeded, RetryState, TaskActivation
from taskd.wire.protobuf import (
    UINT64_MAX,
    bytes_field,
    fields,
    read_varint,
    signed,
    text_field,
    varint,
    varint_field,
)

pytestmark = pytest.mark.filterwarnings("ignore:TaskActivation.parameters is deprecated")
unhurried = settings(deadline=None)  # a busy machine is no failure

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DISCARD, DEADLETTER = OnAttemptsExceeded.DISCARD, OnAttemptsExceeded.DEADLETTER
MINIMAL = text_field(1, "id") + text_field(3, "task")
SECOND = 1_000

texts = st.text(max_size=20)
names = st.text(min_size=1, max_size=20)
uint32 = st.integers(0, 2**32 - 1) | st.integers(0, 3)
uint64 = st.integers(0, UINT64_MAX) | st.integers(0, 3)
times = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))
retry_states = st.builds(
    RetryState,
    attempts=uint32,
    max_attempts=uint32,
    on_attempts_exceeded=st.sampled_from(OnAttemptsExceeded),
    at_most_once=st.none() | st.booleans(),
    delay_on_retry=st.none() | uint64,
)
activations = st.builds(
    TaskActivation,
    id=names,
    namespace=texts,
    taskname=names,
    parameters=texts,
    headers=st.dictionaries(texts, texts, max_size=3),
    received_at=st.none() | times,
    retry_state=st.none() | retry_states,
    processing_deadline_duration=uint64,
    expires=st.none() | uint64,
    delay=st.none() | uint64,
    application=st.none() | texts,
    parameters_bytes=st.binary(max_size=50),
)
# Fields no schema of ours has, of every wire type, small and large numbers.
unknown_fields = st.lists(
    st.sampled_from([10, 14, 15, 16, 99, 2_000, 536_870_911]).flatmap(
        lambda number: st.one_of(
            uint64.map(lambda value: varint_field(number, value)),
            st.binary(max_size=20).map(lambda value: bytes_field(number, value)),
            st.binary(min_size=8, max_size=8).map(lambda value: varint(number << 3 | 1) + value),
            st.binary(min_size=4, max_size=4).map(lambda value: varint(number << 3 | 5) + value),
        )
    ),
    max_size=3,
)


def milliseconds(at: datetime) -> int:
    return (at - EPOCH) // timedelta(milliseconds=1)


def clamped(seconds: int | None) -> int | None:
    return None if seconds is None else min(seconds, MAX_DURATION_S)


def expected(message: TaskActivation) -> Envelope:
    """What the scan is to read of a message."""
    state = message.retry_state or RetryState()
    policy = int(state.on_attempts_exceeded)
    return Envelope(
        id=message.id,
        namespace=message.namespace,
        taskname=message.taskname,
        application=message.application or "",
        received_at_ms=None if message.received_at is None else milliseconds(message.received_at),
        processing_deadline_s=min(message.processing_deadline_duration, MAX_DURATION_S),
        expires_s=clamped(message.expires),
        delay_s=clamped(message.delay),
        has_retry_state=message.retry_state is not None,
        attempts=state.attempts,
        max_attempts=state.max_attempts,
        dead_letter=policy == DEADLETTER,
        at_most_once=bool(state.at_most_once) and policy in (DISCARD, DEADLETTER),
        delay_on_retry_s=clamped(state.delay_on_retry),
        on_attempts_exceeded=policy,
    )


def envelope_of(body: CallBody) -> Envelope:
    return Envelope(*(getattr(body, name) for name in Envelope.__slots__))


@unhurried
@given(activations)
def test_scan_reads_what_the_message_says(message: TaskActivation) -> None:
    raw = bytes(message)
    assert scan(raw) == expected(message)
    body = scan_call(raw)
    assert envelope_of(body) == expected(message)
    assert body.headers == message.headers
    assert body.parameters_bytes == message.parameters_bytes
    assert body.parameters_json == message.parameters


@unhurried
@given(activations, st.data())
def test_order_of_fields_and_unknown_ones_do_not_matter(message: TaskActivation, data: st.DataObject) -> None:
    raw = bytes(message)
    parts = [raw[start:end] for *_, start, end in fields(raw)] + data.draw(unknown_fields)
    assert scan(b"".join(data.draw(st.permutations(parts)))) == expected(message)


@unhurried
@given(activations, activations)
def test_the_last_value_wins_and_sub_messages_merge(first: TaskActivation, second: TaskActivation) -> None:
    raw = bytes(first) + bytes(second)
    envelope, body = scan(raw), scan_call(raw)
    assert (envelope.id, envelope.taskname) == (second.id, second.taskname)
    assert envelope.namespace == (second.namespace or first.namespace)  # '' is left out of a message
    assert body.headers == {**first.headers, **second.headers}
    for name in ("expires", "delay"):
        latest = getattr(first, name) if getattr(second, name) is None else getattr(second, name)
        assert getattr(envelope, f"{name}_s") == clamped(latest)
    old, new = first.retry_state, second.retry_state
    assert envelope.has_retry_state is (old is not None or new is not None)
    old, new = old or RetryState(), new or RetryState()
    assert envelope.attempts == (new.attempts or old.attempts)
    latest = old.delay_on_retry if new.delay_on_retry is None else new.delay_on_retry
    assert envelope.delay_on_retry_s == clamped(latest)


def test_parts_of_a_sub_message_merge() -> None:
    raw = MINIMAL + b"".join(
        [
            bytes_field(7, varint_field(1, 4) + varint_field(3, 2)),
            bytes_field(7, varint_field(2, 9)),
            bytes_field(6, varint_field(1, 1_700_000_000)),
            bytes_field(6, varint_field(2, 5_000_000)),
        ]
    )
    envelope = scan(raw)
    assert (envelope.attempts, envelope.max_attempts, envelope.dead_letter) == (4, 9, True)
    assert envelope.received_at_ms == 1_700_000_000_005


def test_absent_and_empty_differ() -> None:
    absent = scan(MINIMAL)
    assert absent == Envelope(id="id", taskname="task")
    parts = [text_field(12, ""), bytes_field(6, b""), bytes_field(7, b""), varint_field(9, 0)]
    empty = scan(MINIMAL + b"".join(parts) + varint_field(11, 0))
    assert (empty.application, empty.received_at_ms, empty.has_retry_state) == ("", 0, True)
    assert (empty.expires_s, empty.delay_s) == (0, 0)


@pytest.mark.parametrize(
    ("policy", "dead_letter", "at_most_once"),
    [(None, False, False), (0, False, False), (1, False, True), (2, True, True), (3, False, False),
     (2**31, False, False), (UINT64_MAX, False, False)],
)  # fmt: skip
def test_without_a_policy_it_is_discarded_and_at_most_once_is_off(
    policy: int | None, dead_letter: bool, at_most_once: bool
) -> None:
    state = varint_field(4, 1) + (b"" if policy is None else varint_field(3, policy))
    envelope = scan(MINIMAL + bytes_field(7, state))
    assert (envelope.dead_letter, envelope.at_most_once) == (dead_letter, at_most_once)


@pytest.mark.parametrize(
    ("seconds", "nanos", "expected_ms"),
    [(0, 0, 0), (1, 999_999_999, 1_999), (-1, 0, 0), (-(2**63), 5, 0), (2**63 - 1, 0, 253_402_300_799_000),
     (5, 2**31 - 1, 5_999), (5, -1, 5_000)],
)  # fmt: skip
def test_absurd_times_come_into_range(seconds: int, nanos: int, expected_ms: int) -> None:
    at = varint_field(1, seconds & UINT64_MAX) + varint_field(2, nanos & UINT64_MAX)
    assert scan(MINIMAL + bytes_field(6, at)).received_at_ms == expected_ms


def test_a_field_of_another_wire_type_is_none_of_ours() -> None:
    odd = b"".join(
        [*(varint_field(number, 9) for number in (1, 5, 6, 7, 12, 13)),
         bytes_field(8, b"x"), bytes_field(9, b""), b"\x59" + bytes(8), b"\x65" + bytes(4)]
    )  # fmt: skip
    assert scan(MINIMAL + odd) == Envelope(id="id", taskname="task")
    assert scan_call(odd + MINIMAL) == CallBody(id="id", taskname="task")


def test_header_entries() -> None:
    def entry(*parts: bytes) -> bytes:
        return bytes_field(5, b"".join(parts))

    raw = MINIMAL + b"".join(
        [
            entry(text_field(1, "a"), text_field(2, "1")),
            entry(text_field(2, "2"), text_field(1, "a")),
            entry(text_field(1, "no value")),
            entry(text_field(2, "no name")),
            entry(text_field(1, "unknown"), varint_field(3, 4), text_field(2, "kept")),
        ]
    )
    assert scan_call(raw).headers == {"a": "2", "no value": "", "": "no name", "unknown": "kept"}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "no id"),
        (text_field(3, "task"), "no id"),
        (text_field(1, "") + text_field(3, "task"), "no id"),
        (text_field(1, "id"), "no task name"),
        (MINIMAL + b"\x0a\xff", "end in the middle"),
        (MINIMAL + b"\x0a\x05abc", "claims 5 bytes, 3 are left"),
        (MINIMAL + b"\x12\x01\xff", "namespace is not UTF-8"),
        (MINIMAL + b"\x13", "wire type 3"),
        (MINIMAL + b"\x17", "wire type 7"),
        (MINIMAL + b"\x00\x00", "field number 0"),
        (MINIMAL + b"\x80" * 11, "longer than 64 bits"),
        (MINIMAL + b"\xf8\xff\xff\xff\xff\x01\x01", "field number"),
        (MINIMAL + b"\x09\x01", "claims 8 bytes, 1 are left"),
        (MINIMAL + b"\x08", "end in the middle"),
        (MINIMAL + bytes_field(7, b"\x08"), "end in the middle"),
        (MINIMAL + text_field(1, "x" * (MAX_ID_BYTES + 1)), "the id has 1025 bytes"),
        (MINIMAL + text_field(12, "ü" * (MAX_NAME_BYTES // 2 + 1)), "the application has 1026 bytes"),
    ],
)
def test_what_is_no_activation_says_why(raw: bytes, why: str) -> None:
    for read in (scan, scan_call):
        with pytest.raises(Undecodable, match=why):
            read(raw)


def test_invalid_text_in_headers_or_parameters_is_the_childs_business() -> None:
    raw = MINIMAL + bytes_field(5, bytes_field(1, b"\xff")) + bytes_field(4, b"\xff")
    assert scan(raw).id == "id"
    with pytest.raises(Undecodable, match="not UTF-8"):
        scan_call(raw)


# ---- noise


def attempt(raw: bytes) -> None:
    for read in (scan, scan_call):
        try:
            envelope = read(raw)
        except Undecodable:
            continue
        assert envelope.id
        assert 0 <= envelope.processing_deadline_s <= MAX_DURATION_S
        next_attempt(raw, new_id="new", received_at_ms=0)


@unhurried
@given(st.binary(max_size=200))
def test_random_bytes(raw: bytes) -> None:
    attempt(raw)


@unhurried
@given(activations, st.data())
def test_truncated_messages(message: TaskActivation, data: st.DataObject) -> None:
    raw = bytes(message)
    attempt(raw[: data.draw(st.integers(0, len(raw)))])


@unhurried
@given(activations, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5))
def test_mutated_messages(message: TaskActivation, mutations: list[tuple[int, int]]) -> None:
    raw = bytearray(bytes(message))
    for position, byte in mutations:
        raw[position % len(raw)] = byte
    attempt(bytes(raw))


def test_nesting_and_length_cost_no_more_than_their_bytes() -> None:
    nested = b""
    for _ in range(2_000):
        nested = bytes_field(7, nested)
    attempt(MINIMAL + nested)
    attempt(MINIMAL + b"\x38\x00" * 200_000)
    attempt(MINIMAL + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")


# ---- the next attempt


@unhurried
@given(
    activations,
    unknown_fields,
    unknown_fields,
    st.none() | uint32,
    st.none() | st.integers(0, MAX_DURATION_S),
    st.integers(0, 253_402_300_799_000),
)
def test_the_next_attempt_differs_where_it_must_and_nowhere_else(
    message: TaskActivation,
    unknown: list[bytes],
    unknown_in_state: list[bytes],
    max_attempts: int | None,
    delay_on_retry_s: int | None,
    now_ms: int,
) -> None:
    raw = bytes(message) + b"".join(unknown)
    if unknown_in_state:
        raw += bytes_field(7, b"".join(unknown_in_state))
        message.retry_state = message.retry_state or RetryState()
    retry = next_attempt(
        raw,
        new_id="new",
        received_at_ms=now_ms,
        max_attempts=max_attempts,
        delay_on_retry_s=delay_on_retry_s,
    )
    old, new = expected(message), scan(retry)
    assert new.id == "new"
    assert new.received_at_ms == now_ms
    assert new.has_retry_state
    assert new.attempts == min(old.attempts + 1, 2**32 - 1)
    assert new.max_attempts == (old.max_attempts if max_attempts is None else max_attempts)
    assert new.delay_on_retry_s == (old.delay_on_retry_s if delay_on_retry_s is None else delay_on_retry_s)
    assert new.delay_s == new.delay_on_retry_s
    for name in ("namespace", "taskname", "application", "processing_deadline_s", "expires_s", "dead_letter",
                 "at_most_once", "on_attempts_exceeded"):  # fmt: skip
        assert getattr(new, name) == getattr(old, name)
    body = scan_call(retry)
    assert (body.headers, body.parameters_bytes) == (message.headers, message.parameters_bytes)
    parts = [retry[start:end] for *_, start, end in fields(retry)]
    for part in unknown:
        assert part in parts
    (state,) = [value for number, _, value, _, _ in fields(retry) if number == 7]
    assert isinstance(state, bytes)
    state_parts = [state[start:end] for *_, start, end in fields(state)]
    for part in unknown_in_state:
        assert part in state_parts
    parsed = TaskActivation.parse(retry)
    assert (parsed.id, parsed.taskname) == ("new", message.taskname)
    assert parsed.application == message.application  # absent stays absent


def test_the_countdown_is_not_repeated() -> None:
    raw = bytes(TaskActivation(id="a", taskname="t", delay=60, expires=90))
    retry = TaskActivation.parse(next_attempt(raw, new_id="b", received_at_ms=1_500))
    assert (retry.delay, retry.expires) == (None, 90)
    assert retry.received_at == EPOCH + timedelta(milliseconds=1_500)
    assert retry.retry_state == RetryState(attempts=1)


def test_a_delay_on_retry_of_nothing_is_kept() -> None:
    raw = bytes(TaskActivation(id="a", taskname="t", retry_state=RetryState(delay_on_retry=5)))
    retry = TaskActivation.parse(next_attempt(raw, new_id="b", received_at_ms=0, delay_on_retry_s=0))
    assert retry.delay == 0
    assert retry.retry_state is not None
    assert retry.retry_state.delay_on_retry == 0


def test_an_unknown_policy_survives() -> None:
    raw = MINIMAL + bytes_field(7, varint_field(3, 7) + varint_field(1, 1))
    assert scan(next_attempt(raw, new_id="b", received_at_ms=0)).on_attempts_exceeded == 7


def test_the_next_attempt_of_what_cannot_be_read() -> None:
    with pytest.raises(Undecodable):
        next_attempt(b"\x0a\xff", new_id="b", received_at_ms=0)


# ---- the wire format itself


@unhurried
@given(uint64)
def test_varints(value: int) -> None:
    assert varint(value) == betterproto2.encode_varint(value)
    assert read_varint(varint(value), 0, 10) == (value, len(varint(value)))


@unhurried
@given(st.integers(-(2**63), 2**63 - 1))
def test_signed(value: int) -> None:
    assert signed(value & UINT64_MAX) == value


@unhurried
@given(st.integers(0, 253_402_300_799_999))
def test_timestamps(at_ms: int) -> None:
    message = TaskActivation(received_at=EPOCH + timedelta(milliseconds=at_ms))
    assert bytes_field(6, timestamp(at_ms)) == bytes(message)


def test_a_stretch_of_the_bytes() -> None:
    raw = varint_field(1, 300) + text_field(2, "ab") + varint_field(3, 1)
    inner = len(varint_field(1, 300))
    assert list(fields(raw, inner, inner + 4)) == [(2, 2, b"ab", inner, inner + 4)]
    with pytest.raises(Undecodable):
        list(fields(raw, 0, inner + 3))
    with pytest.raises(Undecodable):
        list(fields(raw, 0, 2))


def read_by(scanning: Callable[[bytes], Envelope], raw: bytes) -> Envelope | None:
    try:
        return scanning(raw)
    except Undecodable:
        return None


@unhurried
@given(activations, st.data())
def test_the_short_way_of_scanning_is_the_long_one(message: TaskActivation, data: st.DataObject) -> None:
    raw = bytes(message)
    for damaged in (raw, raw[: data.draw(st.integers(0, len(raw)))], raw + data.draw(st.binary(max_size=6))):
        assert read_by(scan, damaged) == read_by(_any, damaged)
        assert read_by(scan_call, damaged) == read_by(_any_call, damaged)


@given(st.integers(0, 2**36), st.integers(0, 2**35), st.binary(max_size=2))
def test_the_short_ways_of_reading_a_timestamp_are_the_long_one(
    seconds: int, nanos: int, more: bytes
) -> None:
    raw = varint_field(1, seconds) + varint_field(2, nanos) + more

    def read(reading: Callable[[], int]) -> int | None:
        try:
            return reading()
        except Undecodable:
            return None

    assert read(lambda: _usual_timestamp_ms(raw)) == read(lambda: _timestamp_ms(raw, None))
