"""The protocol between worker and child: everything arrives whole, junk is refused, buffers stay small."""

from __future__ import annotations

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taskd.worker.entry_pipe as pipe

numbers = st.integers(0, 2**32)
texts = st.text(max_size=100)
optional = st.none() | numbers
verdicts = st.builds(pipe.Verdict, st.integers(1, 4), texts, texts, optional, optional)
tasks = st.builds(pipe.KnownTask, texts, texts, texts, st.booleans())
reports = st.one_of(
    st.builds(pipe.Ready, st.lists(tasks).map(tuple), st.lists(st.tuples(texts, texts)).map(tuple)),
    st.builds(pipe.Started, numbers, verdicts, st.booleans(), st.just(0.0)),
    st.builds(pipe.Done, numbers, verdicts, numbers, st.booleans()),
    st.builds(pipe.Expired, numbers),
    st.builds(pipe.Heartbeat, numbers, st.none() | st.floats(0, 1), texts),
)
seconds = st.floats(0, 1e9)
works = st.builds(pipe.Work, st.binary(), optional, numbers, seconds, st.none() | seconds)


@given(st.lists(reports), st.integers(1, 50))
def test_reports_survive_any_cutting_of_the_stream(sent: list[pipe.Report], size: int) -> None:
    stream = b"".join(map(pipe.encode_report, sent))
    splitter = pipe.Splitter(pipe.MAX_REPORT_BYTES)
    received: list[pipe.Report] = []
    for start in range(0, len(stream), size):
        splitter.feed(stream[start : start + size])
        received += map(pipe.decode_report, splitter)
    assert received == sent


@given(st.lists(st.builds(pipe.Done, numbers, st.just(pipe.COMPLETE), numbers, st.just(False)), min_size=1))
def test_reports_of_what_completed_are_read_together(sent: list[pipe.Report]) -> None:
    splitter = pipe.Splitter(pipe.MAX_REPORT_BYTES)
    stream = b"".join(map(pipe.encode_report, sent))
    assert splitter.reports(stream) == sent
    assert splitter.reports(stream[:5]) == []
    assert splitter.reports(stream[5:]) == sent
    other = pipe.Done(1, pipe.Verdict(2, "error", "why"), 5)
    assert splitter.reports(stream + pipe.encode_report(other) + stream) == [*sent, other, *sent]


@given(works)
def test_work_survives(work: pipe.Work) -> None:
    splitter = pipe.Splitter(pipe.MAX_WORK_BYTES)
    splitter.feed(pipe.encode_work(work))
    (frame,) = splitter
    assert pipe.decode_work(frame) == work


@given(st.lists(st.binary(max_size=20), min_size=1), st.integers(1, 50))
def test_frames_survive_any_cutting_of_the_stream(bodies: list[bytes], size: int) -> None:
    stream = b"".join(len(body).to_bytes(4, "big") + body for body in bodies)
    splitter = pipe.Splitter(100)
    parts = (stream[start : start + size] for start in range(0, len(stream), size))
    assert [frame for part in parts for frame in splitter.frames(part)] == bodies
    assert splitter.frames(stream) == bodies


@given(st.lists(st.builds(pipe.Order, st.sampled_from(pipe.OrderKind), st.integers(0, 2**64 - 1))))
def test_orders_survive(orders: list[pipe.Order]) -> None:
    assert pipe.decode_orders(b"".join(map(pipe.encode_order, orders))) == orders


@pytest.mark.parametrize("data", [b"x", b"\x07" + bytes(8), bytes(10)])
def test_malformed_orders_are_refused(data: bytes) -> None:
    with pytest.raises(pipe.ProtocolViolation):
        pipe.decode_orders(data)


def test_a_heartbeat_is_written_in_one_piece() -> None:
    longest = pipe.Heartbeat(2**63, 0.123456789, "\N{GRINNING FACE}" * pipe.MAX_MESSAGE_CHARACTERS)
    assert len(pipe.encode_report(longest)) <= 4_096  # PIPE_BUF of Linux


@given(st.binary())
def test_junk_raises_nothing_but_protocol_violation(junk: bytes) -> None:
    splitter = pipe.Splitter(pipe.MAX_REPORT_BYTES)
    splitter.feed(junk)
    try:
        for frame in splitter:
            pipe.decode_report(frame)
        pipe.decode_report(junk)
        pipe.Splitter(pipe.MAX_REPORT_BYTES).reports(junk)
    except pipe.ProtocolViolation:
        pass


@pytest.mark.parametrize(
    "parts",
    [
        5,
        [],
        [9, 1],
        ["x"],
        [2],
        [2, -1, [1, "", "", None, None], False],
        [2, 1, [9, "", "", None, None], False],
        [2, 1, [1, "", "", None], False],
        [2, 1, [1, 5, "", None, None], False],
        [2, 1, [1, "", "", "x", None], False],
        [3, 1, [1, "", "", None, None]],
        [1, 5, []],
        [1, ["tests:noop"], []],
        [1, [["app", "tests", "noop", 0]], []],
        [1, [], [["only one"]]],
        [[], 1],
        [5, 1, 1.5, ""],
        [5, 1, "x", ""],
        [5, 1, None, 5],
        [5, 1],
    ],
)
def test_malformed_reports_are_refused(parts: object) -> None:
    with pytest.raises(pipe.ProtocolViolation):
        pipe.decode_report(msgpack.packb(parts))


def test_a_length_above_the_limit_is_refused_at_once() -> None:
    splitter = pipe.Splitter(100)
    splitter.feed(b"\x00\x00\x00\x65")
    with pytest.raises(pipe.ProtocolViolation, match="101 bytes, at most 100"):
        list(splitter)


def test_long_errors_keep_their_end() -> None:
    text = pipe.cut("x" * 10_000 + "ValueError: why")
    assert len(text) == pipe.MAX_ERROR_CHARACTERS
    assert text.endswith("ValueError: why")
    assert pipe.cut("short") == "short"


def test_too_late() -> None:
    assert not pipe.is_too_late(pipe.Work(b""))
    assert not pipe.is_too_late(pipe.Work(b"", pipe.start_by_ns(60)))
    assert pipe.is_too_late(pipe.Work(b"", pipe.start_by_ns(-1)))
