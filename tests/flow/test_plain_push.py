"""A worker that is pushed to, in virtual time: our broker's push delivery against its service."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from taskd.config.schema import PoolSection
from taskd.dispatch.push import PushDispatch, PushSettings
from taskd.errors import PeerUnavailable, PeerUnreachable, Refused
from taskd.rpc.base import Reply, Unary
from taskd.rpc.health import CHECK
from taskd.wire import pushing
from taskd.wire.frames import Result, ResultStatus, TaskName
from taskd.wire.generated.grpc.health.v1 import HealthCheckRequest, HealthCheckResponse
from taskd.worker.backlog import Backlog
from taskd.worker.push import PushLink
from taskd.worker.results import Job
from taskd.worker.routing import AsyncTasks

Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only

URL = "http://worker:1"


class Worker:
    """Slots that take a second for every task, behind a `PushLink`. It is also its own broker's client."""

    def __init__(self, broker: Broker, slots: int, **config: Any) -> None:
        self.broker = broker
        self.slots = slots
        self.started: list[str] = []
        self.async_room = 0
        self.warm = True
        self.takes_results = True
        self.backlog = Backlog(self._changed, self._changed, lambda: None, hands_back=False)
        self._change = trio.Event()
        self.link = PushLink(
            "broker:1",
            PoolSection(protocol="push", **config),
            self.backlog,
            free_slots=self._free,
            is_ready=lambda: self.warm,
            connect=self._to_broker,
            on_change=self._changed,
            rng=random.Random(1),
        )

    def _free(self, is_async: bool) -> int:
        held = self.backlog.async_count if is_async else self.backlog.jobs_count - self.backlog.async_count
        return (self.async_room if is_async else self.slots) - held

    def _changed(self) -> None:
        self._change.set()
        self._change = trio.Event()
        self.link.wake()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(600):
            while not condition():
                await self._change.wait()

    @asynccontextmanager
    async def _to_broker(self, address: str) -> AsyncIterator[Calls]:
        yield Calls(lambda: self.broker.unary.services if self.takes_results else None)

    @asynccontextmanager
    async def to_worker(self, url: str) -> AsyncIterator[Calls]:
        yield Calls(lambda: self.link.services)

    async def push(self, id_: str, **fields: Any) -> None:
        body = pushing.encode_push(self.broker.activation(id_, **{"application": "shop", **fields}))
        await Calls(lambda: self.link.services).call(pushing.PUSH_TASK, body, timeout_s=30)

    async def health(self, service: str) -> int:
        body = await Calls(lambda: self.link.services).call(
            CHECK, bytes(HealthCheckRequest(service=service)), timeout_s=1
        )
        return int(HealthCheckResponse.parse(body).status)

    async def slot(self) -> None:
        while True:
            for job in self.backlog.take(1, self.slots, trio.current_time()):
                await self._run(job)
                break
            else:
                await self._change.wait()

    async def _run(self, job: Job) -> None:
        self.started.append(job.lease.id)
        job.account.start(job)
        self._changed()
        await trio.sleep(1)
        job.account.finish(job, Result(job.lease.id, 0, ResultStatus.COMPLETE))
        self._changed()


class Calls:
    """Calls to whoever has these services; None: to nobody."""

    def __init__(self, services: Callable[[], Any]) -> None:
        self._services = services

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        await trio.sleep(0.001)
        services = self._services()
        if services is None:
            raise PeerUnreachable
        service = services[path]
        assert isinstance(service, Unary)
        try:
            with trio.fail_after(timeout_s):
                reply = await service.handler(body)
        except Refused as error:
            if error.code == "UNAVAILABLE":
                raise PeerUnavailable(error.message) from None
            raise
        return reply.body if isinstance(reply, Reply) else reply


@asynccontextmanager
async def working(broker: Broker, slots: int = 2, **config: Any) -> AsyncIterator[Worker]:
    worker = Worker(broker, slots, **config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.link.run)
        for _ in range(slots):
            nursery.start_soon(worker.slot)
        yield worker
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def pushing_to(broker: Broker, worker: Worker) -> AsyncIterator[None]:
    push = PushDispatch(
        broker.inflight, worker.to_worker, broker.draining, {"shop": URL}, PushSettings(30.0, 4)
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(push.run)
        yield
        nursery.cancel_scope.cancel()


async def produce(broker: Broker, *ids: str) -> None:
    await broker.produce(*[broker.activation(id_, application="shop") for id_ in ids])
    await broker.settle()


async def test_what_is_pushed_runs_without_pause_and_is_reported(
    autojump_clock: Clock, broker: Broker
) -> None:
    ids = [f"t{number:02}" for number in range(20)]
    await produce(broker, *ids)
    async with working(broker) as worker, pushing_to(broker, worker):
        begin = trio.current_time()
        await worker.until(lambda: len(worker.started) == 20 and not worker.backlog.jobs_count)
        # Callers wait at the door, so a slot never waits for a call.
        assert trio.current_time() - begin < 10.5
        assert sorted(worker.started) == ids
        await worker.until(lambda: worker.backlog.settled)
    assert {found.outcome for found in await broker.inflight.describe(ids)} == {"complete"}
    assert {found.attempts for found in await broker.inflight.describe(ids)} == {1}


async def test_a_caller_waits_five_seconds_for_a_slot(autojump_clock: Clock, broker: Broker) -> None:
    async with working(broker, slots=0) as worker:
        begin = trio.current_time()
        with pytest.raises(Refused, match="worker busy") as refused:
            await worker.push("a")
        assert refused.value.code == "RESOURCE_EXHAUSTED"
        assert 5 <= trio.current_time() - begin < 5.1
        assert worker.backlog.jobs_count == 0


async def test_an_async_task_waits_for_no_slot_of_the_others(autojump_clock: Clock, broker: Broker) -> None:
    async with working(broker, slots=0) as worker:
        worker.backlog.async_tasks = AsyncTasks([TaskName("shop", "ns", "awaits")])
        worker.async_room = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy, worker, "plain", "task")
            await worker.push("first", taskname="awaits")
            assert trio.current_time() < 1
            await busy(worker, "second", "awaits")
        assert [job.lease.id for job in worker.link.account.jobs.values()] == ["first"]


