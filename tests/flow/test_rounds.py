"""Unary calls in flight at once: they share a transaction, and each gets what it would have got alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
import trio.testing

from taskd.activation.lifecycle import Status
from taskd.activation.switches import Switch, SwitchKind
from taskd.dispatch.rounds import Rounds, Wanted
from taskd.errors import Refused, StoreError
from taskd.inflight.base import Claimed, Lease, Policy, Report, ReportStatus
from taskd.telemetry import metrics
from taskd.wire import consumer
from taskd.wire.consumer import Filter, StatusUpdate
from taskd.wire.envelope import scan

ANY = Wanted()
Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only


class Watched:
    """A store whose rounds are noted, and held up while `gate` is one that nobody opened."""

    def __init__(self, broker: Broker) -> None:
        self._inflight = broker.inflight
        self.rounds: list[tuple[int, list[int]]] = []  # reports, and the limits of the claims
        self.gate: trio.Event | None = None
        self.bad = ""  # an id that the store cannot take
        self.claims_fail = False
        self.cut_short = False  # claims of a round find nothing, but would if they went on

    async def report_and_claim(self, reports: Sequence[Report], requests: Sequence[Any]) -> Any:
        self.rounds.append((len(reports), [request.limit for request in requests]))
        if self.gate is not None:
            await self.gate.wait()
        self._refuse_bad(reports)
        if self.claims_fail and requests:
            raise StoreError("a row that waits cannot be read")
        if self.cut_short:
            return [], [Claimed([], cut_short=True) for _ in requests]
        return await self._inflight.report_and_claim(reports, requests)

    async def report(self, reports: Sequence[Report]) -> Any:
        self._refuse_bad(reports)
        return await self._inflight.report(reports)

    async def claim(self, request: Any) -> Any:
        if self.claims_fail:
            raise StoreError("a row that waits cannot be read")
        return await self._inflight.claim(request)

    def _refuse_bad(self, reports: Sequence[Report]) -> None:
        if self.bad in [report.id for report in reports]:
            raise StoreError("one of these rows cannot be written")


class Callers:
    """Calls in flight, and what became of each, by the name of its caller."""

    def __init__(self, broker: Broker) -> None:
        self.store = Watched(broker)
        self.rounds = Rounds(self.store, broker.draining)  # type: ignore[arg-type]  # the store, watched
        self.got: dict[str, str | None] = {}
        self.errors: dict[str, Exception] = {}
        self.scopes: dict[str, trio.CancelScope] = {}

    async def call(self, name: str, reports: Sequence[Report] = (), wanted: Wanted | None = ANY) -> None:
        with trio.CancelScope() as self.scopes[name]:
            try:
                lease = await self.rounds.work(reports, wanted)
            except StoreError as error:
                self.errors[name] = error
                return
            self.got[name] = lease.id if isinstance(lease, Lease) else None

    async def all_at_once(self, *calls: tuple[Any, ...]) -> None:
        """One is alone and under way when the others come, so that they go together and in this order."""
        self.store.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.call, "first", (), None)
            await trio.testing.wait_all_tasks_blocked()
            for call in calls:
                nursery.start_soon(self.call, *call)
                await trio.testing.wait_all_tasks_blocked()
            self.store.gate.set()


@pytest.fixture
def callers(broker: Broker) -> Callers:
    return Callers(broker)


def done(id_: str) -> list[Report]:
    return [Report(id_, None, ReportStatus.COMPLETE)]


async def produce(broker: Broker, *ids: str, **fields: Any) -> None:
    await broker.produce(*(broker.activation(id_, **fields) for id_ in ids))
    await broker.settle()


async def statuses(broker: Broker, *ids: str) -> list[Status]:
    return [found.status for found in await broker.inflight.describe(ids)]


async def test_a_call_that_is_alone_waits_for_nothing(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, "a", "b")
    began = trio.current_time()
    await callers.call("one")
    await callers.call("two", done("a"))
    assert callers.got == {"one": "a", "two": "b"}
    assert callers.store.rounds == [(0, [1]), (1, [1])]
    assert trio.current_time() == began


async def test_calls_that_come_in_one_turn_of_the_loop_go_in_one_round_once_it_is_busy(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, *(f"r{number}" for number in range(32)))
    for burst in range(2):
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(callers.call, f"c{burst} {number}")
    assert sorted(map(str, callers.got.values())) == sorted(f"r{number}" for number in range(32))
    assert callers.store.rounds == [(0, [1]), (0, [15]), (0, [16])]


async def test_each_reports_and_gets_one_in_the_order_they_came(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    ids = [f"{number:02}" for number in range(32)]
    await produce(broker, *ids)
    await callers.all_at_once(*((f"c{id_}",) for id_ in ids[:16]))
    assert [callers.got[f"c{id_}"] for id_ in ids[:16]] == ids[:16]
    await callers.all_at_once(*((f"d{id_}", done(id_)) for id_ in ids[:16]))
    assert [callers.got[f"d{id_}"] for id_ in ids[:16]] == ids[16:]
    assert callers.store.rounds == [(0, []), (0, [16]), (0, []), (16, [16])]
    assert await statuses(broker, *ids) == [Status.GONE] * 16 + [Status.PROCESSING] * 16
    for found in await broker.inflight.describe(ids):
        assert found.attempts == 1


async def test_who_comes_last_gets_nothing_when_there_is_not_enough(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, "a", "b", "c")
    await callers.all_at_once(*((f"c{number}",) for number in range(5)))
    assert [callers.got[f"c{number}"] for number in range(5)] == ["a", "b", "c", None, None]


async def test_each_gets_what_it_asked_for(autojump_clock: Clock, broker: Broker, callers: Callers) -> None:
    await produce(broker, "x1", "x2", application="x", namespace="n")
    await produce(broker, "x3", application="x", namespace="m")
    await produce(broker, "y1", application="y")
    x, y, n, m = Wanted("x"), Wanted("y"), Wanted("x", ("n",)), Wanted("x", ("m",))
    await callers.all_at_once(
        ("y", (), y), ("m", (), m), ("n", (), n), ("x", (), x), ("y again", (), y), ("none", (), None)
    )
    assert callers.store.rounds[1] == (0, [2, 1, 1, 1])
    assert callers.got == {
        "first": None, "y": "y1", "m": "x3", "n": "x1", "x": "x2", "y again": None, "none": None
    }  # fmt: skip


async def test_large_activations_go_to_several_callers_all_the_same(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    ids = ["a", "b", "c"]
    await produce(broker, *ids, headers={"x": "x" * 1_500_000})
    await callers.all_at_once(*((id_,) for id_ in ids))
    assert [callers.got[id_] for id_ in ids] == ids


async def test_what_the_store_cannot_take_of_one_is_no_other_s_trouble(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, "a", "b", "c", "d")
    await callers.all_at_once(("1",), ("2",))
    callers.store.bad = "b"
    await callers.all_at_once(("3", done("a")), ("4", done("b")))
    assert callers.got["3"] == "c"
    assert list(callers.errors) == ["4"]
    assert await statuses(broker, "a", "b", "c", "d") == [
        Status.GONE, Status.PROCESSING, Status.PROCESSING, Status.PENDING,
    ]  # fmt: skip
    await callers.call("5")
    assert callers.got["5"] == "d"


async def test_what_is_reported_is_written_also_when_nothing_can_be_claimed(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, "a", "b", "c")
    await callers.all_at_once(("1",), ("2",))
    callers.store.claims_fail = True
    await callers.all_at_once(("3", done("a")), ("4", done("b")))
    assert set(callers.errors) == {"3", "4"}
    assert await statuses(broker, "a", "b", "c") == [Status.GONE, Status.GONE, Status.PENDING]


async def test_a_disk_that_is_found_full_by_a_claim_takes_the_report_and_hands_out_nothing(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, "a", "b")
    await callers.call("1")
    store = broker.inflight._store
    really = broker.inflight._handouts.claim

    def full(request: Any, now: Any) -> Any:
        if store.trouble:
            return really(request, now)
        raise apsw.FullError("database or disk is full")

    broker.inflight._handouts.claim = full
    await callers.call("2", done("a"))
    assert callers.got == {"1": "a", "2": None}
    assert await statuses(broker, "a", "b") == [Status.GONE, Status.PENDING]


async def test_a_caller_that_goes_before_its_round_gets_nothing_but_its_report_counts(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, "a", "b")
    await callers.call("one")
    callers.store.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for name, reports in (("under way", ()), ("goes", done("a")), ("asks", ()), ("stays", ())):
            nursery.start_soon(callers.call, name, reports, None if name == "under way" else ANY)
            await trio.testing.wait_all_tasks_blocked()
        callers.scopes["goes"].cancel()
        callers.scopes["asks"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        callers.store.gate.set()
    assert callers.store.rounds[1:] == [(0, []), (1, [1])]
    assert callers.got == {"one": "a", "under way": None, "goes": None, "stays": "b"}
    assert await statuses(broker, "a", "b") == [Status.GONE, Status.PROCESSING]


async def test_a_caller_that_goes_during_its_round_learns_of_its_lease_and_can_hand_it_back(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a", "b")
    store = Watched(broker)
    broker.unary._rounds._inflight = store
    store.gate = trio.Event()
    replies: list[Any] = []
    scope = trio.CancelScope()

    async def fetch() -> None:
        replies.append(await broker.unary.get_task(b""))

    async def fetch_and_go() -> None:
        with scope:
            await fetch()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_and_go)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(fetch)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        store.gate.set()
    assert await statuses(broker, "a", "b") == [Status.PROCESSING] * 2
    gone, stayed = replies
    await gone.undelivered()
    raw = consumer.decode_task(stayed.body)
    assert raw is not None
    assert scan(raw).id == "b"
    first, second = await broker.inflight.describe(["a", "b"])
    assert (first.status, first.attempts) == (Status.PENDING, 0)
    assert (second.status, second.attempts) == (Status.PROCESSING, 1)


async def test_at_most_once_is_handed_to_one_of_them_only(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    state = broker.at_most_once_policy()
    await produce(broker, "a", "b", retry_state=state)
    await callers.all_at_once(*((name,) for name in "wxyz"))
    assert [callers.got[name] for name in "wxyz"] == ["a", "b", None, None]
    await trio.sleep(15)  # their deadline and the grace
    await callers.all_at_once(*((name,) for name in "wxyz"))
    assert [callers.got[name] for name in "wxyz"] == [None] * 4
    for found in await broker.inflight.describe(["a", "b"]):
        assert (found.outcome, found.reason, found.attempts) == ("failed", "at_most_once", 1)


async def test_what_is_paused_is_passed_over_for_as_many_as_there_are(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await broker.inflight.put_switch(Switch(SwitchKind.PAUSE, taskname="held"))
    for number in range(6):
        await produce(broker, f"h{number}", namespace="m", taskname="held")
        await produce(broker, f"m{number}", namespace="m")
    await produce(broker, "n", namespace="n")
    await callers.all_at_once(*((f"c{number}",) for number in range(8)))
    got = [callers.got[f"c{number}"] for number in range(8)]
    assert sorted(map(str, got)) == ["None", "m0", "m1", "m2", "m3", "m4", "m5", "n"]


async def test_in_strict_order_one_is_out_at_a_time_and_its_report_frees_the_next(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    async with open_broker(tmp_path, policy=Policy(strict_order_namespaces=frozenset({"ns"}))) as broker:
        callers = Callers(broker)
        await produce(broker, "a", "b", "c")
        await callers.all_at_once(("1",), ("2",))
        assert (callers.got["1"], callers.got["2"]) == ("a", None)
        await callers.all_at_once(("3",), ("4", done("a")))
        assert {callers.got["3"], callers.got["4"]} == {"b", None}
        assert await statuses(broker, "a", "b", "c") == [Status.GONE, Status.PROCESSING, Status.PENDING]


async def test_who_got_nothing_behind_too_much_that_may_not_go_looks_again(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, "a", "b")
    callers.store.cut_short = True
    counted = metrics.claims.labels("unary")._value.get()
    await callers.all_at_once(("1",), ("2",), ("3",))
    assert sorted(map(str, (callers.got[name] for name in "123"))) == ["None", "a", "b"]
    assert metrics.claims.labels("unary")._value.get() == counted + 2


async def test_nobody_looks_again_once_the_drain_began(
    autojump_clock: Clock, broker: Broker, callers: Callers
) -> None:
    await produce(broker, "a")
    callers.store.cut_short = True
    callers.store.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(callers.call, "1")
        await trio.testing.wait_all_tasks_blocked()
        broker.draining.set()
        callers.store.gate.set()
    assert callers.got == {"1": None}
    assert await statuses(broker, "a") == [Status.PENDING]


async def test_what_came_before_the_drain_and_waits_gets_nothing_but_is_written(
    autojump_clock: Clock, broker: Broker
) -> None:
    await produce(broker, "a", "b")
    await broker.get_task()
    store = Watched(broker)
    broker.unary._rounds._inflight = store
    store.gate = trio.Event()
    answers: list[Any] = []

    async def report() -> None:
        update = StatusUpdate("a", consumer.COMPLETE, fetch_next=Filter())
        answers.append((await broker.unary.set_task_status(consumer.encode_status_update(update))).body)

    async def fetch() -> None:
        with pytest.raises(Refused, match="stopping"):
            await broker.unary.get_task(b"")
        answers.append("refused")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.unary._rounds.work, ())
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(report)
        nursery.start_soon(fetch)
        await trio.testing.wait_all_tasks_blocked()
        broker.draining.set()
        store.gate.set()
    assert sorted(map(str, answers)) == ["b''", "refused"]
    assert await statuses(broker, "a", "b") == [Status.GONE, Status.PENDING]


async def test_more_calls_than_one_round_takes_are_served_by_several(
    autojump_clock: Clock, broker: Broker, callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.dispatch.rounds.CALLS_IN_ROUND", 4)
    ids = [f"{number:02}" for number in range(10)]
    await produce(broker, *ids)
    await callers.all_at_once(*((id_,) for id_ in ids))
    assert [callers.got[id_] for id_ in ids] == ids
    assert callers.store.rounds == [(0, []), (0, [4]), (0, [4]), (0, [2])]
