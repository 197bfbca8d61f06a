"""A pool whose addresses lead elsewhere than one thinks: two to one broker, one to several in turn."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from slow_children import SlowSpawner, open_stream
from trio.testing import MockClock

import taskd.worker.entry_pipe as pipe
from taskd.activation.lifecycle import Status
from taskd.config.schema import PoolSection
from taskd.errors import PeerUnavailable
from taskd.rpc.base import ClientStream
from taskd.worker.pool import Pool, run_pool

Broker = Any
RUN_S = 20.0


class Network:
    """Who answers at which address; `cut` ends the connections there are."""

    def __init__(self, **brokers: Broker) -> None:
        self.brokers = dict(brokers)
        self.connects: list[str] = []
        self._scopes: list[trio.CancelScope] = []

    def cut(self) -> None:
        for scope in self._scopes:
            scope.cancel()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[ClientStream]:
        if self.brokers[address.partition(":")[0]] is None:
            raise PeerUnavailable
        self.connects.append(address)
        ours, theirs = open_stream()
        broker = self.brokers[address.partition(":")[0]]
        scope = trio.CancelScope()
        self._scopes.append(scope)

        async def serve() -> None:
            with scope:
                await broker.stream.work(theirs)
            theirs.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield ours
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_pool(network: Network, **config: Any) -> AsyncIterator[tuple[Pool, SlowSpawner]]:
    spawner, stop = SlowSpawner(pipe.KnownTask("app", "ns", "task"), run_s=RUN_S), trio.Event()
    section = PoolSection(brokers=tuple(f"{name}:1" for name in network.brokers), spare_children=0, **config)

    async def run(task_status: trio.TaskStatus[Pool]) -> None:
        await run_pool(
            section,
            "default",
            stop=stop,
            task_status=task_status,
            spawner=spawner,
            connect=network.connect,
            rng=random.Random(1),
        )

    async with trio.open_nursery() as nursery:
        pool = await nursery.start(run)
        yield pool, spawner
        stop.set()


async def produce(broker: Broker, *ids: str, **fields: Any) -> None:
    await broker.produce(
        *(broker.activation(id_, application="app", processing_deadline_duration=60, **fields) for id_ in ids)
    )


async def finished(broker: Broker) -> None:
    with trio.fail_after(600):
        while not (counts := broker.inflight.counts()) or counts.total() > counts[Status.GONE]:  # noqa: ASYNC110
            await trio.sleep(1)


async def test_two_addresses_of_one_broker_share_its_work(broker: Broker, autojump_clock: MockClock) -> None:
    network = Network(one=broker, two=broker)
    async with open_pool(network, slots=2) as (pool, spawner):
        await produce(broker, "a", "b", "c")
        await trio.sleep(30)
        connects = len(network.connects)
        await finished(broker)
        assert sorted(spawner.started) == ["a", "b", "c"]
        assert len(network.connects) == connects, "they do not push each other out for ever"
        assert pool.brokers == (1, 2)


async def test_the_other_address_serves_when_the_used_one_is_gone(
    broker: Broker, autojump_clock: MockClock
) -> None:
    network = Network(one=broker, two=broker)
    async with open_pool(network, slots=2) as (pool, spawner):
        await trio.sleep(30)
        (used,) = [link.address for link in pool.links if link.connected]
        network.brokers[used.partition(":")[0]] = None
        network.cut()
        await produce(broker, "a")
        await finished(broker)
        assert spawner.started == ["a"]


async def test_a_second_address_of_a_broker_that_comes_later_ends_no_lease(
    broker: Broker, autojump_clock: MockClock, open_broker: Callable[..., Any], tmp_path: Path
) -> None:
    """As when a broker moves to an address whose own one is gone."""
    (tmp_path / "other").mkdir()
    async with open_broker(tmp_path / "other") as other:
        network = Network(one=broker, two=other)
        async with open_pool(network, slots=2) as (_, spawner):
            await produce(broker, "a")
            await trio.sleep(1)
            assert spawner.started == ["a"]
            network.brokers = {"one": other, "two": broker}
            network.cut()
            await trio.sleep(5)
            assert (await broker.inflight.describe(["a"]))[0].status is Status.PROCESSING
            await finished(broker)
            assert spawner.started == ["a"]


async def test_an_address_that_leads_elsewhere_for_a_while_ends_no_lease(
    broker: Broker, autojump_clock: MockClock, open_broker: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    async with open_broker(tmp_path / "other") as other:
        network = Network(one=broker)
        async with open_pool(network, slots=1) as (_, spawner):
            await produce(broker, "a")
            await trio.sleep(1)
            for answers in (other, broker):
                network.brokers = {"one": answers}
                network.cut()
                await trio.sleep(2)
            assert (await broker.inflight.describe(["a"]))[0].status is Status.PROCESSING
            await finished(broker)
            assert spawner.started == ["a"]
