"""Work that must not start twice: its hand-out is its start, whoever gets it and whatever happens then."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from taskd.errors import Refused
from taskd.inflight.base import Description
from taskd.wire import consumer, frames, frames_codec
from taskd.wire.frames import LeaseRef, ResultStatus

Broker = Any
Clock = Any  # pytest-trio takes the clock among the test's own arguments only
DLQ, TOPIC = "taskd-dlq", "taskd"
LEASE_OVER_S = 10 + 3 + 2  # its deadline, the grace, and a round of upkeep


class Worker:
    """A worker with room for everything; `assigned`: every lease it was given, in order."""

    def __init__(self) -> None:
        self._to_broker, self._from_worker = trio.open_memory_channel[bytes](100)
        self.assigned: list[LeaseRef] = []

    async def say(self, frame: frames.WorkerFrame) -> None:
        await self._to_broker.send(frames_codec.encode_worker_frame(frame))

    async def report(self, lease: LeaseRef, status: ResultStatus) -> None:
        await self.say(frames.Results((frames.Result(*lease, status),)))

    # the stream's face

    async def receive(self) -> bytes | None:
        return await self._from_worker.receive()

    async def send(self, body: bytes) -> None:
        frame = frames_codec.decode_broker_frame(body)
        if isinstance(frame, frames.Assignments):
            self.assigned += [item.lease for item in frame.assignments]


@asynccontextmanager
async def connected(broker: Broker, id_: str = "w1", **hello: Any) -> AsyncIterator[Worker]:
    worker = Worker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.stream.work, worker)
        await worker.say(frames.Hello(id_, "default", **hello))
        await worker.say(frames.Credit(1, 1_000, 1_000))
        await broker.settle()
        yield worker
        nursery.cancel_scope.cancel()


def once(broker: Broker, id_: str = "a") -> bytes:
    value = broker.activation(id_, retry_state=broker.at_most_once_policy())
    assert isinstance(value, bytes)
    return value


async def produce(broker: Broker, *values: bytes) -> None:
    await broker.produce(*values)
    await broker.settle()


async def look(broker: Broker, id_: str = "a") -> Description:
    (found,) = await broker.inflight.describe([id_])
    assert isinstance(found, Description)
    return found


async def assert_failed(broker: Broker, *, reason: str = "at_most_once") -> None:
    await trio.sleep(LEASE_OVER_S)
    found = await look(broker)
    assert (found.outcome, found.reason, found.attempts) == ("failed", reason, 1)
    async with connected(broker, "another") as another:
        assert another.assigned == []
    with pytest.raises(Refused, match="No pending activations"):
        await broker.get_task()


async def test_a_hand_out_that_is_never_heard_of_again_was_the_start(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, once(broker))
    async with connected(broker) as worker:
        assert len(worker.assigned) == 1
        assert (await look(broker)).attempts == 1
    await assert_failed(broker)


async def test_a_worker_that_comes_back_without_it_lost_it(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, once(broker))
    async with connected(broker) as worker:
        assert len(worker.assigned) == 1
    async with connected(broker, store_id=broker.inflight.store_id) as worker:
        assert worker.assigned == []
    await assert_failed(broker)


async def test_a_worker_that_comes_back_with_it_may_report(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, once(broker))
    async with connected(broker) as worker:
        (lease,) = worker.assigned
    async with connected(broker, store_id=broker.inflight.store_id, holding=(lease,)) as worker:
        await worker.report(lease, ResultStatus.COMPLETE)
        await broker.settle()
    assert (await look(broker)).outcome == "complete"


async def test_a_broker_that_comes_back_remembers_the_start(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    async with open_broker(tmp_path) as broker:
        log = broker.log
        await produce(broker, once(broker))
        async with connected(broker) as worker:
            assert len(worker.assigned) == 1
    async with open_broker(tmp_path, log) as broker:
        async with connected(broker, "another") as another:
            assert another.assigned == []
        await assert_failed(broker)


async def test_what_is_handed_back_before_it_started_waits_again(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, once(broker))
    async with connected(broker) as worker:
        (first,) = worker.assigned
        await worker.say(frames.HandBack((LeaseRef("a", first.fence - 1),)))  # of no lease at all
        await broker.settle()
        assert worker.assigned == [first]
        await worker.say(frames.HandBack((first,)))
        await broker.settle()
        again = worker.assigned[-1]
        assert again.fence > first.fence
        await worker.say(frames.HandBack((first,)))  # once more, as after a lost connection
        await worker.report(again, ResultStatus.COMPLETE)
        await broker.settle()
        assert worker.assigned == [first, again]
    found = await look(broker)
    assert (found.outcome, found.attempts) == ("complete", 1)


async def test_what_started_cannot_be_handed_back(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, once(broker))
    async with connected(broker) as worker:
        (lease,) = worker.assigned
        await worker.say(frames.Started((lease,)))
        await broker.settle()
        await worker.say(frames.HandBack((lease,)))
        await broker.settle()
        assert worker.assigned == [lease]
    await assert_failed(broker)


@pytest.mark.parametrize("status", [ResultStatus.CRASHED, ResultStatus.INTERRUPTED, ResultStatus.RETRY])
async def test_no_outcome_of_a_stream_leads_to_a_second_run(
    autojump_clock: Clock, broker: Broker, status: ResultStatus
) -> None:
    await produce(broker, once(broker))
    async with connected(broker) as worker:
        (lease,) = worker.assigned
        await worker.say(frames.Started((lease,)))
        await worker.report(lease, status)
        await broker.settle()
        assert worker.assigned == [lease]
    await assert_failed(broker)
    assert len(await broker.records(TOPIC)) == 1, "no retry was published"


async def test_a_retry_by_unary_call_leads_to_no_second_run(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, once(broker))
    assert (await broker.get_task()).id == "a"
    await broker.set_status("a", consumer.RETRY)
    await assert_failed(broker)
    assert len(await broker.records(TOPIC)) == 1, "no retry was published"


@pytest.mark.parametrize("when", ["running", "finished"])
async def test_a_record_that_comes_again_does_not_start_again(
    autojump_clock: Clock, broker: Broker, when: str
) -> None:
    await produce(broker, once(broker))
    async with connected(broker) as worker:
        (lease,) = worker.assigned
        await worker.say(frames.Started((lease,)))
        if when == "finished":
            await worker.report(lease, ResultStatus.COMPLETE)
            await broker.settle()
        await produce(broker, once(broker))
        await trio.sleep(1)
        assert worker.assigned == [lease]
