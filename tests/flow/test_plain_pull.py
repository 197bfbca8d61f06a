"""A worker that fetches by unary calls, in virtual time: its links against our broker's unary service."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import Status
from taskd.config.schema import PoolSection
from taskd.errors import PeerTimeout, PeerUnavailable, PeerUnreachable, Refused
from taskd.rpc.base import Reply, Unary
from taskd.rpc.health import CHECK
from taskd.wire import consumer
from taskd.wire.envelope import scan
from taskd.wire.frames import Result, ResultStatus
from taskd.worker.backlog import Backlog
from taskd.worker.pull import PullLink, Turns
from taskd.worker.results import Job

Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only

GET, SET, BATCH = consumer.GET_TASK, consumer.SET_TASK_STATUS, consumer.SET_BATCH_STATUS


class Way:
    """The way to one broker. `fail(path)`: what to raise instead of a call; `lose`: answers to lose once."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.calls: list[tuple[str, float]] = []
        self.most_at_once = 0
        self.fail: Callable[[str], Exception | None] = lambda path: None
        self.lose: set[str] = set()
        self.delay_s = 0.001
        self._at_once = 0

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[Way]:
        yield self

    def count(self, path: str) -> int:
        return sum(called == path for called, _ in self.calls)

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        self.calls.append((path, trio.current_time()))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            with trio.move_on_after(timeout_s):
                await trio.sleep(self.delay_s)
                if (error := self.fail(path)) is not None:
                    raise error
                return await self._answer(path, body)
        finally:
            self._at_once -= 1
        raise PeerTimeout

    async def _answer(self, path: str, body: bytes) -> bytes:
        if path == CHECK:
            raise Refused("UNIMPLEMENTED")  # it answers, and that is all that is asked
        service = self.broker.unary.services[path]
        assert isinstance(service, Unary)
        try:
            reply = await service.handler(body)
        except Refused as error:
            if error.code == "UNAVAILABLE":
                raise PeerUnavailable(error.message) from None
            raise
        if path in self.lose:
            self.lose.remove(path)
            raise PeerUnavailable("the connection was lost")
        return reply.body if isinstance(reply, Reply) else reply


class Worker:
    """Slots that do as they are told: for how long, and what comes of it."""

    def __init__(self, *ways: Way, slots: int = 2, **config: Any) -> None:
        self.slots = slots
        self.started: list[str] = []
        self.seconds: Callable[[str], float] = lambda id_: 0.01
        self.result: Callable[[str], Result] = lambda id_: Result(id_, 0, ResultStatus.COMPLETE)
        self.most_jobs = 0
        self.backlog = Backlog(self._changed, self._changed, lambda: None, hands_back=False)
        self._change = trio.Event()
        turns = Turns(self._free)
        section = PoolSection(protocol="pull", **config)
        self.links = [
            PullLink(
                f"broker:{number}",
                section,
                self.backlog,
                turns,
                connect=way.connect,
                on_change=self._changed,
                rng=random.Random(number),
            )
            for number, way in enumerate(ways, 1)
        ]

    def _free(self) -> int:
        return self.slots - self.backlog.jobs_count

    def _changed(self) -> None:
        self.most_jobs = max(self.most_jobs, self.backlog.jobs_count)
        self._change.set()
        self._change = trio.Event()
        for link in self.links:
            link.wake()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(600):
            while not condition():
                await self._change.wait()

    @property
    def settled(self) -> bool:
        return self.backlog.settled and not self.backlog.jobs_count

    async def slot(self) -> None:
        while True:
            jobs = self.backlog.take(1, self.slots, trio.current_time())
            if jobs:
                await self._run(jobs[0])
            else:
                await self._change.wait()

    async def _run(self, job: Job) -> None:
        id_ = job.lease.id
        self.started.append(id_)
        job.account.start(job)
        self._changed()
        await trio.sleep(self.seconds(id_))
        result = self.result(id_)
        if result.status is ResultStatus.CRASHED:
            job.account.crash(job, result)
        else:
            job.account.finish(job, result)
        self._changed()

    async def stop(self) -> None:
        """As the pool drains: nothing new, finish, report, close."""
        self.backlog.close()
        await self.until(lambda: self.settled)
        for link in self.links:
            link.close()
        await self.until(lambda: not any(link.connected for link in self.links))


