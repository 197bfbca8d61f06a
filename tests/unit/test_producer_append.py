from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from taskd import aio  # isort: skip  # before asyncio is used: it replaces functions of it

import asyncio

from taskd.clock import Now
from taskd.errors import DeliveryError, LogUnavailable, PeerUnavailable, Refused, Undecodable
from taskd.log.base import Outgoing, Partition, Position, Rejected
from taskd.log.memory import MemoryLog
from taskd.producer.append import MAX_BATCH_BYTES, MAX_BATCH_RECORDS, Sender, open_sender
from taskd.producer.append_codec import decode_request, decode_response, encode_request, encode_response
from taskd.producer.client import Producer
from taskd.producer.destination import Destination, RemoteWriter
from taskd.producer.service import METHOD, LogService
from taskd.tasks.outbox import Call
from taskd.wire.generated.taskd.v1 import (
    AppendedRecord,
    AppendRecord,
    AppendRequest,
    AppendResponse,
    RecordHeader,
)
from taskd.wire.protobuf import bytes_field

Answers = list[Position | Exception]


def call(number: int = 0, **changes: Any) -> Call:
    return Call(f"id-{number}", "n", "t", "", "", (number,), {}, **changes)


class ScriptedLog:
    """A destination that does what the test says with each batch, and keeps what it took."""

    def __init__(self, answer: Callable[[Outgoing], Exception | None] = lambda record: None) -> None:
        self.answer = answer
        self.batches: list[list[bytes]] = []
        self.taken: list[bytes] = []
        self.open_errors: list[Exception] = []
        self.append_s = 0.0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ScriptedLog]:
        if self.open_errors:
            raise self.open_errors.pop(0)
        yield self

    async def append(self, records: Sequence[Outgoing]) -> Answers:
        keys = [record.key or b"" for record in records]
        self.batches.append(keys)
        await trio.sleep(self.append_s)
        errors = [self.answer(record) for record in records]
        self.taken += [key for key, error in zip(keys, errors, strict=True) if error is None]
        return [error or Position(Partition("t", 0), 0) for error in errors]

    @property
    def destination(self) -> Destination:
        return Destination("the log", "Is it there?", self.open)


class FixedClock:
    def now(self) -> Now:
        return Now(1_767_225_600_123, 0)


@asynccontextmanager
async def producing(log: ScriptedLog, timeout_s: float = 10.0) -> AsyncIterator[Producer]:
    async with open_sender(log.destination, timeout_s, random.Random(1)) as sender:
        yield Producer(sender, "topic", timeout_s, FixedClock())


async def test_calls_are_appended_in_order(autojump_clock: object) -> None:
    log = ScriptedLog()
    async with producing(log) as producer:
        assert await producer.send_many([call(n) for n in range(3)]) == [None, None, None]
    assert log.batches == [[b"id-0", b"id-1", b"id-2"]]


async def test_nothing_to_send(autojump_clock: object) -> None:
    async with producing(ScriptedLog()) as producer:
        assert await producer.send_many([]) == []


async def test_what_gathers_during_an_append_goes_together(autojump_clock: object) -> None:
    log = ScriptedLog()
    log.append_s = 1.0
    async with producing(log) as producer, trio.open_nursery() as nursery:
        nursery.start_soon(producer.send, call(0))
        await trio.sleep(0.5)
        for number in range(1, 5):
            nursery.start_soon(producer.send, call(number))
    assert [len(batch) for batch in log.batches] == [1, 4]


