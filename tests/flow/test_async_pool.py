"""A pool with plain and async tasks at a broker, in virtual time: neither kind waits for the other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import taskd.worker.entry_pipe as pipe
from taskd.activation.lifecycle import Status
from taskd.config.schema import PoolSection
from taskd.rpc.base import ClientStream
from taskd.wire.envelope import scan
from taskd.wire.frames import ResultStatus
from taskd.worker.async_watch import AsyncChild
from taskd.worker.child import ChildGone, Piece
from taskd.worker.output import Whose, nobody
from taskd.worker.pool import Pool, run_pool

Broker = Any
DONE = pipe.Verdict(int(ResultStatus.COMPLETE))
FAILED = pipe.Verdict(int(ResultStatus.FAILURE))
TASKS = (pipe.KnownTask("app", "ns", "plain"), pipe.KnownTask("app", "ns", "loop", True))
RUN_S = 10.0


class SlowChild:
    """Takes ten seconds for each task; `at_once` of them at the same time."""

    pid = 1
    ready = pipe.Ready(TASKS)
    rss_bytes = 0
    whose: Whose = nobody

    def __init__(self, at_once: int, started: list[str]) -> None:
        self._slots = trio.Semaphore(at_once)
        self._started = started
        self._given = 0
        self._work_in, self._work = trio.open_memory_channel[tuple[int, Piece]](1_000)
        self._out, self._reports = trio.open_memory_channel[pipe.Report](1_000)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for number, piece in self._work:
                await self._slots.acquire()
                nursery.start_soon(self._task, number, piece)

    async def _task(self, number: int, piece: Piece) -> None:
        self._started.append(scan(piece.activation).id)
        self._out.send_nowait(pipe.Started(number, FAILED))
        await trio.sleep(RUN_S)
        self._out.send_nowait(pipe.Done(number, DONE, 1))
        self._slots.release()

    async def send(self, work: Sequence[Piece]) -> None:
        for piece in work:
            self._given += 1
            await self._work_in.send((self._given, piece))

    async def receive(self) -> list[pipe.Report]:
        try:
            return [await self._reports.receive()]
        except trio.EndOfChannel:
            raise ChildGone from None

    def take_back(self) -> int:
        return 0

    def has_started(self) -> bool:
        return False

    def look(self) -> None:
        pass

    def step(self) -> pipe.Step:
        return pipe.Step(0, int(trio.current_time() * 10))

    def dismiss(self) -> None:
        self._work_in.close()

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        pass

    def terminate(self, number: int) -> None:
        pass

    def kill(self) -> None:
        self._out.close()


class SlowSpawner:
    def __init__(self, at_once: int) -> None:
        self.started: list[str] = []
        self.children = 0
        self._at_once = at_once

    @asynccontextmanager
    async def open(self) -> AsyncIterator[AsyncChild]:
        child = SlowChild(self._at_once, self.started)
        self.children += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            yield child
            nursery.cancel_scope.cancel()


class End:
    """One end of a stream in memory."""

    def __init__(self, out: trio.MemorySendChannel[bytes], into: trio.MemoryReceiveChannel[bytes]) -> None:
        self._out, self._into = out, into

    async def send(self, body: bytes) -> None:
        await self._out.send(body)

    async def receive(self) -> bytes | None:
        async for body in self._into:
            return body
        return None

    async def finish(self) -> None:
        await self._out.aclose()


@asynccontextmanager
async def open_pool(broker: Broker, **config: Any) -> AsyncIterator[tuple[Pool, SlowSpawner, SlowSpawner]]:
    plain, of_loop = SlowSpawner(1), SlowSpawner(1_000)
    stop = trio.Event()

    @asynccontextmanager
    async def connect(address: str) -> AsyncIterator[ClientStream]:
        to_broker, at_broker = trio.open_memory_channel[bytes](100)
        to_worker, at_worker = trio.open_memory_channel[bytes](100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.stream.work, End(to_worker, at_broker))
            yield End(to_broker, at_worker)
            nursery.cancel_scope.cancel()

    async def run(task_status: trio.TaskStatus[Pool]) -> None:
        await run_pool(
            PoolSection(brokers=("b:1",), **config),
            "default",
            stop=stop,
            task_status=task_status,
            spawner=plain,
            async_spawner=of_loop,
            connect=connect,
            rng=random.Random(1),
        )

    async with trio.open_nursery() as nursery:
        pool = await nursery.start(run)
        yield pool, plain, of_loop
        stop.set()


async def produce(broker: Broker, task: str, count: int) -> list[str]:
    first = broker.inflight.counts().total()
    ids = [f"{task}{first + number}" for number in range(count)]
    await broker.produce(
        *(
            broker.activation(id_, application="app", taskname=task, processing_deadline_duration=60)
            for id_ in ids
        )
    )
    return ids


def left(broker: Broker) -> int:
    """What has not finished."""
    counts: Counter[Status] = broker.inflight.counts()
    return counts.total() - counts[Status.GONE]


async def test_async_work_does_not_wait_behind_plain_work(broker: Broker, autojump_clock: MockClock) -> None:
    async with open_pool(broker, slots=1, async_slots=3) as (pool, plain, of_loop):
        await produce(broker, "plain", 8)
        await trio.sleep(5)
        ids = await produce(broker, "loop", 4)
        await trio.sleep(1)
        assert plain.started == ["plain0"]
        assert of_loop.started == ids[:3]
        assert pool.statistics().waiting == 0, "what has no slot stays at the broker"
        await trio.sleep(100)
        assert len(plain.started) == 8
        assert of_loop.started == ids
        assert left(broker) == 0


async def test_plain_work_does_not_wait_behind_async_work(broker: Broker, autojump_clock: MockClock) -> None:
    async with open_pool(broker, slots=1, async_slots=2) as (pool, plain, of_loop):
        await produce(broker, "loop", 8)
        await trio.sleep(5)
        ids = await produce(broker, "plain", 2)
        await trio.sleep(1)
        assert of_loop.started == ["loop0", "loop1"]
        assert plain.started == ids[:1]
        assert pool.statistics().waiting == 0
        await trio.sleep(100)
        assert len(of_loop.started) == 8
        assert plain.started == ids


async def test_many_async_activations_are_taken_at_once(broker: Broker, autojump_clock: MockClock) -> None:
    async with open_pool(broker, slots=1, async_slots=100) as (pool, _, of_loop):
        await produce(broker, "loop", 90)
        await trio.sleep(1)
        assert len(of_loop.started) == 90
        assert pool.statistics().async_running == 90
        await trio.sleep(11)
        assert left(broker) == 0


@pytest.mark.parametrize("at_once", [True, False])
async def test_several_children_get_equally_many(
    broker: Broker, autojump_clock: MockClock, at_once: bool
) -> None:
    async with open_pool(broker, slots=1, async_slots=40, async_children=4) as (pool, _, of_loop):
        for _ in range(1 if at_once else 20):
            await produce(broker, "loop", 20 if at_once else 1)
            await trio.sleep(0.1)
        assert of_loop.children == 4
        assert [slot.jobs_count for slot in pool.async_part.slots] == [5, 5, 5, 5]


async def test_a_pool_without_room_for_async_tasks_leaves_them_to_others(
    broker: Broker, autojump_clock: MockClock
) -> None:
    async with open_pool(broker, slots=1, async_slots=0) as (_, plain, of_loop):
        await produce(broker, "loop", 1)
        await produce(broker, "plain", 1)
        await trio.sleep(5)
        assert (plain.started, of_loop.children) == (["plain0"], 0)
        assert left(broker) == 2


async def test_a_drain_lets_async_tasks_finish(broker: Broker, autojump_clock: MockClock) -> None:
    async with open_pool(broker, slots=1, async_slots=2) as (pool, _, of_loop):
        await produce(broker, "loop", 5)
        await trio.sleep(1)
    assert of_loop.started == ["loop0", "loop1"]
    assert left(broker) == 3
    assert pool.statistics().in_children == 0


async def test_what_outlives_the_grace_of_a_drain_runs_again_elsewhere(
    broker: Broker, autojump_clock: MockClock
) -> None:
    async with open_pool(broker, slots=1, async_slots=2, drain_grace_s=3.0) as (_, __, of_loop):
        await produce(broker, "loop", 2)
        await trio.sleep(1)
    assert of_loop.started == ["loop0", "loop1"]
    assert broker.inflight.counts() == Counter({Status.PENDING: 2})
    async with open_pool(broker, slots=1, async_slots=2) as (_, __, of_loop):
        await trio.sleep(RUN_S + 5)
        assert of_loop.started == ["loop0", "loop1"]
        assert left(broker) == 0