@asynccontextmanager
async def working(*ways: Way, slots: int = 2, **config: Any) -> AsyncIterator[Worker]:
    worker = Worker(*ways, slots=slots, **config)
    async with trio.open_nursery() as nursery:
        for link in worker.links:
            nursery.start_soon(link.run)
        for _ in range(slots):
            nursery.start_soon(worker.slot)
        yield worker
        nursery.cancel_scope.cancel()


async def produce(broker: Broker, *ids: str, application: str = "shop", **fields: Any) -> None:
    await broker.produce(*[broker.activation(id_, application=application, **fields) for id_ in ids])
    await broker.settle()


async def look(broker: Broker, id_: str) -> Any:
    (found,) = await broker.inflight.describe([id_])
    return found


async def outcomes(broker: Broker, ids: list[str]) -> Counter[str]:
    return Counter(found.outcome for found in await broker.inflight.describe(ids))


async def test_everything_runs_once_and_no_more_is_taken_than_there_are_slots(
    autojump_clock: Clock, broker: Broker
) -> None:
    ids = [f"t{number}" for number in range(100)]
    await produce(broker, *ids)
    way = Way(broker)
    async with working(way, slots=4) as worker:
        await worker.until(lambda: len(worker.started) == 100 and worker.settled)
        assert worker.most_jobs == 4
        assert sorted(worker.started) == sorted(ids)
        assert set(worker.started[:4]) == set(ids[:4])
    assert await outcomes(broker, ids) == {"complete": 100}
    # The next task comes with the answer to the last one's result.
    assert way.count(GET) < 20
    assert 1 < way.most_at_once <= 5


async def test_one_namespace_after_the_other_is_asked_for_with_the_application(
    autojump_clock: Clock, broker: Broker
) -> None:
    for namespace in ("mail", "bills", "other"):
        await produce(broker, *[f"{namespace}{number}" for number in range(10)], namespace=namespace)
    await produce(broker, "foreign", application="bank", namespace="mail")
    async with working(Way(broker), application="shop", namespaces=("mail", "bills")) as worker:
        await worker.until(lambda: len(worker.started) == 20 and worker.settled)
        await trio.sleep(10)
        assert {id_[:4] for id_ in worker.started[:4]} == {"mail", "bill"}
        assert not [id_ for id_ in worker.started if id_.startswith(("other", "foreign"))]


async def test_retry_failure_and_crash_become_what_the_protocol_has_for_them(
    autojump_clock: Clock, broker: Broker
) -> None:
    def result(id_: str) -> Result:
        match id_:
            case "again":
                return Result(id_, 0, ResultStatus.RETRY, max_attempts=7, delay_on_retry_s=30)
            case "fails":
                return Result(id_, 0, ResultStatus.FAILURE, "error", "by design")
            case "dies":
                return Result(id_, 0, ResultStatus.CRASHED, "crashed", "signal 9")
            case _:
                return Result(id_, 0, ResultStatus.COMPLETE)

    await produce(broker, "again", "fails", "dies", retry_state=broker.dead_letter_policy())
    async with working(Way(broker)) as worker:
        worker.result = result
        await worker.until(lambda: len(worker.started) == 3 and worker.settled)
        begin = trio.current_time()
        await worker.until(lambda: len(worker.started) == 4 and worker.settled)
        assert 29 <= trio.current_time() - begin <= 33
    retry = await look(broker, retry_id("again", 1))
    assert (retry.outcome, worker.started[-1]) == ("complete", retry.id)
    for id_ in ("fails", "dies"):
        found = await look(broker, id_)
        assert (found.outcome, found.dead_lettered) == ("failed", True)
    assert len(await broker.records("taskd-dlq")) == 2


async def test_a_broker_that_has_nothing_is_asked_about_once_a_second(
    autojump_clock: Clock, broker: Broker
) -> None:
    way = Way(broker)
    async with working(way) as worker:
        await trio.sleep(60)
        assert 60 <= way.count(GET) <= 140
        assert way.most_at_once == 1
        times = [time for _, time in way.calls[-50:]]
        assert all(0.5 <= later - sooner <= 1.1 for sooner, later in pairwise(times))
        await produce(broker, "a")
        begin = trio.current_time()
        await worker.until(lambda: worker.started == ["a"])
        assert trio.current_time() - begin <= 1.1


