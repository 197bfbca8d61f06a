"""A pool with plain and async tasks at a broker, in virtual time: neither kind waits for the other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from slow_children import SlowSpawner, open_stream
from trio.testing import MockClock

import taskd.worker.entry_pipe as pipe
from taskd.activation.lifecycle import Status
from taskd.config.schema import PoolSection
from taskd.rpc.base import ClientStream
from taskd.worker.pool import Pool, run_pool

Broker = Any
TASKS = (pipe.KnownTask("app", "ns", "plain"), pipe.KnownTask("app", "ns", "loop", True))
RUN_S = 10.0


@asynccontextmanager
async def open_pool(broker: Broker, **config: Any) -> AsyncIterator[tuple[Pool, SlowSpawner, SlowSpawner]]:
    plain = SlowSpawner(*TASKS, run_s=RUN_S)
    of_loop = SlowSpawner(*TASKS, run_s=RUN_S, at_once=1_000)
    stop = trio.Event()

    @asynccontextmanager
    async def connect(address: str) -> AsyncIterator[ClientStream]:
        ours, theirs = open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.stream.work, theirs)
            yield ours
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
        ids = await produce(broker, "plain", 1)
        await trio.sleep(5)
        assert (plain.started, of_loop.children) == (ids, 0)
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
