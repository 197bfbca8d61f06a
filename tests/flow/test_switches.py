"""Operators' switches on a whole broker: by order and by file, with their effects on what comes and waits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import msgpack
import pytest
import structlog.testing
import trio

from taskd.activation.lifecycle import Status
from taskd.activation.switches import MAX_DEPTH, Condition, Switch, SwitchKind, SwitchSource
from taskd.admin.operate import Operator
from taskd.admin.orders import Orders
from taskd.errors import LogUnavailable, Refused
from taskd.inflight.base import ClaimRequest, LeaseKind
from taskd.inflight.switches import DemotedTo
from taskd.log.base import Outgoing, Position
from taskd.rpc.base import Unary
from taskd.upkeep.duties import Upkeep
from taskd.upkeep.forbidden import ForbiddenRows
from taskd.upkeep.switches import switch_duties
from taskd.wire import frames, frames_codec
from taskd.wire.protobuf import text_field

PAUSE, KILL, DEMOTE = SwitchKind
SHOP = Switch(PAUSE, application="shop")


class Direct:
    """A client whose calls go straight to the handlers."""

    def __init__(self, orders: Orders) -> None:
        self._services = orders.services

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        service = self._services[path]
        assert isinstance(service, Unary)
        answer = await service.handler(body)
        assert isinstance(answer, bytes)
        return answer


@pytest.fixture
async def operator(broker: Any) -> AsyncIterator[Operator]:
    async with open_operator(broker) as opened:
        yield opened


@asynccontextmanager
async def open_operator(broker: Any, publish: Any = None) -> AsyncIterator[Operator]:
    """Orders to `broker`, whose upkeep then also looks after switches."""

    async def nowhere(records: Sequence[Outgoing]) -> list[Position | Exception]:
        raise AssertionError("nothing is demoted here")

    duties = switch_duties(
        broker.inflight,
        publish or nowhere,
        broker.clock,
        broker.stream.stop_leases,
        ForbiddenRows(broker.inflight, limit=10),
        limit=10,
        every_s=lambda: 1.0,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Upkeep(duties, broker.clock).run)
        nursery.start_soon(end_of_time)
        yield Operator(Direct(Orders(broker.inflight, broker.clock)))  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


async def end_of_time() -> None:
    await trio.sleep(3_000)
    pytest.fail("an hour of virtual time passed")


def call(broker: Any, id_: str, *args: Any, **fields: Any) -> bytes:
    packed = msgpack.packb({"args": list(args), "kwargs": fields.pop("kwargs", {})}, use_bin_type=True)
    fields = {"application": "shop", "namespace": "mail", "taskname": "send", **fields}
    return bytes(broker.activation(id_, parameters_bytes=packed, **fields))


async def states(broker: Any, *ids: str) -> list[str]:
    return [
        found.outcome or (found.status.word if found.status else "")
        for found in await broker.inflight.describe(ids)
    ]


# ---- pause


async def test_a_pause_holds_until_it_is_taken_back(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    paused = await operator.pause(SHOP, "database moves", "ann", None)
    assert (paused.reason, paused.author, paused.source) == ("database moves", "ann", SwitchSource.OPERATOR)
    await broker.produce(call(broker, "a"), call(broker, "b", application="bank"))
    await broker.settle()
    assert (await broker.get_task()).id == "b"
    with pytest.raises(Refused, match="No pending activations"):
        await broker.get_task(application="shop")
    claim = ClaimRequest(1, LeaseKind.PUSH)
    assert await broker.inflight.claim(claim) == []
    assert await operator.resume(SHOP, "", "bob") == [paused]
    assert (await broker.get_task()).id == "a"


async def test_a_pause_ends_at_its_time_with_an_audit_line(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    with structlog.testing.capture_logs() as lines:
        await operator.pause(SHOP, "for two hours", "ann", 600_000)
        await broker.produce(call(broker, "a"))
        await trio.sleep(598)
        with pytest.raises(Refused):
            await broker.get_task()
        await trio.sleep(4)
        assert (await broker.get_task()).id == "a"
        assert await operator.switches() == []
    told = [line for line in lines if line["event"].startswith("switch ") and "subject" in line]
    assert [(line["event"], line["by"], line["reason"]) for line in told] == [
        ("switch set", "ann", "for two hours"),
        ("switch ended", "time", "for two hours"),
    ]
    assert told[0]["until"] == "2026-01-01T00:10:00+00:00"


async def test_what_is_paused_still_expires(broker: Any, operator: Operator, autojump_clock: Any) -> None:
    await operator.pause(Switch(PAUSE, taskname="send"), "why", "ann", None)
    await broker.produce(call(broker, "a", expires=30))
    await trio.sleep(32)
    assert await states(broker, "a") == ["expired"]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (Switch(PAUSE), "expected an application"),
        (Switch(KILL, application="shop"), "must name a task"),
        (Switch(PAUSE, taskname="a", conditions=(Condition(0, 1),)), "cannot depend on arguments"),
        (Switch(DEMOTE, namespace="a"), "only the file of switches demotes"),
        (Switch(PAUSE, application="x" * 1_001), "at most 1000 characters"),
    ],
)
async def test_an_order_that_makes_no_sense_is_refused(
    broker: Any, operator: Operator, autojump_clock: Any, what: Switch, why: str
) -> None:
    with pytest.raises(Refused, match=why):
        await operator.pause(what, "why", "ann", None)
    assert broker.inflight.board.switches == ()


@pytest.mark.parametrize(
    ("value", "why"),
    [("half \ud800", "half of a surrogate pair"), (["a", {"half \ud800": 1}], "half of a surrogate pair")],
)
async def test_a_value_that_cannot_be_stored_is_refused(
    broker: Any, operator: Operator, autojump_clock: Any, value: Any, why: str
) -> None:
    with pytest.raises(Refused, match=why):
        await operator.kill(
            Switch(KILL, taskname="send", conditions=(Condition(0, value),)), "why", "ann", None
        )
    assert broker.inflight.board.switches == ()


async def test_a_value_that_is_too_deep_to_be_compared_is_refused(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    deepest: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        deepest = [deepest]
    for value, outcome in ((deepest, nullcontext()), ([deepest], pytest.raises(Refused, match="100 deep"))):
        with outcome:
            condition = Condition(0, value)
            await operator.kill(Switch(KILL, taskname="send", conditions=(condition,)), "why", "ann", None)


async def test_every_order_needs_a_reason_an_author_and_a_time_to_come(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    for reason, author, for_ms in [("", "ann", None), ("why", " ", None), ("why", "ann", 0)]:
        with pytest.raises(Refused):
            await operator.pause(SHOP, reason, author, for_ms)


async def test_what_is_not_paused_cannot_be_resumed(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    with pytest.raises(Refused, match="no such pause"):
        await operator.resume(SHOP, "", "ann")
    assert await operator.resume(None, "", "ann") == []


# ---- killswitch


class Worker:
    """A worker's stream in memory, from the broker's side."""

    def __init__(self) -> None:
        self.heard: list[frames.BrokerFrame] = []
        self._in, self._out = trio.open_memory_channel[bytes](100)

    async def say(self, frame: frames.WorkerFrame) -> None:
        await self._in.send(frames_codec.encode_worker_frame(frame))

    async def receive(self) -> bytes | None:
        return await self._out.receive()

    async def send(self, body: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.heard.append(frames_codec.decode_broker_frame(body))


async def test_a_worker_is_told_to_stop_what_falls_under_a_killswitch(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    await broker.produce(call(broker, "a"), call(broker, "b", taskname="other"))
    worker = Worker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.stream.work, worker)
        await worker.say(frames.Hello("w1", "default"))
        await worker.say(frames.Credit(1, 2))
        await trio.sleep(1)
        leases = [
            item.lease for f in worker.heard if isinstance(f, frames.Assignments) for item in f.assignments
        ]
        await operator.kill(Switch(KILL, taskname="send"), "too many mails", "ann", None)
        await trio.sleep(2)
        (killed,) = [lease for lease in leases if lease.id == "a"]
        assert worker.heard[-1] == frames.Stop((killed,), frames.StopReason.CANCELLED)
        assert await states(broker, "a", "b") == ["dropped", "processing"]
        # A result that crossed the order on the way changes nothing any more.
        await worker.say(frames.Results((frames.Result(*killed, frames.ResultStatus.RETRY),)))
        await trio.sleep(2)
        assert worker.heard[-1] == frames.Taken((killed,))
        assert await states(broker, "a") == ["dropped"]
        nursery.cancel_scope.cancel()


async def test_a_killswitch_drops_what_waits_and_what_comes(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    await broker.produce(*(call(broker, f"w{number}") for number in range(25)))
    await broker.produce(call(broker, "later", delay=60), call(broker, "other", taskname="other"))
    await broker.settle()
    running = await broker.get_task()
    await operator.kill(Switch(KILL, taskname="send"), "sends twice", "ann", None)
    await broker.produce(call(broker, "new"))
    await broker.settle()
    assert await states(broker, "w24", "later", "new", "other", running.id) == [
        "dropped", "dropped", "dropped", "pending", "processing",
    ]  # fmt: skip
    await broker.set_status(running.id)  # what ran is done
    assert await states(broker, running.id) == ["complete"]
    await operator.spare(Switch(KILL, taskname="send"), "", "ann")
    await broker.produce(call(broker, "again"))
    await broker.settle()
    assert await states(broker, "again") == ["pending"]


async def test_a_killed_row_that_comes_back_from_its_worker_is_dropped(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    await broker.produce(call(broker, "a"))
    await broker.settle()
    await broker.get_task()  # by a unary call: that worker cannot be told to stop
    await operator.kill(Switch(KILL, taskname="send"), "why", "ann", None)
    await broker.settle()
    assert await states(broker, "a") == ["processing"]
    await trio.sleep(65)  # its lease ends, nobody asks for work, and yet
    assert await states(broker, "a") == ["dropped"]


async def test_no_condition_and_unreadable_arguments_are_no_match(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    condition = (Condition(0, 17), Condition("template", "digest"))
    await operator.kill(Switch(KILL, taskname="send", conditions=condition), "customer 17", "ann", None)
    await broker.produce(
        call(broker, "first", 17),
        call(broker, "any", 18, kwargs={"template": "digest"}),
        call(broker, "none", 18, kwargs={"template": "other"}),
        call(broker, "float", 17.0),
        broker.activation("broken", application="shop", taskname="send", parameters_bytes=b"\xc1"),
        broker.activation("legacy", application="shop", taskname="send")
        + text_field(4, '{"args":[17],"kwargs":{}}'),
    )
    await broker.settle()
    assert await states(broker, "first", "any", "none", "float", "broken", "legacy") == [
        "dropped", "dropped", "pending", "pending", "pending", "dropped",
    ]  # fmt: skip


async def test_a_switch_of_the_file_is_the_files(
    broker: Any, operator: Operator, autojump_clock: Any
) -> None:
    mine = Switch(KILL, taskname="send", source=SwitchSource.FILE, reason="written in switches.yaml")
    await broker.inflight.replace_switches(SwitchSource.FILE, [mine])
    with pytest.raises(Refused, match=r"take it out of there \(written in switches\.yaml\)"):
        await operator.spare(Switch(KILL, taskname="send"), "", "ann")
    assert [switch.source for switch in await operator.switches()] == [SwitchSource.FILE]


# ---- demotion


class Elsewhere:
    """The topic of demoted namespaces, which may be out of reach."""

    def __init__(self) -> None:
        self.away = False
        self.taken: list[Outgoing] = []

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        if self.away:
            return [LogUnavailable("away") for _ in records]
        self.taken += records
        return [Position(None, 0) for _ in records]  # type: ignore[arg-type]


async def test_a_demoted_namespace_is_published_elsewhere_and_leaves_nothing(
    broker: Any, autojump_clock: Any
) -> None:
    elsewhere = Elsewhere()
    async with open_operator(broker, elsewhere.append):
        await broker.produce(*(call(broker, f"{number}") for number in range(15)))
        await broker.produce(call(broker, "later", delay=60), call(broker, "chat", namespace="chat"))
        await broker.settle()
        demoted = Switch(DEMOTE, namespace="mail", source=SwitchSource.FILE)
        await broker.inflight.replace_switches(SwitchSource.FILE, [demoted], DemotedTo("long"))
        await broker.produce(call(broker, "new"))
        await trio.sleep(1)
        ids = [f"{number}" for number in range(15)] + ["later", "new"]
        assert await states(broker, *ids, "chat") == [""] * 17 + [
            "pending"
        ]  # no tombstone: they may come back
        assert {record.topic for record in elsewhere.taken} == {"long"}
        assert sorted(record.key.decode() for record in elsewhere.taken if record.key) == sorted(ids)
        assert call(broker, "new") in [record.value[: len(call(broker, "new"))] for record in elsewhere.taken]
        await broker.inflight.replace_switches(SwitchSource.FILE, [])
        await broker.produce(call(broker, "new"))
        await broker.settle()
        assert await states(broker, "new") == ["pending"]


async def test_what_cannot_be_forwarded_is_kept_and_tried_again(broker: Any, autojump_clock: Any) -> None:
    elsewhere = Elsewhere()
    elsewhere.away = True
    async with open_operator(broker, elsewhere.append):
        demoted = Switch(DEMOTE, namespace="mail", source=SwitchSource.FILE)
        await broker.inflight.replace_switches(SwitchSource.FILE, [demoted], DemotedTo("long"))
        failing = broker.dead_letter_policy()
        await broker.produce(call(broker, "a"), call(broker, "late", expires=0, retry_state=failing))
        await trio.sleep(100)
        assert broker.inflight.counts()[Status.FORWARDED] == 1
        assert [record.key for record in await broker.records("taskd-dlq")]  # others are not held up
        elsewhere.away = False
        await trio.sleep(31)
        assert [record.key for record in elsewhere.taken] == [b"a"]
        assert broker.inflight.counts()[Status.FORWARDED] == 0