async def test_batches_are_bounded(autojump_clock: object) -> None:
    log = ScriptedLog()
    async with producing(log) as producer:
        await producer.send_many([call(n) for n in range(MAX_BATCH_RECORDS + 1)])
        assert [len(batch) for batch in log.batches] == [MAX_BATCH_RECORDS, 1]
        log.batches.clear()
        big = {"h": "x" * (MAX_BATCH_BYTES // 2)}
        await producer.send_many([call(n, headers=big) for n in range(3)])
        assert [len(batch) for batch in log.batches] == [1, 1, 1]


async def test_a_call_that_cannot_be_sent_leaves_its_neighbours_alone(autojump_clock: object) -> None:
    log = ScriptedLog()
    async with producing(log) as producer:
        bad = Call("bad", "n", "t", "", "", (object(),), {})
        first, second, third = await producer.send_many([call(0), bad, call(2)])
    assert (first, third) == (None, None)
    assert "argument 0 cannot be sent" in str(second)
    assert log.taken == [b"id-0", b"id-2"]


async def test_what_is_refused_is_not_tried_again(autojump_clock: object) -> None:
    log = ScriptedLog(lambda record: Rejected("too large") if record.key == b"id-1" else None)
    async with producing(log) as producer:
        results = await producer.send_many([call(n) for n in range(3)])
    assert results[0] is results[2] is None
    assert str(results[1]) == "n:t (activation id-1) was not scheduled: the log refused it: too large"
    assert len(log.batches) == 1


async def test_a_transient_failure_is_tried_again(autojump_clock: object) -> None:
    failures = [LogUnavailable("one"), LogUnavailable("two")]
    log = ScriptedLog(lambda record: failures.pop() if failures and record.key == b"id-1" else None)
    async with producing(log) as producer:
        assert await producer.send_many([call(n) for n in range(3)]) == [None] * 3
    assert log.batches == [[b"id-0", b"id-1", b"id-2"], [b"id-1"], [b"id-1"]]


async def test_an_outage_ends_in_an_error_that_says_what_to_do(autojump_clock: trio.abc.Clock) -> None:
    log = ScriptedLog(lambda record: LogUnavailable("connection refused"))
    async with producing(log) as producer:
        started = trio.current_time()
        with pytest.raises(DeliveryError) as caught:
            await producer.send(call())
        assert trio.current_time() - started == 10
        assert str(caught.value) == (
            "n:t (activation id-0) was not scheduled: expected the log to store it within 10 s; "
            "last answer: connection refused. If only the answer was lost, it runs all the same. Is it there?"
        )
        assert 10 < len(log.batches) < 30  # with back-off
        log.answer = lambda record: None
        await producer.send(call(1))
    assert log.taken == [b"id-1"]  # nothing of before is sent any more


async def test_no_answer_at_all(autojump_clock: object) -> None:
    log = ScriptedLog()
    log.append_s = float("inf")
    async with producing(log) as producer:
        with pytest.raises(DeliveryError, match="no answer"):
            await producer.send(call(0))
        log.append_s = 0
        await producer.send(call(1))
    assert log.taken == [b"id-1"]


async def test_a_fault_of_the_logs_client_is_told(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(record: Outgoing) -> None:
        raise ZeroDivisionError("a bug")

    log = ScriptedLog(fault)
    async with producing(log) as producer:
        with pytest.raises(DeliveryError, match=r"last answer: ZeroDivisionError\('a bug'\)"):
            await producer.send(call(0))
        log.answer = lambda record: None
        await producer.send(call(1))
    assert "appending failed" in caplog.text


async def test_a_log_that_cannot_be_opened_is_opened_again(autojump_clock: object) -> None:
    log = ScriptedLog()
    log.open_errors = [LogUnavailable("not yet"), ValueError("a foreign error")]
    async with producing(log) as producer:
        await producer.send(call())
    assert log.taken == [b"id-0"]


async def test_cancelling_a_send_gives_the_call_up(autojump_clock: object) -> None:
    log = ScriptedLog(lambda record: LogUnavailable("down"))
    async with producing(log) as producer:
        with trio.move_on_after(1):
            await producer.send(call())
        attempts = len(log.batches)
        await trio.sleep(60)
        assert len(log.batches) <= attempts + 1


async def test_cancelling_a_send_in_the_middle_of_its_append_leaves_others_alone(
    autojump_clock: object,
) -> None:
    log = ScriptedLog()
    log.append_s = 5
    async with producing(log) as producer, trio.open_nursery() as nursery:
        await trio.testing.wait_all_tasks_blocked()  # the log is open: the caller appends itself
        with trio.move_on_after(1):
            nursery.start_soon(_later, producer, call(1))
            await producer.send(call(0))
        await trio.sleep(10)
        assert log.taken == [b"id-1"]


async def _later(producer: Producer, its: Call) -> None:
    await trio.sleep(0.5)
    await producer.send(its)


class AsyncioLog(ScriptedLog):
    """A destination whose client needs asyncio's loop, as those of Kafka and gRPC do."""

    async def append(self, records: Sequence[Outgoing]) -> Answers:
        await aio.call(asyncio.sleep, 0)
        return await super().append(records)


async def test_tasks_send_that_are_older_than_the_producers_loop(caplog: pytest.LogCaptureFixture) -> None:
    log = AsyncioLog()
    producers, receive = trio.open_memory_channel[Producer](0)

    sent = trio.Event()

    async def older() -> None:
        await (await receive.receive()).send(call(1))
        sent.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(older)
            async with aio.open_loop(), producing(log) as producer:
                await producer.send(call(0))  # the log is open from now on
                await producers.send(producer)
                await sent.wait()
    assert log.taken == [b"id-0", b"id-1"]
    assert caplog.text == ""


async def test_new_calls_do_not_cut_a_back_off_short(autojump_clock: object) -> None:
    log = ScriptedLog(lambda record: LogUnavailable("down"))
    async with producing(log) as producer, trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(producer.send_many, [call(number)])
            await trio.sleep(0.05)
        assert len(log.batches) < 20
        log.answer = lambda record: None
    assert len(log.taken) == 100


async def test_leaving_fails_what_is_being_appended(autojump_clock: object) -> None:
    log = ScriptedLog()
    log.append_s = 1
    results: list[Any] = []

    async def send(producer: Producer) -> None:
        log.answer = lambda record: LogUnavailable("closed")
        results.extend(await producer.send_many([call()]))

    async with trio.open_nursery() as nursery:
        async with producing(log) as producer:
            await trio.testing.wait_all_tasks_blocked()  # the log is open: the caller appends itself
            nursery.start_soon(send, producer)
            await trio.sleep(0.5)
        await trio.sleep(1)
        assert isinstance(results[0], DeliveryError)


async def test_leaving_fails_what_is_left(autojump_clock: object) -> None:
    log = ScriptedLog(lambda record: LogUnavailable("down"))
    results: list[Any] = []

    async def send(producer: Producer) -> None:
        results.extend(await producer.send_many([call()]))

    async with trio.open_nursery() as nursery:
        async with producing(log) as producer:
            nursery.start_soon(send, producer)
            await trio.sleep(1)
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(results[0], DeliveryError)


async def test_drained(autojump_clock: object) -> None:
    log = ScriptedLog()
    log.append_s = 1
    async with open_sender(log.destination, 10, random.Random(1)) as sender:
        assert isinstance(sender, Sender)
        await sender.drained()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Producer(sender, "topic", 10, FixedClock()).send, call())
            await trio.testing.wait_all_tasks_blocked()
            started = trio.current_time()
            await sender.drained()
            assert trio.current_time() - started == 1


# ---- through the broker's service ------------------------------------------------------------


class DirectClient:
    """Calls the service without a network; `error` is raised instead when set."""

    def __init__(self, service: LogService) -> None:
        self._unary = service.services[METHOD]
        self.calls = 0
        self.error: Exception | None = None

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        assert path == METHOD
        self.calls += 1
        if self.error is not None:
            raise self.error
        reply = await self._unary.handler(body)  # type: ignore[union-attr,arg-type]
        assert isinstance(reply, bytes)
        return reply


@asynccontextmanager
async def service() -> AsyncIterator[tuple[RemoteWriter, DirectClient]]:
    log = MemoryLog(clock=FixedClock(), max_record_bytes=1_000)
    async with log.open_writer() as writer:
        direct = DirectClient(LogService(writer, frozenset({"a", "b"})))
        yield RemoteWriter(direct, 5.0), direct  # type: ignore[arg-type]


async def test_remote_append(autojump_clock: object) -> None:
    async with service() as (writer, direct):
        records = [
            Outgoing("a", b"0", b"k", (("h", b"v"),)),
            Outgoing("b", b"1"),
            Outgoing("a", b"", b""),
        ]
        assert await writer.append(records) == [
            Position(Partition("a", 0), 0),
            Position(Partition("b", 0), 0),
            Position(Partition("a", 0), 1),
        ]
        assert await writer.append([]) == []
        assert direct.calls == 1


async def test_one_bad_record_is_found(autojump_clock: object) -> None:
    async with service() as (writer, _):
        records = [Outgoing("a", b"x") for _ in range(8)]
        records[5] = Outgoing("a", b"x" * 2_000)
        records[6] = Outgoing("elsewhere", b"x")
        answers = await writer.append(records)
        assert [isinstance(answer, Position) for answer in answers] == [True] * 5 + [False, False, True]
        assert isinstance(answers[5], Rejected)
        assert "no topic 'elsewhere'; it has a, b" in str(answers[6])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PeerUnavailable("gone"), LogUnavailable),
        (Refused("INTERNAL", "oh"), LogUnavailable),
        (Refused("UNIMPLEMENTED", "no such service"), Rejected),
        (Refused("UNAUTHENTICATED", "who?"), Rejected),
    ],
)
async def test_remote_errors(autojump_clock: object, error: Exception, kind: type[Exception]) -> None:
    async with service() as (writer, direct):
        direct.error = error
        answers = await writer.append([Outgoing("a", b"x")] * 3)
        assert [type(answer) for answer in answers] == [kind] * 3
        assert direct.calls == 1


