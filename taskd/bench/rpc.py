"""What the unary protocol costs, against an empty call to the same server in the same run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from taskd import aio
from taskd.bench.figures import BenchFailed, Report, Step, at_least, spread
from taskd.bench.scene import open_scene
from taskd.bench.traffic import send, until_counted
from taskd.clock import monotonic_s
from taskd.producer.client import open_producer
from taskd.rpc.client import Client, connect
from taskd.wire import consumer
from taskd.wire.consumer import Filter, StatusUpdate
from taskd.wire.envelope import scan

HEALTH = "/grpc.health.v1.Health/Check"
CALL_WITHIN_S = 30.0
LEAST_SHARE = 0.8
MORE_THAN_ENOUGH_PER_S = 6_000  # activations to have waiting for each second of the run

Call = Callable[[], Awaitable[None]]


async def rpc(
    folder: Path, report: Report, step: Step, *, seconds: float, rounds: int, in_flight: int
) -> None:
    """`rounds` of an empty call and of SetTaskStatus with the next task, `seconds` each, in turn."""
    async with open_scene(folder) as scene, aio.open_loop():
        broker = await scene.broker()
        count = int(MORE_THAN_ENOUGH_PER_S * seconds * (rounds + 1))
        async with open_producer(scene.producer) as producer:
            await send(producer, count, 0, lambda done: step(40 * done // count, "sending"))
        await until_counted(scene, "arrived", count, [broker], lambda n: step(45, "storing"))
        echoes: list[float] = []
        works: list[float] = []
        async with connect(scene.address) as client:

            async def echo() -> None:
                await client.call(HEALTH, b"", timeout_s=CALL_WITHIN_S)

            for number in range(rounds):
                step(50 + 45 * number // rounds, "calling")
                echoes.append(await _per_s([echo] * in_flight, seconds))
                workers = [await _worker(client) for _ in range(in_flight)]
                works.append(await _per_s(workers, seconds))
            sequential = await _per_s([await _worker(client)], seconds)
        await broker.stop()
    shares = [work / echoed for work, echoed in zip(works, echoes, strict=True)]
    report.add("empty call", max(echoes), "/s", detail=f"{spread(echoes)}, {in_flight} in flight")
    report.add("SetTaskStatus and next task", max(works), "/s", detail=spread(works))
    report.add("share of the empty call", sorted(shares)[len(shares) // 2], "", target=at_least(LEAST_SHARE),
               detail=spread(shares))  # fmt: skip
    report.add("one at a time", sequential, "/s")


async def _worker(client: Client) -> Call:
    """A worker that fetched its first task, and then reports and fetches with each call."""
    raw = consumer.decode_task(
        await client.call(consumer.GET_TASK, consumer.encode_filter(Filter()), timeout_s=CALL_WITHIN_S)
    )
    if raw is None:
        raise BenchFailed("the broker had no task left; give it more with a shorter run")
    id_ = scan(raw).id

    async def report_and_fetch() -> None:
        nonlocal id_
        update = StatusUpdate(id_, consumer.COMPLETE, fetch_next=Filter())
        answer = await client.call(
            consumer.SET_TASK_STATUS, consumer.encode_status_update(update), timeout_s=CALL_WITHIN_S
        )
        following = consumer.decode_task(answer)
        if following is None:
            raise BenchFailed("the broker had no task left; give it more with a shorter run")
        id_ = scan(following).id

    return report_and_fetch


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
