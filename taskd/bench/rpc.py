"""What the unary protocol costs, against an empty call to the same server in the same run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from taskd import aio
from taskd.bench.figures import BenchFailed, Report, Step, at_least, spread
from taskd.bench.scene import open_scene
from taskd.bench.tasks import bench
from taskd.bench.traffic import send, until_counted
from taskd.clock import monotonic_s
from taskd.config.schema import ProducerConfig
from taskd.producer.client import open_producer
from taskd.rpc.client import Client, connect
from taskd.wire import consumer
from taskd.wire.consumer import Filter, StatusUpdate
from taskd.wire.envelope import scan

HEALTH = "/grpc.health.v1.Health/Check"
CALL_WITHIN_S = 30.0
FIRST_WITHIN_S = 10.0
LOOK_EVERY_S = 0.1
OURS = Filter(namespace=bench.name, application=bench.application)
LEAST_SHARE = 0.8
MORE_THAN_ENOUGH_PER_S = 6_000  # activations to have waiting for each second of the run

Call = Callable[[], Awaitable[None]]


async def rpc(
    folder: Path,
    report: Report,
    step: Step,
    *,
    seconds: float,
    rounds: int,
    in_flight: int,
    existing: ProducerConfig | None = None,
) -> None:
    """`rounds` of an empty call and of SetTaskStatus with the next task, `seconds` each, in turn."""
    async with open_scene(folder, existing=existing) as scene, aio.open_loop():
        brokers = await scene.brokers()
        count = int(MORE_THAN_ENOUGH_PER_S * seconds * (rounds + 1))
        async with open_producer(scene.producer) as producer:
            await send(producer, count, 0, lambda done: step(40 * done // count, "sending"))
        if brokers:
            await until_counted(scene, "arrived", count, brokers, lambda n: step(45, "storing"))
        echoes: list[float] = []
        works: list[float] = []
        async with connect(scene.address, scene.access) as client:

            async def echo() -> None:
                await client.call(HEALTH, b"", timeout_s=CALL_WITHIN_S)

            workers = [await _worker(client) for _ in range(in_flight)]
            for number in range(rounds):
                step(50 + 45 * number // rounds, "calling")
                echoes.append(await _per_s([echo] * in_flight, seconds))
                works.append(await _per_s([worker.report_and_fetch for worker in workers], seconds))
            sequential = await _per_s([workers[0].report_and_fetch], seconds)
            if existing is not None:
                step(95, "clearing up")
                async with trio.open_nursery() as nursery:
                    for worker in workers:
                        nursery.start_soon(worker.take_the_rest)
        for broker in brokers:
            await broker.stop()
    shares = [work / echoed for work, echoed in zip(works, echoes, strict=True)]
    report.add("empty call", max(echoes), "/s", detail=f"{spread(echoes)}, {in_flight} in flight")
    report.add("SetTaskStatus and next task", max(works), "/s", detail=spread(works))
    report.add("share of the empty call", sorted(shares)[len(shares) // 2], "", target=at_least(LEAST_SHARE),
               detail=spread(shares))  # fmt: skip
    report.add("one at a time", sequential, "/s")


class _Worker:
    """Has a task, and gets the next one with each report."""

    def __init__(self, client: Client, id_: str | None) -> None:
        self._client = client
        self._id = id_

    async def report_and_fetch(self) -> None:
        if self._id is None:
            raise BenchFailed("the broker had no task left; give it more with a shorter run")
        update = StatusUpdate(self._id, consumer.COMPLETE, fetch_next=OURS)
        request = consumer.encode_status_update(update)
        self._id = _id(await self._client.call(consumer.SET_TASK_STATUS, request, timeout_s=CALL_WITHIN_S))

    async def take_the_rest(self) -> None:
        """Leave nothing of ours behind."""
        while self._id is not None:
            await self.report_and_fetch()


async def _worker(client: Client) -> _Worker:
    request, id_ = consumer.encode_filter(OURS), None
    with trio.move_on_after(FIRST_WITHIN_S):
        while id_ is None:  # it may not be stored yet
            id_ = _id(await client.call(consumer.GET_TASK, request, timeout_s=CALL_WITHIN_S))
            await trio.sleep(0 if id_ else LOOK_EVERY_S)
    return _Worker(client, id_)


def _id(answer: bytes) -> str | None:
    raw = consumer.decode_task(answer)
    return None if raw is None else scan(raw).id


async def _per_s(calls: list[Call], seconds: float) -> float:
    """Each call again and again, all at once, for so long. Calls a second."""
    done = 0

    async def repeat(call: Call) -> None:
        nonlocal done
        while monotonic_s() < until_s:
            await call()
            done += 1

    began_s = monotonic_s()
    until_s = began_s + seconds
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(repeat, call)
    return done / (monotonic_s() - began_s)