def test_the_request_is_the_generated_one() -> None:
    records = [
        Outgoing("a", b"0", b"k", (("h", b"v"), ("h", b""))),
        Outgoing("b", b"1"),
        Outgoing("c", b"", b""),
    ]
    parsed = AppendRequest.parse(encode_request(records)).records
    assert [
        Outgoing(r.topic, r.value, r.key, tuple((h.name, h.value) for h in r.headers)) for r in parsed
    ] == records
    assert decode_request(encode_request(records)) == records


def test_a_request_is_read_as_the_generated_one() -> None:
    rng = random.Random(7)
    for _ in range(300):
        records = [
            AppendRecord(
                topic="é" * rng.choice((0, 1, 70)),
                key=rng.choice((None, b"", b"k" * rng.choice((1, 127, 128, 300)))),
                value=bytes(rng.choice((0, 1, 127, 128, 20_000))),
                headers=[RecordHeader(name="n" * n, value=bytes(n)) for n in range(rng.choice((0, 0, 3)))],
            )
            for _ in range(rng.randrange(4))
        ]
        assert decode_request(bytes(AppendRequest(records=records)) + b"\xf8\x01\x05") == [
            Outgoing(r.topic, r.value, r.key, tuple((h.name, h.value) for h in r.headers)) for r in records
        ]


