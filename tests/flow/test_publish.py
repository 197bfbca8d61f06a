"""Retries and dead letters when the log does not take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio
from structlog.testing import capture_logs

from taskd.activation.lifecycle import Status
from taskd.daemon import measure
from taskd.errors import LogUnavailable
from taskd.log.base import Forbidden, Outgoing, Position, Rejected
from taskd.wire import consumer

DLQ = "taskd-dlq"
Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only


class Gate:
    """An outlet that answers as told."""

    def __init__(self) -> None:
        self.answer: Exception | None = None
        self.forbids = ""  # a topic
        self.append: Any = None
        self.asked = 0

    async def __call__(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        self.asked += 1
        if self.answer is not None:
            return [self.answer for _ in records]
        answers: dict[int, Position | Exception] = {}
        allowed = [n for n, record in enumerate(records) if record.topic != self.forbids]
        for number in range(len(records)):
            answers[number] = Forbidden(f"no right to {self.forbids}")
        answers |= zip(allowed, await self.append([records[n] for n in allowed]), strict=True)
        return list(answers.values())


async def fail_one(broker: Broker) -> None:
    await broker.produce(broker.activation("a", retry_state=broker.dead_letter_policy()))
    await broker.settle()
    await broker.get_task()
    await broker.set_status("a", consumer.FAILURE)
    await broker.settle()


async def test_a_failed_publish_is_tried_again_and_health_says_so(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    gate = Gate()
    gate.answer = LogUnavailable("away")
    async with open_broker(tmp_path, outlet=gate) as broker:
        await fail_one(broker)
        await trio.sleep(60)
        (found,) = await broker.inflight.describe(["a"])
        assert found.status is Status.FAILURE
        (publish,) = [duty for duty in broker.upkeep.duties if duty.name == "publish"]
        assert "away" in publish.failing
        assert 3 <= gate.asked < 20  # it backs off
        gate.answer = None
        await trio.sleep(60)
        (found,) = await broker.inflight.describe(["a"])
        assert (found.status, found.dead_lettered) == (Status.GONE, True)
        assert publish.failing == ""


async def test_what_can_never_be_published_is_kept_out_of_the_way(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    gate = Gate()
    gate.answer = Rejected("too large")
    async with open_broker(tmp_path, outlet=gate) as broker:
        await fail_one(broker)
        await trio.sleep(60)
        (found,) = await broker.inflight.describe(["a"])
        assert (found.status, found.error) == (Status.FAILURE, "too large")
        assert gate.asked == 1


async def test_what_is_forbidden_waits_until_it_is_allowed_and_holds_up_nothing(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    gate = Gate()
    gate.forbids = DLQ
    async with open_broker(tmp_path, outlet=gate) as broker:
        for number in range(250):  # more than one round takes
            policy = broker.dead_letter_policy()
            await broker.produce(broker.activation(f"dead{number}", retry_state=policy))
            await trio.sleep(0.1)
            await broker.get_task()
            await broker.set_status(f"dead{number}", consumer.FAILURE)
        await trio.sleep(2)
        asked = gate.asked
        (publish,) = [duty for duty in broker.upkeep.duties if duty.name == "publish"]
        (forbidden,) = [duty for duty in broker.upkeep.duties if duty.name == "forbidden"]
        assert forbidden.trouble() == f"no right to {DLQ}"
        (found,) = await broker.inflight.describe(["dead7"])
        assert (found.status, found.error) == (Status.FAILURE, f"forbidden: no right to {DLQ}")

        await broker.produce(broker.activation("again", retry_state=broker.dead_letter_policy()))
        await trio.sleep(0.1)
        await broker.get_task()
        await broker.set_status("again", consumer.RETRY)
        await trio.sleep(2)
        (found,) = await broker.inflight.describe(["again"])
        assert found.continued_as
        assert publish.failing == ""
        await trio.sleep(600)
        assert 10 <= gate.asked - asked < 15  # one row, every minute
        assert forbidden.trouble()
    # The reason is in the file: a restart forgets nothing.
    async with open_broker(tmp_path, outlet=gate) as broker:
        (forbidden,) = [duty for duty in broker.upkeep.duties if duty.name == "forbidden"]
        await trio.sleep(2)
        assert forbidden.trouble() == f"no right to {DLQ}"
        gate.forbids = ""
        await trio.sleep(120)
        assert forbidden.trouble() == ""
        found = await broker.inflight.describe([f"dead{number}" for number in range(250)])
        assert {(one.status, one.dead_lettered) for one in found} == {(Status.GONE, True)}
        assert len(await broker.records(DLQ)) == 250


async def test_one_failing_duty_holds_up_no_other(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    gate = Gate()
    gate.answer = LogUnavailable("away")
    async with open_broker(tmp_path, outlet=gate) as broker:
        await fail_one(broker)
        await broker.produce(broker.activation("b", delay=5))
        await trio.sleep(8)
        assert (await broker.get_task()).id == "b"


async def test_every_transition_is_told_by_id_when_traced(autojump_clock: Clock, broker: Broker) -> None:
    told: list[tuple[str, str, str]] = []
    broker.inflight.observers.append(
        lambda changes: told.extend((t.id, t.event.value, t.status.word) for t in changes.transitions)
    )
    broker.inflight.observers.append(measure.count)
    broker.inflight.trace(True)
    with capture_logs() as logs:
        await broker.produce(broker.activation("a"))
        await broker.settle()
        await broker.get_task()
    broker.inflight.trace(False)
    await broker.set_status("a")
    assert [(line["id"], line["by"]) for line in logs if line["event"] == "transition"] == [
        ("a", "arrived"),
        ("a", "handed_out"),
    ]
    assert told == [("a", "arrived", "pending"), ("a", "handed_out", "processing")]
