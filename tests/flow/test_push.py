"""Push delivery in virtual time: a broker, and workers that answer as the test says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog.testing
import trio

from taskd.activation.lifecycle import Status
from taskd.dispatch.pace import FIRST_PAUSE_S, LONGEST_PAUSE_S, Pace
from taskd.dispatch.parking import PushParking, UnknownTasks
from taskd.dispatch.push import PushDispatch, PushSettings
from taskd.dispatch.unary import UnaryDispatch
from taskd.errors import PeerTimeout, PeerUnavailable, PeerUnreachable, Refused, StoreError
from taskd.upkeep.duties import Duty, Upkeep
from taskd.wire import consumer
from taskd.wire.generated.sentry_protos.taskbroker.v1 import (
    FetchNextTask,
    PushTaskRequest,
    RetryState,
    SetBatchActivationStatusRequest,
    SetTaskStatusRequest,
    TaskActivationStatus,
)
from taskd.wire.pushing import PUSH_TASK

Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only

SHOP, BANK = "http://shop-worker:1", "http://bank-worker:1"
BUSY = Refused("RESOURCE_EXHAUSTED", "worker busy")


class Workers:
    """Everybody who is pushed to. `answer[url]` is awaited with the id; default: taken at once."""

    def __init__(self) -> None:
        self.got: dict[str, list[str]] = defaultdict(list)
        self.answer: dict[str, Callable[[str], Awaitable[None]]] = {}
        self.bodies: list[bytes] = []
        self.in_flight = self.most_in_flight = 0

    @asynccontextmanager
    async def connect(self, url: str) -> AsyncIterator[Worker]:
        yield Worker(self, url)

    def raise_(self, url: str, error: Exception) -> None:
        async def refuse(id_: str) -> None:
            raise error

        self.answer[url] = refuse


class Worker:
    def __init__(self, workers: Workers, url: str) -> None:
        self._workers, self._url = workers, url

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        workers = self._workers
        assert path == PUSH_TASK
        workers.bodies.append(body)
        request = PushTaskRequest.parse(body)
        assert request.task is not None
        workers.got[self._url].append(request.task.id)
        workers.in_flight += 1
        workers.most_in_flight = max(workers.most_in_flight, workers.in_flight)
        try:
            with trio.move_on_after(timeout_s):
                if self._url in workers.answer:
                    await workers.answer[self._url](request.task.id)
                return b""
        finally:
            workers.in_flight -= 1
        raise PeerTimeout


@pytest.fixture
def workers() -> Workers:
    return Workers()


@asynccontextmanager
async def pushing(
    broker: Broker, workers: Workers, worker_map: dict[str, str] | None = None, *, width: int = 4
) -> AsyncIterator[PushDispatch]:
    """Pushes as the daemon does, parking included."""
    push = PushDispatch(
        broker.inflight,
        workers.connect,
        broker.draining,
        {"shop": SHOP} if worker_map is None else worker_map,
        PushSettings(30.0, width),
    )
    parking = PushParking(broker.inflight, push.served, limit=100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(push.run)
        nursery.start_soon(Upkeep([Duty("park", parking.round, 100, lambda: 1.0)], broker.clock).run)
        yield push
        nursery.cancel_scope.cancel()


async def produce(broker: Broker, *ids: str, application: str = "shop", **fields: Any) -> None:
    await broker.produce(*[broker.activation(id_, application=application, **fields) for id_ in ids])


async def report(broker: Broker, *ids: str, status: int = consumer.COMPLETE, **fields: Any) -> None:
    updates = [SetTaskStatusRequest(id=id_, status=TaskActivationStatus(status), **fields) for id_ in ids]
    await broker.unary.set_batch_status(bytes(SetBatchActivationStatusRequest(updates=updates)))


async def look(broker: Broker, id_: str) -> Any:
    (found,) = await broker.inflight.describe([id_])
    return found


def at_most_once() -> RetryState:
    return RetryState(attempts=0, max_attempts=1, on_attempts_exceeded=2, at_most_once=True)


async def test_claimed_while_pushed_processing_once_taken_complete_when_reported(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    go_on = trio.Event()

    async def wait(id_: str) -> None:
        await go_on.wait()

    workers.answer[SHOP] = wait
    raw = broker.activation("a", application="shop", headers={"k": "v"})
    async with pushing(broker, workers):
        await broker.produce(raw)
        await broker.settle()
        assert ((await look(broker, "a")).status, (await look(broker, "a")).attempts) == (Status.CLAIMED, 0)
        go_on.set()
        await broker.settle()
        assert ((await look(broker, "a")).status, (await look(broker, "a")).attempts) == (
            Status.PROCESSING,
            1,
        )
        await report(broker, "a")
        assert (await look(broker, "a")).outcome == "complete"
    (body,) = workers.bodies
    request = PushTaskRequest.parse(body)
    assert (bytes(request.task), request.callback_url) == (raw, "")  # type: ignore[arg-type]
    assert raw in body


async def test_the_lease_runs_from_the_call_that_succeeded(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    async def slowly(id_: str) -> None:
        await trio.sleep(20)

    workers.answer[SHOP] = slowly
    async with pushing(broker, workers):
        await produce(broker, "a", processing_deadline_duration=10)
        await trio.sleep(20 + 12)
        assert (await look(broker, "a")).status is Status.PROCESSING
        await trio.sleep(2.5)  # deadline 10 s, grace 3 s
        assert workers.got[SHOP] == ["a", "a"]
        assert (await look(broker, "a")).attempts == 1


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(consumer.COMPLETE, "complete"), (consumer.FAILURE, "failed"), (consumer.RETRY, "retried")],
)
async def test_a_report_that_overtakes_its_push_counts_and_the_push_changes_nothing_after(
    autojump_clock: Clock, broker: Broker, workers: Workers, status: int, outcome: str
) -> None:
    async def report_first(id_: str) -> None:
        await report(broker, id_, status=status, delay_on_retry=60)

    workers.answer[SHOP] = report_first
    async with pushing(broker, workers):
        await produce(broker, "a")
        await broker.settle()
        found = await look(broker, "a")
        assert (found.outcome, found.attempts) == (outcome, 1)
        assert workers.got[SHOP] == ["a"]


@pytest.mark.parametrize("error", [BUSY, PeerUnreachable(), PeerUnavailable(), PeerTimeout()], ids=repr)
async def test_a_failed_push_never_resurrects_what_was_reported_meanwhile(
    autojump_clock: Clock, broker: Broker, workers: Workers, error: Exception
) -> None:
    async def report_then_fail(id_: str) -> None:
        await report(broker, id_)
        raise error

    workers.answer[SHOP] = report_then_fail
    async with pushing(broker, workers):
        await produce(broker, "a")
        await trio.sleep(120)
        assert workers.got[SHOP] == ["a"]
        assert (await look(broker, "a")).outcome == "complete"


@pytest.mark.parametrize(
    "error", [BUSY, PeerUnreachable(), Refused("UNAUTHENTICATED", "Authentication failed")], ids=repr
)
@pytest.mark.parametrize("state", [None, at_most_once()], ids=["usual", "at_most_once"])
async def test_what_surely_reached_nobody_waits_again_uncounted(
    autojump_clock: Clock, broker: Broker, workers: Workers, error: Exception, state: RetryState | None
) -> None:
    workers.raise_(SHOP, error)
    async with pushing(broker, workers) as push:
        await produce(broker, "a", retry_state=state)
        await trio.sleep(FIRST_PAUSE_S / 2)
        found = await look(broker, "a")
        assert (found.status, found.attempts) == (Status.PENDING, 0)
        assert push.troubles() == [f"{SHOP}: {error}"]
        workers.answer.clear()
        await trio.sleep(LONGEST_PAUSE_S)
        found = await look(broker, "a")
        assert (found.status, found.attempts) == (Status.PROCESSING, 1)
        assert push.troubles() == []


@pytest.mark.parametrize("error", [PeerUnavailable("lost"), PeerTimeout(), Refused("INTERNAL")], ids=repr)
async def test_what_may_have_arrived_stays_claimed_until_its_claim_is_over(
    autojump_clock: Clock, broker: Broker, workers: Workers, error: Exception
) -> None:
    workers.raise_(SHOP, error)
    async with pushing(broker, workers):
        await produce(broker, "a")
        await trio.sleep(1)
        workers.answer.clear()
        await trio.sleep(38)
        found = await look(broker, "a")
        assert (found.status, found.attempts, workers.got[SHOP]) == (Status.CLAIMED, 0, ["a"])
        await trio.sleep(4)  # the claim's 40 s, and a round of upkeep
        found = await look(broker, "a")
        assert (found.status, found.attempts, workers.got[SHOP]) == (Status.PROCESSING, 1, ["a", "a"])


async def test_a_report_after_a_lost_call_counts(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    workers.raise_(SHOP, PeerUnavailable("lost"))
    async with pushing(broker, workers):
        await produce(broker, "a")
        await trio.sleep(10)
        await report(broker, "a")
        await trio.sleep(100)
        assert workers.got[SHOP] == ["a"]
        assert (await look(broker, "a")).outcome == "complete"


@pytest.mark.parametrize("error", [PeerUnavailable("lost"), PeerTimeout(), Refused("INTERNAL")], ids=repr)
async def test_at_most_once_counts_as_started_when_it_may_have_arrived(
    autojump_clock: Clock, broker: Broker, workers: Workers, error: Exception
) -> None:
    workers.raise_(SHOP, error)
    async with pushing(broker, workers):
        await produce(broker, "a", "b", retry_state=at_most_once())
        await broker.settle()
        found = await look(broker, "a")
        assert (found.status, found.attempts) == (Status.PROCESSING, 1)
        await report(broker, "b")  # it did arrive, and was run
        await trio.sleep(100)
        assert sorted(workers.got[SHOP]) == ["a", "b"]
        found = await look(broker, "a")
        assert (found.outcome, found.reason, found.dead_lettered) == ("failed", "at_most_once", True)
        assert (await look(broker, "b")).outcome == "complete"


async def test_a_push_that_nobody_answers_ends_after_its_time(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    async def never(id_: str) -> None:
        await trio.sleep_forever()

    workers.answer[SHOP] = never
    async with pushing(broker, workers, width=1):
        await produce(broker, "a", "b")
        await trio.sleep(29)
        assert workers.got[SHOP] == ["a"]
        workers.answer.clear()
        await trio.sleep(2)
        assert workers.got[SHOP] == ["a", "b"]


async def test_a_busy_application_holds_up_no_other(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    async def never(id_: str) -> None:
        await trio.sleep(5)
        raise BUSY

    workers.answer[SHOP] = never
    async with pushing(broker, workers, {"shop": SHOP, "bank": BANK}, width=2):
        await produce(broker, *[f"s{n}" for n in range(50)])
        await produce(broker, *[f"b{n}" for n in range(20)], application="bank")
        await broker.settle()
        assert len(workers.got[BANK]) == 20
        assert len(workers.got[SHOP]) == 2
        assert broker.inflight.counts()[Status.CLAIMED] == 2


@pytest.mark.parametrize("width", [1, 2])
async def test_applications_that_share_an_address_take_turns(
    autojump_clock: Clock, broker: Broker, workers: Workers, width: int
) -> None:
    async def slowly(id_: str) -> None:
        await trio.sleep(1)

    workers.answer[SHOP] = slowly
    await produce(broker, *[f"s{n}" for n in range(10)])
    await produce(broker, "b0", "b1", application="bank")
    await broker.settle()
    async with pushing(broker, workers, {"shop": SHOP, "bank": SHOP}, width=width):
        await trio.sleep(4 / width - 0.5)
        assert {"s0", "b0"} == set(workers.got[SHOP][:2])
        assert {"s0", "b0", "s1", "b1"} == set(workers.got[SHOP])
        assert workers.most_in_flight == width


async def test_calls_leave_in_the_order_of_arrival(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    async with pushing(broker, workers, width=16):
        await produce(broker, *[f"{n:02}" for n in range(40)])
        await broker.settle()
    assert workers.got[SHOP] == [f"{n:02}" for n in range(40)]


async def test_after_a_failure_one_call_finds_out_and_pauses_grow(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    workers.raise_(SHOP, PeerUnreachable("nobody there"))
    async with pushing(broker, workers, width=4):
        await produce(broker, *[f"s{n}" for n in range(10)])
        await broker.settle()
        assert len(workers.got[SHOP]) == 4
        await trio.sleep(60)
        tries = len(workers.got[SHOP]) - 4
        assert 5 <= tries <= 12  # 0.2, 0.4 … 6.4, then every 10 s
        assert set(workers.got[SHOP][4:]) == {"s0"}  # the order is kept
        workers.answer.clear()
        await trio.sleep(LONGEST_PAUSE_S)
        assert broker.inflight.counts() == {Status.PROCESSING: 10}


async def test_an_application_without_a_worker_is_reported_once_parked_and_comes_back_when_mapped(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with pushing(broker, workers) as push:
            await produce(broker, "a", application="bank")
            await produce(broker, "c", application="bank", expires=20)
            await trio.sleep(2)
            await produce(broker, "b", application="bank")
            await trio.sleep(10)
            assert broker.inflight.counts() == {Status.PARKED: 3}
            assert workers.got == {}
            await trio.sleep(10)  # parked work expires like any that waits
            assert (await look(broker, "c")).outcome == "expired"
            push.remap({"shop": SHOP, "bank": BANK})
            await trio.sleep(2)
            assert workers.got == {BANK: ["a", "b"]}
    said = [line["application"] for line in lines if "no worker is mapped" in line["event"]]
    assert said == ["bank"]
    assert [line for line in lines if "served again" in line["event"]]


async def test_without_push_what_it_parked_comes_back_for_those_who_fetch(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    await produce(broker, "a", "b")
    await broker.settle()
    assert await broker.inflight.sort_parked((), 10) == 2
    broker.stream.roster.asked(None)
    assert await UnknownTasks(broker.inflight, broker.stream.roster, limit=1).round() == 1
    assert broker.inflight.counts() == {Status.PARKED: 1, Status.PENDING: 1}


async def test_an_address_that_is_no_longer_mapped_gets_nothing_more(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    async with pushing(broker, workers) as push:
        await produce(broker, "a")
        await broker.settle()
        push.remap({"shop": BANK})
        await broker.settle()
        await produce(broker, "b")
        await broker.settle()
    assert workers.got == {SHOP: ["a"], BANK: ["b"]}


async def test_a_drain_stops_pushing_and_lets_calls_under_way_end(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    async def slowly(id_: str) -> None:
        await trio.sleep(5)

    workers.answer[SHOP] = slowly
    async with pushing(broker, workers, width=1):
        await produce(broker, "a", "b")
        await broker.settle()
        broker.draining.set()
        await trio.sleep(8)
        assert workers.got[SHOP] == ["a"]
        assert broker.inflight.counts() == {Status.PROCESSING: 1, Status.PENDING: 1}
        await report(broker, "a")
        assert (await look(broker, "a")).outcome == "complete"


async def test_calls_cut_off_by_the_end_count_as_started_only_at_most_once(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    async def never(id_: str) -> None:
        await trio.sleep_forever()

    workers.answer[SHOP] = never
    async with pushing(broker, workers):
        await produce(broker, "usual")
        await produce(broker, "once", retry_state=at_most_once())
        await broker.settle()
    assert (await look(broker, "usual")).status is Status.CLAIMED
    assert (await look(broker, "once")).status is Status.PROCESSING


async def test_what_no_worker_can_take_is_dead_lettered_instead_of_claimed_for_ever(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    workers.raise_(SHOP, Refused("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (9 vs. 4)"))
    async with pushing(broker, workers):
        await produce(broker, "a", retry_state=broker.dead_letter_policy())
        await trio.sleep(5)
        found = await look(broker, "a")
        assert (found.outcome, found.reason, found.dead_lettered) == ("failed", "too_large", True)
        assert workers.got[SHOP] == ["a"]


async def test_a_store_that_fails_for_a_while_does_not_end_the_sender(
    autojump_clock: Clock, broker: Broker, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise StoreError("disk full")

    async with pushing(broker, workers):
        with monkeypatch.context() as patch:
            patch.setattr(broker.inflight, "claim", fail)
            await produce(broker, "a")
            await trio.sleep(5)
        with monkeypatch.context() as patch:
            patch.setattr(broker.inflight, "pushed", fail)
            await trio.sleep(LONGEST_PAUSE_S)
            assert workers.got[SHOP] == ["a"]
        await trio.sleep(60)
        assert (await look(broker, "a")).attempts >= 1


async def test_nothing_can_be_fetched_while_delivery_is_push(
    autojump_clock: Clock, broker: Broker, workers: Workers
) -> None:
    broker.unary = UnaryDispatch(broker.inflight, broker.stream.roster, broker.draining, hands_out=False)
    await produce(broker, "a", "b")
    await broker.settle()
    with pytest.raises(Refused) as refused:
        await broker.get_task(application="shop")
    assert refused.value.code == "PERMISSION_DENIED"
    async with pushing(broker, workers, width=1):
        await broker.settle()
        assert await broker.set_status("a", fetch_next_task=FetchNextTask(application="shop")) == b""
    assert (await look(broker, "a")).outcome == "complete"


def test_failures_that_come_together_make_one_pause() -> None:
    pace = Pace(8)
    assert (pace.room(3), pace.room(9), pace.pause_s(0)) == (5, 0, 0)
    for _ in range(5):
        pace.failed(0)
    assert (pace.pause_s(0), pace.room(0), pace.room(1)) == (FIRST_PAUSE_S, 1, 0)
    now_s = 0.0
    pauses = []
    for _ in range(8):
        now_s += pace.pause_s(now_s)
        pace.failed(now_s)
        pauses.append(round(pace.pause_s(now_s), 6))
    assert pauses == [0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10]
    pace.succeeded()
    assert (pace.failing, pace.pause_s(now_s), pace.room(0)) == (False, 0, 8)
