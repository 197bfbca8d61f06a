"""A task's own signs of life on their way through a broker: deadlines move, operators see how far it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from taskd.activation.lifecycle import Status
from taskd.admin.inspect import METHOD, Inspect
from taskd.admin.wait import Seen, get_status
from taskd.errors import StoreError
from taskd.inflight.base import Policy
from taskd.rpc.base import Unary
from taskd.wire import frames, frames_codec
from taskd.wire.frames import LeaseRef, ResultStatus, StopReason, TaskProgress

Broker = Any
Clock = Any  # pytest-trio takes the clock among the test's own arguments only
DEADLINE_S, GRACE_S = 10, 3


class Worker:
    """A worker with room for everything."""

    def __init__(self) -> None:
        self._to_broker, self._from_worker = trio.open_memory_channel[bytes](100)
        self.assigned: dict[str, LeaseRef] = {}
        self.stops: list[frames.Stop] = []
        self.welcome = frames.Welcome(0, "", 0)

    async def say(self, frame: frames.WorkerFrame) -> None:
        await self._to_broker.send(frames_codec.encode_worker_frame(frame))

    async def start(self, id_: str) -> LeaseRef:
        await self.say(frames.Started((self.assigned[id_],)))
        return self.assigned[id_]

    async def beat(self, lease: LeaseRef, permille: int | None = None, message: str = "") -> None:
        await self.say(frames.Heartbeat((TaskProgress(*lease, permille, message),)))

    # the stream's face

    async def receive(self) -> bytes | None:
        return await self._from_worker.receive()

    async def send(self, body: bytes) -> None:
        match frames_codec.decode_broker_frame(body):
            case frames.Welcome() as welcome:
                self.welcome = welcome
            case frames.Assignments(assignments):
                self.assigned |= {item.id: item.lease for item in assignments}
            case frames.Stop() as stop:
                self.stops.append(stop)


@asynccontextmanager
async def connected(broker: Broker, id_: str = "w1") -> AsyncIterator[Worker]:
    worker = Worker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.stream.work, worker)
        await worker.say(frames.Hello(id_, "default"))
        await worker.say(frames.Credit(1, 1_000, 1_000))
        await broker.settle()
        yield worker
        nursery.cancel_scope.cancel()


async def produce(broker: Broker, *ids: str, **fields: Any) -> None:
    await broker.produce(*(broker.activation(id_, **fields) for id_ in ids))
    await broker.settle()


class Operator:
    """Asks as `taskd status` does."""

    def __init__(self, broker: Broker) -> None:
        self._inspect = Inspect(broker.inflight)

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        method = self._inspect.services[METHOD]
        assert isinstance(method, Unary)
        answer = await method.handler(body)
        assert isinstance(answer, bytes)
        return answer

    async def look(self, id_: str) -> Seen:
        (seen,) = await get_status(self, [id_])
        return seen


async def test_a_task_that_gives_heartbeats_runs_on_and_its_silent_neighbour_does_not(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "lively", "silent")
    operator = Operator(broker)
    async with connected(broker) as worker:
        lively = await worker.start("lively")
        silent = await worker.start("silent")
        for step in range(10):
            await trio.sleep(DEADLINE_S - 1)
            await worker.beat(lively, step * 100, f"step {step}")
            await broker.settle()
        seen = await operator.look("lively")
        assert (seen.state, seen.attempts, seen.permille, seen.message) == ("processing", 1, 900, "step 9")
        assert (seen.worker, seen.fence, seen.heartbeat_age_ms) == ("w1", lively.fence, 0)
        assert seen.deadline_in_ms == (DEADLINE_S + GRACE_S) * 1000
        assert worker.assigned["silent"].fence > silent.fence, "it waited again, and was handed out again"
        await worker.say(frames.Results((frames.Result(*lively, ResultStatus.COMPLETE),)))
        await broker.settle()
        assert (await operator.look("lively")).outcome == "complete"


async def test_heartbeats_lead_no_further_than_the_limit(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    policy = Policy(max_processing_deadline_ms=25_000)
    async with open_broker(tmp_path, policy=policy) as broker, connected(broker) as worker:
        assert worker.welcome.max_deadline_ms == 25_000
        await produce(broker, "a")
        lease = await worker.start("a")
        begin = trio.current_time()
        while worker.assigned["a"] == lease:
            await worker.beat(lease)
            await trio.sleep(0.5)
        assert 25 + GRACE_S <= trio.current_time() - begin <= 25 + GRACE_S + 2


async def test_a_heartbeat_under_a_lost_lease_is_answered_with_a_stop(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a", "b")
    async with connected(broker) as worker:
        lost, own = await worker.start("a"), await worker.start("b")
        while worker.assigned["a"] == lost:
            await trio.sleep(1)
            await worker.beat(own)
        await worker.say(frames.Heartbeat((TaskProgress(*lost, 990), TaskProgress(*own, 10))))
        await broker.settle()
        assert worker.stops == [frames.Stop((lost,), StopReason.LOST)]
        assert (await Operator(broker).look("a")).permille is None
        assert (await Operator(broker).look("b")).permille == 10


async def test_a_heartbeat_that_comes_with_the_result_changes_nothing(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a")
    async with connected(broker) as worker:
        lease = await worker.start("a")
        await worker.say(frames.Results((frames.Result(*lease, ResultStatus.COMPLETE),)))
        await worker.beat(lease, 1000, "done")
        await broker.settle()
        seen = await Operator(broker).look("a")
        assert (seen.outcome, seen.permille, seen.message) == ("complete", None, "")


async def test_without_the_parent_no_lease_lives_on_its_heartbeats(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a")
    async with connected(broker) as worker:
        lease = await worker.start("a")
        await worker.beat(lease, 500)
        await broker.settle()
    await trio.sleep(DEADLINE_S + GRACE_S + 2)
    (found,) = await broker.inflight.describe(["a"])
    assert (found.status, found.permille) == (Status.PENDING, None)


async def test_a_disk_that_takes_nothing_costs_heartbeats_not_the_stream(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await produce(broker, "a")
    async with connected(broker) as worker:
        lease = await worker.start("a")
        await broker.settle()

        async def full(heartbeats: object) -> None:
            raise StoreError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(broker.inflight, "heartbeat", full)
            await worker.beat(lease, 100)
            await broker.settle()
        await worker.beat(lease, 200)
        await broker.settle()
        assert (await Operator(broker).look("a")).permille == 200


async def test_what_a_worker_says_is_cut_to_size(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a")
    async with connected(broker) as worker:
        await worker.beat(await worker.start("a"), 10**9, "x" * 100_000)
        await broker.settle()
        seen = await Operator(broker).look("a")
        assert (seen.permille, len(seen.message)) == (1_000, 200)
