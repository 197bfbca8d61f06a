"""Settings that change while a broker runs: what the stations do from then on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing

from taskd.activation.lifecycle import Status
from taskd.config.schema import BrokerConfig
from taskd.daemon.operators import Operators
from taskd.inflight.base import Policy
from taskd.ingest.backpressure import Limits
from taskd.log.base import Outgoing, Position
from taskd.testing.clock import TrioClock
from taskd.upkeep.duties import Duty, Upkeep
from taskd.upkeep.forbidden import ForbiddenRows


async def test_reading_goes_on_when_a_limit_is_raised(
    broker: Any, autojump_clock: trio.testing.MockClock
) -> None:
    broker.ingest.set_limits(Limits(max_pending_count=1))
    await broker.produce(broker.activation("0"))
    await trio.sleep(10)
    await broker.produce(broker.activation("1"), broker.activation("2"))
    await trio.sleep(10)
    assert broker.inflight.counts()[Status.PENDING] == 1
    assert broker.ingest.paused
    broker.ingest.set_limits(Limits())
    await trio.sleep(2)
    assert broker.inflight.counts()[Status.PENDING] == 3
    assert not broker.ingest.paused


@pytest.mark.parametrize(("attempts", "status"), [(5, Status.PENDING), (1, Status.FAILURE)])
async def test_a_new_policy_holds_for_what_is_running(
    broker: Any, autojump_clock: trio.testing.MockClock, attempts: int, status: Status
) -> None:
    await broker.produce(broker.activation("a", retry_state=broker.dead_letter_policy()))
    await trio.sleep(0.1)
    await broker.get_task()
    broker.inflight.set_policy(Policy(max_processing_attempts=attempts))
    moved = []
    broker.inflight.observers.append(lambda changes: moved.extend(changes.events))
    await trio.sleep(15)  # the deadline of 10 s and the grace
    assert status in {after for _, after in moved}


async def test_a_new_interval_holds_after_the_round_that_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    interval_s, rounds = 60.0, []

    async def round_() -> int:
        rounds.append(trio.current_time())
        return 0

    clock = TrioClock()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Upkeep([Duty("tick", round_, 10, lambda: interval_s)], clock).run)
        await trio.sleep(1)
        interval_s = 1.0
        await trio.sleep(62)
        nursery.cancel_scope.cancel()
    assert [round(at - rounds[0]) for at in rounds[:4]] == [0, 60, 61, 62]


async def test_the_duties_of_switches_keep_the_interval_that_holds(
    broker: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async def append(records: Sequence[Outgoing]) -> list[Position | Exception]:
        return []

    config = BrokerConfig.model_validate({"upkeep": {"interval_s": 3}})
    forbidden = ForbiddenRows(broker.inflight, limit=10)
    operators = Operators(config, broker.clock, broker.inflight, {}, append, lambda leases: None, forbidden)
    assert {duty.every_s() for duty in operators.duties} == {3}
    operators.reload(BrokerConfig.model_validate({"upkeep": {"interval_s": 0.5}}))
    assert {duty.every_s() for duty in operators.duties} == {0.5}
