"""States (contract §2) whose proof needs time to pass: quiet time, order, loops of retries, delays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import Status
from taskd.daemon import measure
from taskd.errors import LogUnavailable, Refused
from taskd.inflight.base import Policy
from taskd.log.base import Outgoing, Position
from taskd.telemetry import metrics
from taskd.wire import consumer
from taskd.wire.envelope import scan
from taskd.wire.generated.sentry_protos.taskbroker.v1 import RetryState

Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only


@contextmanager
def counted(metric: str, by: int, **labels: str) -> Iterator[None]:
    before = metrics.registry.get_sample_value(metric, labels) or 0
    yield
    assert (metrics.registry.get_sample_value(metric, labels) or 0) - before == by


async def nothing_left(broker: Broker) -> None:
    with pytest.raises(Refused, match="No pending activations"):
        await broker.get_task()


async def outcome(broker: Broker, id_: str) -> tuple[str, bool]:
    (found,) = await broker.inflight.describe([id_])
    assert found.status is Status.GONE, found
    return found.outcome, found.dead_lettered


# ---- quiet time, order


async def test_no_lease_is_judged_in_the_quiet_time_after_a_start(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    async with open_broker(tmp_path, quiet_ms=60_000) as broker:
        await broker.produce(broker.activation("a"), broker.activation("b", processing_deadline_duration=1))
        await broker.settle()
        for _ in "ab":
            await broker.get_task()
        await trio.sleep(55)  # both leases were over long ago
        await nothing_left(broker)
        await broker.set_status("a")
        assert await outcome(broker, "a") == ("complete", False)
        await trio.sleep(7)
        assert (await broker.get_task()).id == "b"


async def test_what_is_requeued_keeps_its_place_and_a_retry_goes_behind(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(*(broker.activation(id_, processing_deadline_duration=1) for id_ in "abc"))
    await broker.settle()
    assert (await broker.get_task()).id == "a"
    await trio.sleep(6)  # its lease is over
    assert [(await broker.get_task()).id for _ in range(2)] == ["a", "b"]
    await broker.set_status("b", consumer.RETRY)
    await broker.settle()
    assert [(await broker.get_task()).id for _ in range(2)] == ["c", retry_id("b", 1)]


# ---- retries


async def test_two_leases_that_both_report_retry_make_one_retry(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(broker.activation("a", processing_deadline_duration=1))
    await broker.settle()
    await broker.get_task()
    await trio.sleep(6)
    await broker.get_task()
    for _ in range(2):
        await broker.set_status("a", consumer.RETRY)
    await broker.settle()
    assert (await broker.get_task()).id == retry_id("a", 1)  # processing attempts do not enter
    await nothing_left(broker)
    assert len(await broker.records("taskd")) == 2


class Forgetful:
    """Takes records and says that it did not, the first time."""

    def __init__(self) -> None:
        self.append: Any = None
        self.asked = 0

    async def __call__(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        self.asked += 1
        answers: list[Position | Exception] = await self.append(records)
        return answers if self.asked > 1 else [LogUnavailable("no answer") for _ in records]


async def test_a_retry_that_was_published_twice_runs_once(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    async with open_broker(tmp_path, outlet=Forgetful()) as broker:
        await broker.produce(broker.activation("a"))
        await broker.settle()
        await broker.get_task()
        await broker.set_status("a", consumer.RETRY)
        await trio.sleep(30)
        assert [scan(r.value).id for r in await broker.records("taskd")] == ["a", *[retry_id("a", 1)] * 2]
        assert (await broker.get_task()).id == retry_id("a", 1)
        await nothing_left(broker)


@pytest.mark.parametrize("enforced", [False, True])
async def test_a_loop_of_retries_is_stopped_only_where_that_is_wanted(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any, enforced: bool
) -> None:
    async with open_broker(tmp_path, policy=Policy(enforce_max_attempts=enforced)) as broker:
        await broker.produce(
            broker.activation("a", retry_state=RetryState(max_attempts=2, on_attempts_exceeded=1))
        )
        runs = 0
        with trio.move_on_after(600):
            for runs in range(20):  # noqa: B007  # counts what was handed out
                await broker.settle()
                try:
                    task = await broker.get_task()
                except Refused:
                    break
                await broker.set_status(task.id, consumer.RETRY)
        if not enforced:
            assert runs == 19
            return
        assert runs == 1 + 2 + 3  # the first, its attempts, and the margin
        (record,) = await broker.records("taskd-dlq")  # though its own policy is to discard
        assert scan(record.value).attempts == 5
        assert dict(record.headers)["taskd-reason"] == b"max_attempts"
        assert await outcome(broker, scan(record.value).id) == ("failed", True)


# ---- delays and expiry from elsewhere


async def test_a_foreign_delay_beyond_max_delay_is_shortened_counted_and_logged(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    name = "taskd_ingest_shortened_delays_total"
    async with open_broker(tmp_path, policy=Policy(max_delay_ms=60_000)) as broker:
        with counted(name, 1), capture_logs() as logs:
            await broker.produce(broker.activation("long", delay=7_200), broker.activation("ok", delay=60))
            await trio.sleep(50)
            await nothing_left(broker)
            await trio.sleep(15)
            assert {(await broker.get_task()).id, (await broker.get_task()).id} == {"long", "ok"}
        (line,) = [line for line in logs if line["event"] == "delays beyond max_delay_s are shortened"]
        assert (line["log_level"], line["count"], line["ids"]) == ("warning", 1, ("long",))


async def test_a_foreign_record_that_expires_before_its_delay_is_over_is_counted_and_reported(
    autojump_clock: Clock, broker: Broker
) -> None:
    with counted("taskd_ingest_delay_beyond_expiry_total", 2), capture_logs() as logs:
        await broker.produce(
            broker.activation("never", delay=60, expires=30, retry_state=broker.dead_letter_policy()),
            broker.activation("just not", delay=60, expires=60),
            broker.activation("ok", delay=60, expires=61),
        )
        await broker.settle()
        (line,) = [line for line in logs if line["event"] == "records expire before their delay is over"]
        assert line["ids"] == ("never", "just not")
    await trio.sleep(32)
    (record,) = await broker.records("taskd-dlq")
    assert scan(record.value).id == "never"


async def test_what_expires_without_a_policy_is_counted_and_logged(
    autojump_clock: Clock, broker: Broker
) -> None:
    broker.inflight.observers.append(measure.count)
    with counted("taskd_discarded_total", 3, reason="expired"), capture_logs() as logs:
        await broker.produce(*(broker.activation(id_, expires=5) for id_ in ("a", "b", "c")))
        await trio.sleep(10)
        await nothing_left(broker)
    told = [line for line in logs if line["event"] == "discarded"]
    assert {line["log_level"] for line in told} == {"info"}
    assert sum(line["count"] for line in told if line["reason"] == "expired") == 3


# ---- forwarded


async def test_what_overflows_waits_until_its_topic_takes_it(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_broker(tmp_path, share=1, overflow_topic="taskd-long") as broker:
        overflow = broker.ingest._overflow
        append, away = overflow._publish, True

        async def publish(records: Sequence[Outgoing]) -> list[Position | Exception]:
            if away:
                return [LogUnavailable("away") for _ in records]
            answers: list[Position | Exception] = await append(records)
            return answers

        monkeypatch.setattr(overflow, "_publish", publish)
        await broker.produce(broker.activation("a"), broker.activation("b"))
        await trio.sleep(60)
        assert "away" in broker.ingest.paused["overflow"]
        assert await broker.committed() is None
        away = False
        await trio.sleep(60)
        assert [scan(record.value).id for record in await broker.records("taskd-long")] == ["b"]
        assert await broker.committed() == 2
        assert broker.inflight.counts() == {Status.PENDING: 1}