@pytest.mark.parametrize(
    "record",
    [
        b"\x08\x05",  # a number as topic
        b"\x0a\x01a\x10\x05\x1a\x01v",  # as key
        b"\x0a\x01a\x12\x01k\x18\x05",  # as value
        b"\x0a\x01a\x1a\x01v\x20\x05",  # as header
        b"\x0a\x01a\x1a\x01v\x22\x02\x08\x05",  # as name
        b"\x0a\x01a\x1a\x01v\x22\x02\x10\x05",  # as value of a header
        b"\x0a\x01\xff\x12\x01k\x1a\x01v",  # not UTF-8
        b"\x0a\x01a\x12\x01k\x1a\x02v",  # cut off
        b"\x0a\x01a\x12\x09k",
        b"\x0a",
    ],
    ids=repr,
)
def test_a_record_that_cannot_be_read_is_an_error(record: bytes) -> None:
    with pytest.raises(Undecodable):
        decode_request(bytes_field(1, record))


def test_the_response_is_the_generated_one() -> None:
    records = [Outgoing("a", b""), Outgoing("b", b"")]
    response = AppendResponse(records=[AppendedRecord(), AppendedRecord(partition=3, offset=2**40)])
    positions = [Position(Partition("a", 0), 0), Position(Partition("b", 3), 2**40)]
    assert decode_response(bytes(response), records) == positions
    assert encode_response(positions) == bytes(response)


async def test_an_answer_for_another_number_of_records_is_not_trusted(autojump_clock: object) -> None:
    class Odd:
        async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
            return b""

    (answer,) = await RemoteWriter(Odd(), 5.0).append([Outgoing("a", b"")])  # type: ignore[arg-type]
    assert isinstance(answer, LogUnavailable)
    assert "positions of 1 records, found 0" in str(answer)