async def test_results_are_kept_while_nobody_takes_them(autojump_clock: Clock, broker: Broker) -> None:
    ids = [f"t{number}" for number in range(10)]
    await produce(broker, *ids, processing_deadline_duration=100)
    way = Way(broker)
    async with working(way, slots=10) as worker:
        worker.seconds = lambda id_: 5
        await worker.until(lambda: len(worker.started) == 10)
        way.fail = lambda path: PeerUnreachable()
        before = len(way.calls)
        await trio.sleep(30)
        assert worker.backlog.untaken_count == 10
        assert not worker.links[0].connected
        assert len(way.calls) - before < 40
        way.fail = lambda path: None
        begin = trio.current_time()
        await worker.until(lambda: worker.settled)
        assert trio.current_time() - begin <= 11
        await worker.until(lambda: worker.links[0].connected)
    assert await outcomes(broker, ids) == {"complete": 10}


@pytest.mark.parametrize("path", [SET, BATCH])
async def test_a_result_whose_answer_was_lost_is_sent_again_and_counts_once(
    autojump_clock: Clock, broker: Broker, path: str
) -> None:
    ids = [f"t{number}" for number in range(20)]
    await produce(broker, *ids)
    way = Way(broker)
    way.lose = {path}
    async with working(way, slots=5) as worker:
        await worker.until(lambda: len(worker.started) >= 20 and worker.settled)
        await trio.sleep(20)  # a task that a lost answer brought comes again after its deadline
        assert not way.lose
        assert Counter(worker.started) == dict.fromkeys(ids, 1)
    assert await outcomes(broker, ids) == {"complete": 20}


async def test_a_broker_without_the_batch_call_gets_one_result_at_a_time(
    autojump_clock: Clock, broker: Broker
) -> None:
    ids = [f"t{number}" for number in range(6)]
    await produce(broker, *ids)
    way = Way(broker)
    way.fail = lambda path: Refused("UNIMPLEMENTED") if path == BATCH else None
    async with working(way, slots=6) as worker:
        worker.seconds = lambda id_: 1
        await worker.until(lambda: len(worker.started) == 6 and worker.settled)
        assert way.count(BATCH) == 1
        await produce(broker, *[f"u{number}" for number in range(6)])
        await worker.until(lambda: len(worker.started) == 12 and worker.settled)
        assert way.count(BATCH) == 1
    assert await outcomes(broker, ids) == {"complete": 6}


async def test_a_result_that_the_broker_calls_invalid_is_given_up_alone(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "good", "fine", "well")
    way = Way(broker)
    refused = {BATCH}
    way.fail = lambda path: Refused("INVALID_ARGUMENT", "status 9") if path in refused else None
    async with working(way, slots=4) as worker:
        worker.seconds = lambda id_: 1
        await worker.until(lambda: len(worker.started) == 3 and worker.settled)
        assert await outcomes(broker, ["good", "fine", "well"]) == {"complete": 3}
        assert way.count(BATCH) == 1
        await produce(broker, "last")
        await worker.until(lambda: worker.started[-1] == "last")
        refused.add(SET)
        await worker.until(lambda: worker.settled)
        refused.clear()
        await produce(broker, "next")
        await worker.until(lambda: worker.started[-1] == "next" and worker.settled)
    assert await outcomes(broker, ["last", "next"]) == {"": 1, "complete": 1}


async def test_not_found_counts_as_taken(autojump_clock: Clock, broker: Broker) -> None:
    """Existing brokers have said so of what they knew no more, and their own worker drops it then."""
    await produce(broker, "a")
    way = Way(broker)
    way.fail = lambda path: Refused("NOT_FOUND") if path != GET else None
    async with working(way) as worker:
        await worker.until(lambda: worker.started == ["a"] and worker.settled)
        assert way.count(SET) == 1


