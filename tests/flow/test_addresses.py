"""A pool whose addresses lead elsewhere than one thinks: two to one broker, one to several in turn."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

import taskd.worker.entry_pipe as pipe
from taskd.activation.lifecycle import Status
from taskd.config.schema import PoolSection
from taskd.errors import PeerUnavailable
from taskd.rpc.base import ClientStream
from taskd.wire.envelope import scan
from taskd.wire.frames import ResultStatus
from taskd.worker.child import Child, ChildGone, Piece
from taskd.worker.output import Whose, nobody
from taskd.worker.pool import Pool, run_pool

Broker = Any
DONE = pipe.Verdict(int(ResultStatus.COMPLETE))
FAILED = pipe.Verdict(int(ResultStatus.FAILURE))
RUN_S = 20.0


class SlowChild:
    """Takes twenty seconds for each task."""

    pid = 1
    ready = pipe.Ready((pipe.KnownTask("app", "ns", "task"),))
    rss_bytes = 0
    whose: Whose = staticmethod(nobody)

    def __init__(self, started: list[str]) -> None:
        self._started = started
        self._given = 0
        self._work_in, self._work = trio.open_memory_channel[tuple[int, Piece]](1_000)
        self._out, self._reports = trio.open_memory_channel[pipe.Report](1_000)

    async def run(self) -> None:
        async for number, piece in self._work:
            self._started.append(scan(piece.activation).id)
            self._out.send_nowait(pipe.Started(number, FAILED))
            await trio.sleep(RUN_S)
            self._out.send_nowait(pipe.Done(number, DONE, 1))

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

    def dismiss(self, *, alone: bool = False) -> None:
        self._work_in.close()

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        pass

    def terminate(self, number: int) -> None:
        pass

    def kill(self) -> None:
        self._out.close()


class SlowSpawner:
    def __init__(self) -> None:
        self.started: list[str] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Child]:
        child = SlowChild(self.started)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            yield child
            nursery.cancel_scope.cancel()


class End:
    """One end of a stream in memory."""

    def __init__(self, out: trio.MemorySendChannel[bytes], into: trio.MemoryReceiveChannel[bytes]) -> None:
        self._out, self._into = out, into

    async def send(self, body: bytes) -> None:
        try:
            await self._out.send(body)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise PeerUnavailable from None

    async def receive(self) -> bytes | None:
        async for body in self._into:
            return body
        return None

    async def finish(self) -> None:
        await self._out.aclose()


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
        to_broker, at_broker = trio.open_memory_channel[bytes](100)
        to_worker, at_worker = trio.open_memory_channel[bytes](100)
        broker = self.brokers[address.partition(":")[0]]
        scope = trio.CancelScope()
        self._scopes.append(scope)

        async def serve() -> None:
            with scope:
                await broker.stream.work(End(to_worker, at_broker))
            to_worker.close()
            at_broker.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield End(to_broker, at_worker)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_pool(network: Network, **config: Any) -> AsyncIterator[tuple[Pool, SlowSpawner]]:
    spawner, stop = SlowSpawner(), trio.Event()
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
