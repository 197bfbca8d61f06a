"""The stream's frames, coded by hand, against the generated messages and noise."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskd.errors import Undecodable
from taskd.wire import frames, frames_codec
from taskd.wire.envelope import MAX_DURATION_S
from taskd.wire.frames import LeaseRef, ResultStatus
from taskd.wire.frames_codec import (
    decode_broker_frame,
    decode_worker_frame,
    encode_broker_frame,
    encode_worker_frame,
)
from taskd.wire.generated.taskd import v1
from taskd.wire.protobuf import UINT64_MAX, bytes_field, fields, text_field, varint_field

unhurried = settings(deadline=None)  # a busy machine is no failure

texts = st.text(max_size=20)
uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, UINT64_MAX)
leases = st.builds(LeaseRef, texts, uint64)
lease_tuples = st.lists(leases, max_size=4).map(tuple)
results = st.builds(
    frames.Result,
    id=texts,
    fence=uint64,
    status=st.sampled_from(sorted(set(ResultStatus) - {ResultStatus.UNSPECIFIED})),
    reason=texts,
    error=texts,
    max_attempts=st.none() | uint32,
    delay_on_retry_s=st.none() | st.integers(0, MAX_DURATION_S),
)
worker_frames = st.one_of(
    st.builds(
        frames.Hello,
        worker_id=texts,
        pool=texts,
        application=st.none() | texts,
        namespaces=st.lists(texts, max_size=3).map(tuple),
        store_id=texts,
        holding=lease_tuples,
        version_min=uint32,
        version_max=uint32,
        tasks=st.lists(st.builds(frames.TaskName, texts, texts, texts), max_size=3).map(tuple),
        slots=uint32,
        async_tasks=st.lists(st.builds(frames.TaskName, texts, texts, texts), max_size=3).map(tuple),
    ),
    st.builds(frames.Credit, uint64, uint64, uint64, st.sampled_from(frames.CreditKind)),
    st.builds(frames.Started, lease_tuples),
    st.builds(frames.Results, st.lists(results, max_size=3).map(tuple)),
    st.builds(frames.HandBack, lease_tuples),
    st.builds(
        frames.Heartbeat,
        st.lists(
            st.builds(frames.TaskProgress, texts, uint64, st.none() | st.integers(0, 1_000), texts),
            max_size=3,
        ).map(tuple),
    ),
)
assignments = st.builds(
    frames.Assignment,
    id=texts,
    fence=uint64,
    activation=st.binary(max_size=50),
    processing_deadline_ms=uint64,
    expires_in_ms=st.none() | uint64,
)
broker_frames = st.one_of(
    st.builds(frames.Welcome, uint32, texts, uint32, uint64),
    st.builds(frames.Assignments, st.lists(assignments, max_size=3).map(tuple), uint64),
    st.builds(frames.Taken, lease_tuples),
    st.builds(frames.Draining),
    st.builds(frames.Stop, lease_tuples, st.sampled_from(frames.StopReason)),
)


def refs(some: tuple[LeaseRef, ...]) -> list[v1.LeaseRef]:
    return [v1.LeaseRef(id=ref.id, fence=ref.fence) for ref in some]


def worker_message(frame: frames.WorkerFrame) -> v1.WorkerFrame:
    match frame:
        case frames.Hello():
            return v1.WorkerFrame(
                hello=v1.Hello(
                    version_min=frame.version_min,
                    version_max=frame.version_max,
                    worker_id=frame.worker_id,
                    pool=frame.pool,
                    application=frame.application,
                    namespaces=list(frame.namespaces),
                    store_id=frame.store_id,
                    holding=refs(frame.holding),
                    tasks=[v1.TaskName(**task._asdict()) for task in frame.tasks],
                    slots=frame.slots,
                    async_tasks=[v1.TaskName(**task._asdict()) for task in frame.async_tasks],
                )
            )
        case frames.Credit():
            credit = v1.Credit(number=frame.number, total=frame.total, idle_total=frame.idle_total)
            credit.kind = v1.CreditKind(frame.kind)
            return v1.WorkerFrame(credit=credit)
        case frames.Started():
            return v1.WorkerFrame(started=v1.Started(leases=refs(frame.leases)))
        case frames.Results():
            return v1.WorkerFrame(results=v1.Results(results=[result_message(r) for r in frame.results]))
        case frames.HandBack():
            return v1.WorkerFrame(hand_back=v1.HandBack(leases=refs(frame.leases)))
        case frames.Heartbeat():
            tasks = [
                v1.TaskProgress(id=task.id, fence=task.fence, permille=task.permille, message=task.message)
                for task in frame.tasks
            ]
            return v1.WorkerFrame(heartbeat=v1.Heartbeat(tasks=tasks))


def result_message(result: frames.Result) -> v1.Result:
    return v1.Result(
        id=result.id,
        fence=result.fence,
        status=v1.ResultStatus(result.status),
        reason=result.reason,
        error=result.error,
        max_attempts=result.max_attempts,
        delay_on_retry=result.delay_on_retry_s,
    )


def broker_message(frame: frames.BrokerFrame) -> v1.BrokerFrame:
    match frame:
        case frames.Welcome():
            return v1.BrokerFrame(
                welcome=v1.Welcome(
                    version=frame.version,
                    store_id=frame.store_id,
                    lease_ms=frame.lease_ms,
                    max_deadline_ms=frame.max_deadline_ms,
                )
            )
        case frames.Assignments():
            return v1.BrokerFrame(
                assignments=v1.Assignments(
                    assignments=[
                        v1.Assignment(
                            id=item.id,
                            fence=item.fence,
                            activation=item.activation,
                            processing_deadline_ms=item.processing_deadline_ms,
                            expires_in_ms=item.expires_in_ms,
                        )
                        for item in frame.assignments
                    ],
                    credit=frame.credit,
                )
            )
        case frames.Taken():
            return v1.BrokerFrame(taken=v1.Taken(leases=refs(frame.leases)))
        case frames.Draining():
            return v1.BrokerFrame(draining=v1.Draining())
        case frames.Stop():
            return v1.BrokerFrame(stop=v1.Stop(leases=refs(frame.leases), reason=v1.StopReason(frame.reason)))


@unhurried
@given(worker_frames)
def test_a_workers_frame(frame: frames.WorkerFrame) -> None:
    message = worker_message(frame)
    raw = encode_worker_frame(frame)
    assert v1.WorkerFrame.parse(raw) == message
    assert decode_worker_frame(raw) == frame
    assert decode_worker_frame(bytes(message)) == frame


@unhurried
@given(broker_frames)
def test_a_brokers_frame(frame: frames.BrokerFrame) -> None:
    message = broker_message(frame)
    raw = encode_broker_frame(frame)
    assert v1.BrokerFrame.parse(raw) == message
    assert decode_broker_frame(raw) == frame
    assert decode_broker_frame(bytes(message)) == frame


def test_a_lease_is_what_a_result_and_an_assignment_are_of() -> None:
    assert frames.Result("a", 7, ResultStatus.COMPLETE).lease == LeaseRef("a", 7)
    assert frames.Assignment("a", 7, b"", 1).lease == LeaseRef("a", 7)


def test_of_several_kinds_the_last_counts_and_parts_merge() -> None:
    started, credit = encode_worker_frame(frames.Started((LeaseRef("a", 1),))), bytes_field(2, b"")
    assert decode_worker_frame(started + credit) == frames.Credit(0, 0)
    more = encode_worker_frame(frames.Started((LeaseRef("b", 2),)))
    merged = frames.Started((LeaseRef("a", 1), LeaseRef("b", 2)))
    assert decode_worker_frame(started + more) == merged


def test_unknown_fields_are_passed_over() -> None:
    unknown = text_field(99, "new") + varint_field(98, 1) + b"\xe1\x07" + bytes(8)
    lease = bytes_field(1, text_field(1, "a") + unknown + varint_field(2, 7))
    raw = unknown + bytes_field(3, lease + unknown) + unknown
    assert decode_worker_frame(raw) == frames.Started((LeaseRef("a", 7),))


def test_absurd_numbers_come_into_range() -> None:
    """They go into the store, which has 64 bits with a sign."""
    result = (
        text_field(1, "a") + varint_field(3, 3) + varint_field(6, UINT64_MAX) + varint_field(7, UINT64_MAX)
    )
    frame = decode_worker_frame(bytes_field(4, bytes_field(1, result)))
    assert frame == frames.Results(
        (frames.Result("a", 0, ResultStatus.RETRY, max_attempts=2**32 - 1, delay_on_retry_s=MAX_DURATION_S),)
    )
    assert decode_worker_frame(bytes_field(2, varint_field(1, UINT64_MAX))) == frames.Credit(UINT64_MAX, 0)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "of a kind that this version does not know"),
        (bytes_field(77, b""), "of a kind that this version does not know"),
        (varint_field(6, 1), "of a kind that this version does not know"),
        (bytes_field(4, bytes_field(1, text_field(1, "a"))), "status 0; expected 1 to 5"),
        (bytes_field(4, bytes_field(1, varint_field(3, 6))), "status 6; expected 1 to 5"),
        (bytes_field(3, bytes_field(1, varint_field(1, 5))), "field 1 is not a text"),
        (bytes_field(3, bytes_field(1, text_field(2, "x"))), "field 2 is not a number"),
        (bytes_field(1, bytes_field(3, b"\xff")), "not UTF-8"),
        (bytes_field(1, bytes_field(6, b"\xff")), "not UTF-8"),
        (bytes_field(3, b"\x0a\x09"), "claims 9 bytes, 0 are left"),
    ],
)
def test_what_is_no_frame_says_why(raw: bytes, why: str) -> None:
    with pytest.raises(Undecodable, match=why):
        decode_worker_frame(raw)


def test_an_assignments_activation_is_bytes() -> None:
    with pytest.raises(Undecodable, match="field 3 of an assignment is not bytes"):
        decode_broker_frame(bytes_field(2, bytes_field(1, varint_field(3, 1))))


def attempt(raw: bytes) -> None:
    for decode in (decode_worker_frame, decode_broker_frame):
        try:
            decode(raw)
        except Undecodable:
            continue


@unhurried
@given(st.binary(max_size=100))
def test_random_bytes(raw: bytes) -> None:
    attempt(raw)


@unhurried
@given(
    worker_frames.map(encode_worker_frame) | broker_frames.map(encode_broker_frame),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=5),
    st.integers(0, 10_000),
)
def test_mutated_and_truncated_frames(raw: bytes, mutations: list[tuple[int, int]], length: int) -> None:
    mutated = bytearray(raw)
    for position, byte in mutations:
        mutated[position % len(mutated)] = byte
    attempt(bytes(mutated))
    attempt(bytes(mutated[: length % len(mutated)]))


ids = st.sampled_from(["", "a", "å" * 40, "x" * 121, "x" * 122, "x" * 127, "x" * 128])
NOW_US = 1_760_000_000_000_000  # fences are what the clock was at a claim
fences = st.sampled_from([0, 1, 127, 128, 16_383, 16_384, 2_097_151, NOW_US, NOW_US + 1, 2**64 - 1])
some_results = st.builds(
    frames.Result,
    id=ids,
    fence=fences,
    status=st.sampled_from(sorted(set(ResultStatus) - {ResultStatus.UNSPECIFIED})),
    reason=st.sampled_from(["", "why"]),
    error=st.just(""),
    max_attempts=st.sampled_from([None, 0, 3]),
    delay_on_retry_s=st.none(),
)
some_assignments = st.builds(
    frames.Assignment,
    id=ids,
    fence=fences,
    activation=st.binary(max_size=200),
    processing_deadline_ms=st.integers(0, 2**40),
    expires_in_ms=st.none() | st.integers(0, 2**20),
)
positions = st.integers(0, 10_000)


@given(
    st.lists(st.builds(LeaseRef, ids, fences), max_size=4),
    st.lists(some_results, max_size=4),
    st.lists(some_assignments, max_size=4),
    st.lists(st.tuples(positions, st.integers(0, 255)), max_size=2),
    st.binary(max_size=3),
    positions,
)
def test_the_short_ways_of_reading_read_the_same(
    some_leases: list[LeaseRef],
    results: list[frames.Result],
    items: list[frames.Assignment],
    mutations: list[tuple[int, int]],
    more: bytes,
    length: int,
) -> None:
    codec = frames_codec
    for short, general, raw in (
        (codec._usual_leases, codec._read_lease, codec._leases(some_leases)),
        (codec._usual_results, codec._read_result, b"".join(map(codec._result_field, results))),
        (codec._usual_assignments, codec._read_assignment, codec._assignments(items)),
    ):
        mutated = bytearray(raw + more)
        for position, byte in mutations:
            mutated[position % (len(mutated) or 1) : position % (len(mutated) or 1) + 1] = bytes((byte,))
        for written in (raw, raw + more, bytes(mutated), raw[: length % (len(raw) or 1)]):
            read, behind = short(written)  # type: ignore[operator]
            found = list(fields(written[:behind]))
            assert [number for number, *_ in found] == [1] * len(found)
            assert read == [general(value) for _, _, value, _, _ in found]  # type: ignore[operator]


def test_the_short_ways_read_what_we_write() -> None:
    """Or they would be no use, and nobody would notice."""
    some = [LeaseRef("a" * 32, NOW_US), LeaseRef("b" * 36, NOW_US + 127), LeaseRef("c" * 32, 1)]
    done = tuple(frames.Result(*lease, ResultStatus.COMPLETE) for lease in some)
    items = tuple(frames.Assignment(*lease, b"x" * 300, 10_000) for lease in some)
    for short, raw, expected in (
        (frames_codec._usual_leases, frames_codec._leases(some), some),
        (frames_codec._usual_results, b"".join(map(frames_codec._result_field, done)), list(done)),
        (frames_codec._usual_assignments, frames_codec._assignments(items), list(items)),
    ):
        assert short(raw) == (expected, len(raw))  # type: ignore[operator]