async def test_what_is_fetched_while_the_worker_stops_runs_and_is_reported(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a", "b", "c")
    way = Way(broker)
    way.delay_s = 0.5
    async with working(way, slots=1) as worker:
        worker.seconds = lambda id_: 3
        await worker.until(lambda: worker.backlog.reserved == 1)
        await worker.stop()
        assert worker.started == ["a"]
        calls = len(way.calls)
        await trio.sleep(30)
        assert len(way.calls) == calls
    assert (await look(broker, "a")).outcome == "complete"
    assert (await look(broker, "b")).status == Status.PENDING


async def test_a_stopping_broker_is_left_alone_but_for_results(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "a", "b")
    way = Way(broker)
    async with working(way, slots=1) as worker:
        worker.seconds = lambda id_: 5
        await worker.until(lambda: worker.started == ["a"])
        broker.draining.set()
        await worker.until(lambda: worker.settled)
        await trio.sleep(60)
        assert worker.started == ["a"]
        assert way.count(GET) < 20
    assert (await look(broker, "a")).outcome == "complete"


async def test_a_refusal_is_no_reason_to_hammer(autojump_clock: Clock, broker: Broker) -> None:
    way = Way(broker)
    way.fail = lambda path: Refused("UNAUTHENTICATED", "Authentication failed")
    async with working(way) as worker:
        await trio.sleep(60)
        assert len(way.calls) < 25
        assert not worker.links[0].connected


async def test_a_hanging_call_is_given_up_and_its_slot_is_free_again(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a")
    way = Way(broker)
    way.delay_s = float("inf")
    async with working(way, slots=1) as worker:
        await trio.sleep(9)
        way.delay_s = 0.001
        await worker.until(lambda: worker.started == ["a"] and worker.settled)
        assert trio.current_time() < 12


async def test_two_brokers_share_one_slot_and_an_unreachable_third_costs_nothing(
    autojump_clock: Clock, broker: Broker, open_broker: Any, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    async with open_broker(tmp_path / "second") as second:
        await produce(broker, *[f"a{number}" for number in range(50)])
        await produce(second, *[f"b{number}" for number in range(50)])
        gone = Way(broker)
        gone.fail = lambda path: PeerUnreachable()
        async with working(Way(broker), Way(second), gone, slots=1) as worker:
            await worker.until(lambda: len(worker.started) == 40)
            assert 15 <= sum(id_.startswith("a") for id_ in worker.started) <= 25
            begin = trio.current_time()
            await worker.until(lambda: len(worker.started) == 100 and worker.settled)
            assert trio.current_time() - begin < 60 * 0.1
            assert len(gone.calls) < 15
        assert await outcomes(second, [f"b{number}" for number in range(50)]) == {"complete": 50}
    assert await outcomes(broker, [f"a{number}" for number in range(50)]) == {"complete": 50}


async def test_a_broker_behind_a_black_hole_keeps_no_slot_from_the_others(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, *[f"t{number}" for number in range(100)])
    hole = Way(broker)
    hole.delay_s = float("inf")
    async with working(Way(broker), hole, slots=1) as worker:
        worker.seconds = lambda id_: 1
        await worker.until(lambda: len(worker.started) == 100)
        assert trio.current_time() < 110
        assert hole.count(GET) == 0
        assert hole.count(CHECK) < 15


async def test_a_call_that_hangs_at_a_broker_that_was_reached_is_made_seldom(
    autojump_clock: Clock, broker: Broker
) -> None:
    """Its health is fine, but fetching hangs: nobody knows before the slot was kept waiting."""

    class Hangs(Way):
        async def _answer(self, path: str, body: bytes) -> bytes:
            if path == GET:
                await trio.sleep_forever()
            return await super()._answer(path, body)

    way = Hangs(broker)
    async with working(way, slots=4):
        await trio.sleep(200)
        assert 10 <= way.count(GET) <= 20
        assert way.most_at_once == 1


async def test_what_cannot_be_read_is_left_to_its_lease_and_the_rest_goes_on(
    autojump_clock: Clock, broker: Broker
) -> None:
    class Junk(Way):
        async def _answer(self, path: str, body: bytes) -> bytes:
            if path == GET and self.count(GET) < 4:
                return b"\x0a\x02\xff\xff"
            return await super()._answer(path, body)

    await produce(broker, "a")
    way = Junk(broker)
    async with working(way) as worker:
        await worker.until(lambda: worker.started == ["a"] and worker.settled)
        assert way.count(GET) <= 6


async def test_what_was_given_up_runs_again_once_its_lease_is_over(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a")
    async with working(Way(broker)) as worker:
        worker.result = lambda id_: Result(
            id_, 0, ResultStatus.INTERRUPTED if len(worker.started) == 1 else ResultStatus.COMPLETE
        )
        await worker.until(lambda: worker.started == ["a", "a"] and worker.settled)
        assert 13 <= trio.current_time() <= 16
    assert (await look(broker, "a")).outcome == "complete"


async def test_it_names_its_deadline_or_takes_that_of_the_contract(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "long", processing_deadline_duration=77)
    await produce(broker, "none", processing_deadline_duration=0)
    async with working(Way(broker)) as worker:
        worker.seconds = lambda id_: 5
        await worker.until(lambda: len(worker.started) == 2)
        jobs = worker.links[0].account.jobs.values()
        assert {scan(job.activation).id: job.deadline_s for job in jobs} == {"long": 77, "none": 10}