async def busy(worker: Worker, id_: str, taskname: str) -> None:
    with pytest.raises(Refused, match="worker busy"):
        await worker.push(id_, taskname=taskname)


async def test_results_are_kept_while_the_broker_is_gone(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a", "b")
    async with working(broker) as worker, pushing_to(broker, worker):
        await worker.until(lambda: len(worker.started) == 2)
        worker.takes_results = False
        await trio.sleep(8)
        assert worker.backlog.untaken_count == 2
        assert worker.link.state == "down"
        worker.takes_results = True
        await worker.until(lambda: worker.backlog.settled)
        assert worker.link.connected
    assert {found.outcome for found in await broker.inflight.describe(["a", "b"])} == {"complete"}


async def test_results_are_told_soon_to_a_broker_that_is_back_when_the_worker_stops(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a")
    async with working(broker) as worker, pushing_to(broker, worker):
        await worker.until(lambda: len(worker.started) == 1)
        worker.takes_results = False
        await trio.sleep(100)
        with trio.fail_after(60):
            while worker.link._due() < trio.current_time() + 4:  # noqa: ASYNC110  # tries in a moment
                await trio.sleep(0.1)
        worker.takes_results = True
        worker.backlog.close()
        with trio.fail_after(1):
            await worker.until(lambda: worker.backlog.settled)


async def test_what_is_pushed_again_while_it_is_here_runs_once(autojump_clock: Clock, broker: Broker) -> None:
    async with working(broker) as worker:
        worker.takes_results = False
        await worker.push("a")
        await worker.push("a")
        await worker.until(lambda: worker.backlog.untaken_count == 1)
        await worker.push("a")
        await trio.sleep(5)
        assert worker.started == ["a"]


async def test_a_worker_that_stops_takes_nothing_and_finishes_what_it_has(
    autojump_clock: Clock, broker: Broker
) -> None:
    ids = ["a", "b", "c", "d"]
    await produce(broker, *ids)
    async with working(broker, slots=1) as worker, pushing_to(broker, worker):
        await worker.until(lambda: len(worker.started) == 1)
        worker.backlog.close()
        assert await worker.health("") == HealthStatus.NOT_SERVING
        with pytest.raises(PeerUnavailable, match="stopping"):
            await worker.push("e")
        await worker.until(lambda: not worker.backlog.jobs_count and worker.backlog.settled)
        worker.link.close()
        await worker.until(lambda: not worker.link.connected)
    (started,) = worker.started
    for found in await broker.inflight.describe(ids):
        ran = found.id == started
        assert (found.outcome, found.attempts) == (("complete", 1) if ran else ("", 0))


class HealthStatus:
    SERVING, NOT_SERVING = 1, 2


async def test_health_tells_whether_children_are_warm(autojump_clock: Clock, broker: Broker) -> None:
    async with working(broker) as worker:
        for service in ("", "sentry_protos.taskbroker.v1.WorkerService"):
            worker.warm = False
            assert await worker.health(service) == HealthStatus.NOT_SERVING
            worker.warm = True
            assert await worker.health(service) == HealthStatus.SERVING
        with pytest.raises(Refused) as refused:
            await worker.health("sentry_protos.taskbroker.v1.ConsumerService")
        assert refused.value.code == "NOT_FOUND"


async def test_what_is_for_somebody_else_is_refused_with_the_reason(
    autojump_clock: Clock, broker: Broker
) -> None:
    async with working(broker, application="shop", namespaces=("mail",)) as worker:
        for fields in ({"application": "bank", "namespace": "mail"}, {"namespace": "bills"}):
            with pytest.raises(Refused, match="worker_map") as refused:
                await worker.push("a", **fields)
            assert refused.value.code == "FAILED_PRECONDITION"
        await worker.push("b", namespace="mail")
        await worker.until(lambda: worker.started == ["b"])


@pytest.mark.parametrize("body", [b"", b"\x0a\x05abc", b"\x0a\x02\xff\xff", b"\x0a\x00"])
async def test_what_is_no_task_is_refused(autojump_clock: Clock, broker: Broker, body: bytes) -> None:
    async with working(broker) as worker:
        with pytest.raises(Refused) as refused:
            await Calls(lambda: worker.link.services).call(pushing.PUSH_TASK, body, timeout_s=1)
        assert refused.value.code == "INVALID_ARGUMENT"
