"""The unary service's requests and replies, coded by hand, against the generated messages and noise."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskd.errors import Undecodable
from taskd.wire import consumer
from taskd.wire.consumer import (
    Filter,
    StatusUpdate,
    decode_filter,
    decode_status_batch,
    decode_status_update,
    decode_task,
    encode_filter,
    encode_status_batch,
    encode_status_update,
    encode_task,
)
from taskd.wire.envelope import MAX_DURATION_S
from taskd.wire.generated.sentry_protos.taskbroker.v1 import (
    FetchNextTask,
    GetTaskRequest,
    GetTaskResponse,
    PushTaskRequest,
    SetBatchActivationStatusRequest,
    SetTaskStatusRequest,
    SetTaskStatusResponse,
    TaskActivation,
    TaskActivationStatus,
)
from taskd.wire.protobuf import UINT64_MAX, bytes_field, text_field, varint_field
from taskd.wire.pushing import decode_push, encode_push

unhurried = settings(deadline=None)  # a busy machine is no failure

texts = st.text(max_size=20)
filters = st.builds(Filter, st.none() | texts, st.none() | texts)
updates = st.builds(
    StatusUpdate,
    id=texts,
    status=st.sampled_from([status.value for status in TaskActivationStatus]),
    fetch_next=st.none() | filters,
    max_attempts=st.none() | st.integers(0, 2**32 - 1),
    delay_on_retry_s=st.none() | st.integers(0, MAX_DURATION_S),
)


def message(update: StatusUpdate) -> SetTaskStatusRequest:
    wanted = update.fetch_next
    return SetTaskStatusRequest(
        id=update.id,
        status=TaskActivationStatus(update.status),
        fetch_next_task=None
        if wanted is None
        else FetchNextTask(namespace=wanted.namespace, application=wanted.application),
        max_attempts=update.max_attempts,
        delay_on_retry=update.delay_on_retry_s,
    )


@unhurried
@given(filters)
def test_a_filter(wanted: Filter) -> None:
    for kind in (GetTaskRequest, FetchNextTask):
        request = kind(namespace=wanted.namespace, application=wanted.application)
        assert decode_filter(bytes(request)) == wanted
        assert kind.parse(encode_filter(wanted)) == request


@unhurried
@given(updates)
def test_a_status_update(update: StatusUpdate) -> None:
    assert decode_status_update(bytes(message(update))) == update
    assert SetTaskStatusRequest.parse(encode_status_update(update)) == message(update)


@unhurried
@given(st.lists(updates, max_size=5))
def test_a_batch_of_status_updates(batch: list[StatusUpdate]) -> None:
    request = SetBatchActivationStatusRequest(updates=[message(update) for update in batch])
    assert decode_status_batch(bytes(request)) == batch
    assert SetBatchActivationStatusRequest.parse(encode_status_batch(batch)) == request


@pytest.mark.parametrize("kind", [GetTaskResponse, SetTaskStatusResponse])
def test_a_task_is_embedded_as_it_is(kind: type[GetTaskResponse | SetTaskStatusResponse]) -> None:
    activation = TaskActivation(id="a", taskname="t", application="")
    raw = bytes(activation) + text_field(99, "unknown to us")
    reply = encode_task(raw)
    assert reply.endswith(raw)
    parsed = kind.parse(reply).task
    assert parsed is not None
    assert (parsed.id, parsed.taskname, parsed.application) == ("a", "t", "")
    assert encode_task(None) == bytes(kind())
    assert decode_task(reply) == raw
    assert decode_task(bytes(kind(task=activation))) == bytes(activation)
    assert decode_task(bytes(kind())) is None
    assert decode_task(bytes_field(1, b"")) == b""
    with pytest.raises(Undecodable):
        decode_task(reply[:-1])


def test_what_is_pushed_is_embedded_as_it_is() -> None:
    raw = bytes(TaskActivation(id="a", taskname="t")) + text_field(99, "unknown to us")
    assert decode_push(encode_push(raw)) == raw
    request = bytes(PushTaskRequest(task=TaskActivation(id="a", taskname="t"))) + text_field(2, "http://old")
    assert decode_push(request) == bytes(TaskActivation(id="a", taskname="t"))
    for nothing in (b"", text_field(2, "http://old"), encode_push(raw)[:-1]):
        with pytest.raises(Undecodable):
            decode_push(nothing)


def test_statuses_are_those_of_the_contract() -> None:
    assert consumer.FAILURE == TaskActivationStatus.FAILURE
    assert consumer.RETRY == TaskActivationStatus.RETRY
    assert consumer.COMPLETE == TaskActivationStatus.COMPLETE


def test_absent_and_empty_differ() -> None:
    assert decode_filter(b"") == Filter(None, None)
    assert decode_filter(text_field(2, "")) == Filter(None, "")
    assert decode_status_update(b"") == StatusUpdate()
    assert decode_status_update(bytes_field(3, b"")).fetch_next == Filter()


def test_the_last_value_wins_and_parts_of_a_filter_merge() -> None:
    raw = text_field(1, "a") + text_field(1, "b") + bytes_field(3, text_field(1, "ns"))
    raw += bytes_field(3, text_field(2, "app")) + varint_field(2, 3) + varint_field(2, 5)
    assert decode_status_update(raw) == StatusUpdate("b", 5, Filter("ns", "app"))


def test_absurd_numbers_come_into_range() -> None:
    raw = b"".join(varint_field(number, UINT64_MAX) for number in (2, 4, 5))
    update = decode_status_update(raw)
    assert (update.status, update.max_attempts, update.delay_on_retry_s) == (
        2**32 - 1,
        2**32 - 1,
        MAX_DURATION_S,
    )


def test_what_is_not_the_schemas_is_passed_over() -> None:
    odd = varint_field(1, 1) + bytes_field(2, b"x") + varint_field(3, 1) + text_field(99, "new")
    assert decode_status_update(text_field(1, "a") + odd) == StatusUpdate("a")
    assert decode_filter(varint_field(1, 1) + text_field(3, "x")) == Filter()
    assert decode_status_batch(varint_field(1, 1) + text_field(2, "x")) == []


@pytest.mark.parametrize("raw", [text_field(1, "a")[:-1], bytes_field(1, b"\xff"), b"\x00", b"\x0b"])
def test_what_is_no_request(raw: bytes) -> None:
    for decode in (decode_filter, decode_status_update):
        with pytest.raises(Undecodable):
            decode(raw)
    with pytest.raises(Undecodable):
        decode_status_batch(bytes_field(1, raw))


@unhurried
@given(
    st.binary(max_size=100) | updates.map(lambda update: bytes(message(update))),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=5),
    st.integers(0, 10_000),
)
def test_noise(raw: bytes, mutations: list[tuple[int, int]], length: int) -> None:
    mutated = bytearray(raw or b"\x00")
    for position, byte in mutations:
        mutated[position % len(mutated)] = byte
    noisy = bytes(mutated)
    for request in (noisy, noisy[: length % len(noisy)], bytes_field(1, noisy)):
        for decode in (decode_filter, decode_status_update, decode_status_batch, decode_task, decode_push):
            try:
                decode(request)
            except Undecodable:
                continue
