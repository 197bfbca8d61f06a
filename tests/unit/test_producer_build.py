from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.errors import DeliveryError
from taskd.producer import check
from taskd.producer.build import build, outgoing
from taskd.tasks.outbox import Call
from taskd.wire import envelope, parameters
from taskd.wire.generated.sentry_protos.taskbroker.v1 import OnAttemptsExceeded, TaskActivation

CALL = Call("0f1e2d3c", "issues", "deliver", "monitor", "", (1,), {"group": 2})
NOW_MS = 1_767_225_600_123

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
durations = st.integers(1, check.MAX_DURATION_S)
calls = st.builds(
    Call,
    id=texts.filter(bool),
    namespace=texts.filter(bool),
    taskname=texts.filter(bool),
    application=texts,
    topic=st.just(""),
    args=st.lists(st.integers(0, 9)).map(tuple),
    kwargs=st.dictionaries(texts, st.none(), max_size=3),
    headers=st.dictionaries(texts, texts, max_size=4),
    processing_deadline_s=durations,
    expires_s=st.none() | durations,
    delay_s=st.none() | st.integers(0, 1_000_000),
    attempts=st.integers(0, 2**32 - 1),
    max_attempts=st.none() | st.integers(0, 2**32 - 1),
    dead_letter=st.booleans(),
    at_most_once=st.booleans(),
    delay_on_retry_s=st.none() | durations,
    compression_type=st.sampled_from(["plaintext", "zstd"]),
).filter(lambda call: not call.expires_s or not call.delay_s or call.expires_s > call.delay_s)


@given(call=calls, now_ms=st.integers(0, 4_102_444_800_000))
def test_the_bytes_are_a_task_activation(call: Call, now_ms: int) -> None:
    activation = TaskActivation.parse(build(call, now_ms))

    assert activation._unknown_fields == b""
    assert (activation.id, activation.namespace, activation.taskname) == (
        call.id,
        call.namespace,
        call.taskname,
    )
    assert activation.application == call.application
    assert activation.received_at is not None
    assert activation.received_at == datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(
        milliseconds=now_ms
    )
    assert activation.processing_deadline_duration == call.processing_deadline_s
    assert (activation.expires, activation.delay) == (call.expires_s, call.delay_s)
    headers = dict(activation.headers)
    assert parameters.decode(activation.parameters_bytes, None, headers) == (
        list(call.args),
        dict(call.kwargs),
    )
    assert headers.pop("compression-type", "plaintext") == call.compression_type
    assert headers == {name: value for name, value in call.headers.items() if name != "compression-type"}
    state = activation.retry_state
    if call.max_attempts is None and not call.at_most_once:
        assert state is None
        return
    assert state is not None
    assert (state.attempts, state.max_attempts) == (call.attempts, call.max_attempts or 0)
    assert (state.on_attempts_exceeded is OnAttemptsExceeded.DEADLETTER) == call.dead_letter
    assert (state.at_most_once, state.delay_on_retry) == (call.at_most_once, call.delay_on_retry_s)


@given(call=calls)
def test_the_broker_reads_what_was_meant(call: Call) -> None:
    read = envelope.scan_call(build(call, NOW_MS))
    assert (read.id, read.application, read.received_at_ms) == (call.id, call.application, NOW_MS)
    assert (read.expires_s, read.delay_s) == (call.expires_s, call.delay_s)
    assert read.at_most_once == call.at_most_once


def test_an_empty_application_is_present() -> None:
    activation = TaskActivation.parse(build(replace(CALL, application=""), NOW_MS))
    assert activation.application == ""
    assert activation.application is not None


def test_large_parameters_say_that_they_are_compressed() -> None:
    call = replace(CALL, args=("x" * 3_100_000,))
    read = envelope.scan_call(build(call, NOW_MS))
    assert read.headers == {"compression-type": "zstd"}
    assert parameters.decode(read.parameters_bytes, None, read.headers)[0] == ["x" * 3_100_000]


def test_the_caller_cannot_lie_about_the_compression() -> None:
    read = envelope.scan_call(build(replace(CALL, headers={"compression-type": "zstd", "a": "b"}), NOW_MS))
    assert read.headers == {"a": "b"}


def test_the_record_is_keyed_by_id_and_goes_to_the_calls_topic() -> None:
    record = outgoing(CALL, NOW_MS, "default")
    assert (record.topic, record.key, record.value) == ("default", b"0f1e2d3c", build(CALL, NOW_MS))
    assert outgoing(replace(CALL, topic="own"), NOW_MS, "default").topic == "own"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": ""}, "the id has 1 to 1024 bytes, found ''"),
        ({"taskname": "x" * 1025}, "the task name has 1 to 1024 bytes"),
        ({"application": "x" * 1025}, "the application has at most 1024 bytes"),
        ({"processing_deadline_s": 0}, "processing deadline: expected 1 to .*, found 0"),
        ({"delay_s": 10**12}, "delay: expected 0 to"),
        ({"max_attempts": 2**32}, "max attempts: expected 0 to 4294967295"),
        ({"expires_s": 5, "delay_s": 5}, "would expire after 5 s, before its delay of 5 s"),
        ({"args": (object(),)}, "issues:deliver was not scheduled: argument 0 cannot be sent: found object"),
        ({"headers": {"h": "x" * 10_000_000}}, "the limit is 10,000,000; put the data"),
    ],
)
def test_what_can_never_be_sent_is_refused_at_once(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DeliveryError, match=says):
        build(replace(CALL, **change), NOW_MS)


def test_text_that_is_not_unicode_is_refused() -> None:
    for change in ({"headers": {"h": "\ud800"}}, {"application": "\ud800"}, {"id": "\ud800"}):
        with pytest.raises(DeliveryError, match="Unicode"):
            build(replace(CALL, **change), NOW_MS)  # type: ignore[arg-type]
