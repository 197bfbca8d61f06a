"""The stream of a worker, spoken by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from taskd.activation.lifecycle import Status
from taskd.errors import Refused
from taskd.wire import frames, frames_codec
from taskd.wire.frames import LeaseRef, ResultStatus

Broker = Any
Clock = Any  # pytest-trio takes the clock among the test's own arguments only


class FakeStream:
    """The broker's end of a stream in memory; `worker` is the other."""

    def __init__(self) -> None:
        self._to_worker, self.inbox = trio.open_memory_channel[bytes](100)
        self.outbox, self._from_worker = trio.open_memory_channel[bytes](100)

    async def receive(self) -> bytes | None:
        try:
            return await self._from_worker.receive()
        except trio.EndOfChannel:
            return None

    async def send(self, body: bytes) -> None:
        await self._to_worker.send(body)


class FakeWorker:
    def __init__(self, stream: FakeStream) -> None:
        self._stream = stream
        self._credit = frames.Credit(0, 0)

    async def say(self, frame: frames.WorkerFrame) -> None:
        await self._stream.outbox.send(frames_codec.encode_worker_frame(frame))

    async def hear(self) -> frames.BrokerFrame:
        return frames_codec.decode_broker_frame(await self._stream.inbox.receive())

    def leave(self) -> None:
        """End the stream in an orderly way."""
        self._stream.outbox.close()

    async def offer(self, more: int, idle: int | None = None) -> None:
        """So many more assignments are welcome, all or `idle` of them at once."""
        total = self._credit.total + more
        idle_total = total if idle is None else self._credit.total + idle
        self._credit = frames.Credit(self._credit.number + 1, total, idle_total)
        await self.say(self._credit)

    async def work(self, more: int) -> tuple[frames.Assignment, ...]:
        await self.offer(more)
        frame = await self.hear()
        assert isinstance(frame, frames.Assignments)
        return frame.assignments


@asynccontextmanager
async def connected(broker: Broker, **hello: Any) -> AsyncIterator[FakeWorker]:
    stream = FakeStream()
    worker = FakeWorker(stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.stream.work, stream)
        await worker.say(frames.Hello(**{"worker_id": "w1", "pool": "default", **hello}))
        welcome = await worker.hear()
        assert isinstance(welcome, frames.Welcome)
        assert welcome.store_id == broker.inflight.store_id
        yield worker
        nursery.cancel_scope.cancel()


async def produce(broker: Broker, *ids: str, **fields: Any) -> None:
    await broker.produce(*(broker.activation(id_, **fields) for id_ in ids))
    await broker.settle()


async def describe(broker: Broker, id_: str) -> Any:
    (found,) = await broker.inflight.describe([id_])
    return found


