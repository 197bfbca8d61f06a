"""An activation's way through the broker, worked by unary calls."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import Status
from taskd.errors import Refused
from taskd.wire import consumer
from taskd.wire.envelope import scan
from taskd.wire.generated.sentry_protos.taskbroker.v1 import FetchNextTask, SetTaskStatusResponse

Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only


def activation(broker: Broker, id_: str, **fields: Any) -> bytes:
    return broker.activation(id_, **fields)  # type: ignore[no-any-return]


async def test_produced_handed_out_completed_and_committed(autojump_clock: Clock, broker: Broker) -> None:
    raw = activation(broker, "a", headers={"k": "v"})
    await broker.produce(raw)
    await broker.settle()
    assert await broker.committed() == 1
    task = await broker.get_task()
    assert bytes(task) == raw
    await broker.set_status("a")
    (found,) = await broker.inflight.describe(["a"])
    assert (found.status, found.outcome, found.attempts) == (Status.GONE, "complete", 1)
    with pytest.raises(Refused, match="No pending activations"):
        await broker.get_task()


async def test_a_redelivered_record_does_not_run_again(autojump_clock: Clock, broker: Broker) -> None:
    raw = activation(broker, "a")
    await broker.produce(raw, raw)
    await broker.settle()
    await broker.get_task()
    await broker.set_status("a")
    await broker.produce(raw)
    await broker.settle()
    assert await broker.committed() == 3
    with pytest.raises(Refused):
        await broker.get_task()


async def test_retry_is_published_under_a_derived_id_and_comes_back_after_its_delay(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(
        activation(broker, "a", delay=7, retry_state=broker.dead_letter_policy(), headers={"k": "v"})
    )
    await trio.sleep(9)
    await broker.get_task()
    await broker.set_status("a", consumer.RETRY, max_attempts=4, delay_on_retry=30)
    await broker.settle()
    with pytest.raises(Refused):
        await broker.get_task()
    await trio.sleep(32)
    task = await broker.get_task()
    assert task.id == retry_id("a", 1)
    assert task.retry_state is not None
    assert (task.retry_state.attempts, task.retry_state.max_attempts) == (1, 4)
    assert (task.delay, task.headers) == (30, {"k": "v"})
    (old,) = await broker.inflight.describe(["a"])
    assert (old.outcome, old.continued_as) == ("retried", task.id)


async def test_failure_is_dead_lettered_byte_for_byte_with_reasons(
    autojump_clock: Clock, broker: Broker
) -> None:
    raw = activation(broker, "a", retry_state=broker.dead_letter_policy())
    await broker.produce(raw, key=b"the key")
    await broker.settle()
    await broker.get_task()
    await broker.set_status("a", consumer.FAILURE)
    await broker.settle()
    (record,) = await broker.records("taskd-dlq")
    assert (record.value, record.key) == (raw, b"the key")
    headers = dict(record.headers)
    assert headers["taskd-reason"] == b"failed"
    assert (headers["taskd-topic"], headers["taskd-offset"]) == (b"taskd", b"0")
    (found,) = await broker.inflight.describe(["a"])
    assert (found.outcome, found.dead_lettered) == ("failed", True)


async def test_failure_without_policy_is_discarded(autojump_clock: Clock, broker: Broker) -> None:
    await broker.produce(activation(broker, "a"))
    await broker.settle()
    await broker.get_task()
    await broker.set_status("a", consumer.FAILURE)
    (found,) = await broker.inflight.describe(["a"])
    assert (found.outcome, found.dead_lettered) == ("failed", False)


async def test_undecodable_records_are_dead_lettered_and_the_rest_goes_on(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(b"\xff\xff not protobuf", activation(broker, "a"), b"")
    await broker.settle()
    assert await broker.committed() == 3
    assert (await broker.get_task()).id == "a"
    records = await broker.records("taskd-dlq")
    assert sorted(record.value for record in records) == [b"", b"\xff\xff not protobuf"]
    assert {dict(record.headers)["taskd-reason"] for record in records} == {b"undecodable"}


async def test_what_expired_never_starts_and_is_dead_lettered_by_policy(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(
        activation(broker, "a", expires=5, retry_state=broker.dead_letter_policy()),
        activation(broker, "b", expires=5),
    )
    await trio.sleep(7)
    with pytest.raises(Refused):
        await broker.get_task()
    (record,) = await broker.records("taskd-dlq")
    assert scan(record.value).id == "a"
    a, b = await broker.inflight.describe(["a", "b"])
    assert (a.outcome, b.outcome) == ("expired", "expired")


async def test_a_lease_that_is_over_goes_back_to_the_queue_until_attempts_are_exhausted(
    autojump_clock: Clock,
    broker: Broker,
) -> None:
    await broker.produce(activation(broker, "a", processing_deadline_duration=10))
    await broker.settle()
    for _ in range(5):
        assert (await broker.get_task()).id == "a"
        with pytest.raises(Refused):
            await broker.get_task()
        await trio.sleep(15)  # deadline 10 s, grace 3 s, one round of upkeep
    with pytest.raises(Refused):
        await broker.get_task()
    (found,) = await broker.inflight.describe(["a"])
    assert (found.outcome, found.reason, found.attempts) == ("failed", "deadline", 5)


async def test_a_late_status_counts_while_nobody_else_has_the_row(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(activation(broker, "a"))
    await broker.settle()
    await broker.get_task()
    await trio.sleep(15)
    await broker.set_status("a")
    (found,) = await broker.inflight.describe(["a"])
    assert found.outcome == "complete"


async def test_at_most_once_is_never_handed_out_twice(autojump_clock: Clock, broker: Broker) -> None:
    state = broker.dead_letter_policy()
    state.at_most_once = True
    await broker.produce(activation(broker, "a", retry_state=state))
    await broker.settle()
    await broker.get_task()
    await trio.sleep(15)
    with pytest.raises(Refused):
        await broker.get_task()
    (found,) = await broker.inflight.describe(["a"])
    assert (found.outcome, found.reason, found.dead_lettered) == ("failed", "at_most_once", True)


async def test_fetch_next_returns_the_next_task_or_nothing(autojump_clock: Clock, broker: Broker) -> None:
    await broker.produce(activation(broker, "a"), activation(broker, "b"))
    await broker.settle()
    await broker.get_task()
    body = await broker.set_status("a", fetch_next_task=FetchNextTask())
    task = SetTaskStatusResponse.parse(body).task
    assert task is not None
    assert task.id == "b"
    assert await broker.set_status("b", fetch_next_task=FetchNextTask()) == b""


@pytest.mark.parametrize("status", [0, 1, 2, 6, 99])
async def test_a_status_that_cannot_be_set_is_refused(
    autojump_clock: Clock, broker: Broker, status: int
) -> None:
    from taskd.wire.protobuf import text_field, varint_field

    with pytest.raises(Refused, match="expected 3") as refused:
        await broker.unary.set_task_status(text_field(1, "a") + varint_field(2, status))
    assert refused.value.code == "INVALID_ARGUMENT"


async def test_status_of_an_unknown_id_is_answered_ok(autojump_clock: Clock, broker: Broker) -> None:
    assert await broker.set_status("never heard of") == b""


async def test_namespace_without_application_finds_nothing(autojump_clock: Clock, broker: Broker) -> None:
    await broker.produce(activation(broker, "a"))
    await broker.settle()
    with pytest.raises(Refused):
        await broker.get_task(namespace="ns")
    with pytest.raises(Refused):
        await broker.get_task(application="other")
    assert (await broker.get_task(namespace="ns", application="")).id == "a"


async def test_while_draining_status_is_taken_and_nothing_handed_out(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(activation(broker, "a"), activation(broker, "b"))
    await broker.settle()
    await broker.get_task()
    broker.draining.set()
    with pytest.raises(Refused) as refused:
        await broker.get_task()
    assert refused.value.code == "UNAVAILABLE"
    assert await broker.set_status("a", fetch_next_task=FetchNextTask()) == b""
    (found,) = await broker.inflight.describe(["a"])
    assert found.outcome == "complete"


async def test_an_undelivered_reply_puts_the_row_back_uncounted(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(activation(broker, "a"))
    await broker.settle()
    reply = await broker.unary.get_task(b"")
    await reply.undelivered()
    (found,) = await broker.inflight.describe(["a"])
    assert (found.status, found.attempts) == (Status.PENDING, 0)