async def test_credit_bounds_assignments_and_results_are_taken(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a", "b", "c")
    async with connected(broker) as worker:
        first, second = await worker.work(2)
        assert (first.id, second.id) == ("a", "b")
        assert first.processing_deadline_ms == 10_000
        await worker.say(frames.Started((first.lease,)))
        await broker.settle()
        assert (await describe(broker, "a")).attempts == 1
        assert (await describe(broker, "b")).attempts == 0
        await worker.say(frames.Results((frames.Result(*first.lease, ResultStatus.COMPLETE),)))
        assert await worker.hear() == frames.Taken((first.lease,))
        assert (await describe(broker, "a")).outcome == "complete"


async def test_what_comes_later_is_sent_on_credit_given_before(autojump_clock: Clock, broker: Broker) -> None:
    async with connected(broker) as worker:
        await worker.offer(5)
        await produce(broker, "a")
        frame = await worker.hear()
        assert isinstance(frame, frames.Assignments)
        assert [item.id for item in frame.assignments] == ["a"]


async def test_what_comes_in_is_claimed_along_for_a_worker_that_waits(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def claim(request: object) -> list[Any]:
        raise AssertionError("a claim of its own costs another transaction")

    async with connected(broker) as worker:
        await worker.offer(2)
        await broker.settle()
        monkeypatch.setattr(broker.inflight, "claim", claim)
        for id_ in ("a", "b"):
            await produce(broker, id_)
            frame = await worker.hear()
            assert isinstance(frame, frames.Assignments)
            assert [item.id for item in frame.assignments] == [id_]
        await produce(broker, "c")
        assert (await describe(broker, "c")).status is Status.PENDING, "there is no credit left"


async def test_what_was_claimed_along_for_a_worker_that_left_waits_again(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = broker.inflight.insert

    async def insert_while_it_leaves(arrivals: object) -> Any:
        leaving.cancel()
        return await insert(arrivals)

    monkeypatch.setattr(broker.inflight, "insert", insert_while_it_leaves)
    with trio.CancelScope() as leaving:
        async with connected(broker) as worker:
            await worker.offer(2)
            await produce(broker, "a")
            raise AssertionError("it has left")
    await broker.settle()
    found = await describe(broker, "a")
    assert (found.status, found.attempts) == (Status.PENDING, 0)
    async with connected(broker, worker_id="w2") as other:
        assert [item.id for item in await other.work(1)] == ["a"]


async def test_what_a_leaving_worker_never_saw_does_not_wait_for_its_lease(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "seen", "unseen", processing_deadline_duration=1000)
    async with connected(broker) as worker:
        seen, _ = await worker.work(2)
        await worker.say(frames.Results((frames.Result(*seen.lease, ResultStatus.COMPLETE),)))
        worker.leave()
        await broker.settle()
        assert (await describe(broker, "seen")).outcome == "complete"
        found = await describe(broker, "unseen")
        assert (found.status, found.attempts) == (Status.PENDING, 0)


async def test_hand_back_returns_the_row_uncounted(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a")
    async with connected(broker) as worker:
        (item,) = await worker.work(1)
        await worker.say(frames.HandBack((item.lease,)))
        await broker.settle()
        found = await describe(broker, "a")
        assert (found.status, found.attempts) == (Status.PENDING, 0)


async def test_a_silent_worker_loses_its_leases_and_a_heartbeat_keeps_them(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a", processing_deadline_duration=1000)
    async with connected(broker) as worker:
        (item,) = await worker.work(1)
        await worker.say(frames.Started((item.lease,)))
        for _ in range(5):
            await trio.sleep(20)
            await worker.say(frames.Heartbeat())
        assert (await describe(broker, "a")).status is Status.PROCESSING
    await trio.sleep(32)
    assert (await describe(broker, "a")).status is Status.PENDING


async def test_a_worker_heard_of_while_others_lose_their_leases_keeps_its_own(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reconcile, ended = broker.inflight.reconcile, []

    async def slow(worker: str, holding: object) -> int:
        ended.append(worker)
        for other in {"w1", "w2"} - {worker}:
            broker.stream.presence.seen(other)
        return int(await reconcile(worker, holding))

    await produce(broker, "a", "b")
    async with connected(broker, worker_id="w1") as one, connected(broker, worker_id="w2") as two:
        await one.work(1)
        await two.work(1)
        monkeypatch.setattr(broker.inflight, "reconcile", slow)
        await trio.sleep(33)
    assert len(ended) == 1
    assert broker.inflight.counts()[Status.PROCESSING] == 1


async def test_a_superseded_result_is_taken_and_changes_nothing(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a")
    async with connected(broker) as worker:
        (old,) = await worker.work(1)
    await trio.sleep(32)
    async with connected(broker, worker_id="w2") as other:
        (new,) = await other.work(1)
        assert new.fence > old.fence
        await other.say(frames.Results((frames.Result(*old.lease, ResultStatus.FAILURE),)))
        assert await other.hear() == frames.Taken((old.lease,))
        assert (await describe(broker, "a")).status is Status.PROCESSING


async def test_on_reconnect_what_the_worker_does_not_name_was_lost_on_the_way(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a", "b")
    async with connected(broker) as worker:
        kept, lost = await worker.work(2)
    async with connected(broker, store_id=broker.inflight.store_id, holding=(kept.lease,)):
        await broker.settle()
        assert (await describe(broker, kept.id)).status is Status.PROCESSING
        assert (await describe(broker, lost.id)).status is Status.PENDING


async def test_a_result_reported_after_reconnect_counts(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a")
    async with connected(broker) as worker:
        (item,) = await worker.work(1)
    async with connected(broker, store_id=broker.inflight.store_id, holding=(item.lease,)) as worker:
        await worker.say(frames.Results((frames.Result(*item.lease, ResultStatus.COMPLETE),)))
        await worker.hear()
    found = await describe(broker, "a")
    assert (found.outcome, found.attempts) == ("complete", 1)


async def test_a_newer_stream_of_the_same_worker_takes_over(autojump_clock: Clock, broker: Broker) -> None:
    async with connected(broker), connected(broker) as newer:
        await produce(broker, "a")
        assert [item.id for item in await newer.work(1)] == ["a"]
        assert broker.stream.connected_workers == 1


async def test_of_two_newer_streams_at_once_one_remains(autojump_clock: Clock, broker: Broker) -> None:
    ended: list[int] = []

    async def work(number: int) -> None:
        stream = FakeStream()
        await FakeWorker(stream).say(frames.Hello(worker_id="w1", pool="default"))
        await broker.stream.work(stream)
        ended.append(number)

    async with connected(broker), trio.open_nursery() as nursery:
        nursery.start_soon(work, 1)
        nursery.start_soon(work, 2)
        await broker.settle()
        assert len(ended) == 1
        assert broker.stream.connected_workers == 1
        nursery.cancel_scope.cancel()


async def test_crashes_count_until_poison(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a", retry_state=broker.dead_letter_policy())
    async with connected(broker) as worker:
        for _ in range(3):
            (item,) = await worker.work(1)
            await worker.say(frames.Started((item.lease,)))
            await worker.say(frames.Results((frames.Result(*item.lease, ResultStatus.CRASHED),)))
            await worker.hear()
        await broker.settle()
        found = await describe(broker, "a")
        assert (found.outcome, found.reason, found.dead_lettered) == ("failed", "poison", True)


async def test_draining_is_announced_and_results_still_taken(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a", "b")
    async with connected(broker) as worker:
        (item,) = await worker.work(1)
        broker.draining.set()
        assert await worker.hear() == frames.Draining()
        await worker.offer(5)
        await worker.say(frames.Results((frames.Result(*item.lease, ResultStatus.COMPLETE),)))
        assert await worker.hear() == frames.Taken((item.lease,))


async def test_filters_choose_lanes(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a", namespace="one", application="app")
    await produce(broker, "b", namespace="two", application="app")
    async with connected(broker, application="app", namespaces=("two",)) as worker:
        assert [item.id for item in await worker.work(5)] == ["b"]


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (frames.Heartbeat(), "INVALID_ARGUMENT"),
        (frames.Hello("", "p"), "INVALID_ARGUMENT"),
        (frames.Hello("w", "p", version_min=2, version_max=3), "FAILED_PRECONDITION"),
    ],
)
async def test_a_bad_hello_is_refused(
    autojump_clock: Clock, broker: Broker, first: frames.WorkerFrame, code: str
) -> None:
    stream = FakeStream()
    await FakeWorker(stream).say(first)
    with pytest.raises(Refused) as refused:
        await broker.stream.work(stream)
    assert refused.value.code == code


async def test_lease_refs_of_another_store_are_not_trusted(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a")
    async with connected(broker) as worker:
        (item,) = await worker.work(1)
    async with connected(broker, store_id="another", holding=(LeaseRef(item.id, item.fence + 1),)):
        await broker.settle()
        assert (await describe(broker, "a")).status is Status.PROCESSING, "nothing was said of it"
    async with connected(broker, store_id=broker.inflight.store_id):
        await broker.settle()
        assert (await describe(broker, "a")).status is Status.PENDING
