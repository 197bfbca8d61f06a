"""The gauges of a broker whose log comes and goes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing

from taskd.activation.lifecycle import Status
from taskd.daemon import measure
from taskd.errors import LogUnavailable
from taskd.log.base import Partition
from taskd.telemetry import metrics

Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only


class FickleReader:
    healthy = True

    def __init__(self) -> None:
        self.asked_count = 0
        self.asked_thrice = trio.Event()

    async def lag(self) -> dict[Partition, int]:
        self.asked_count += 1
        if self.asked_count == 3:
            self.asked_thrice.set()
        await trio.lowlevel.checkpoint()
        if self.asked_count == 1:
            raise LogUnavailable("the group changes hands")
        return {Partition("fickle", 0): 7} | ({Partition("fickle", 1): 1} if self.asked_count == 2 else {})


async def test_a_lag_that_cannot_be_measured_ends_nothing(autojump_clock: Clock, broker: Broker) -> None:
    reader: Any = FickleReader()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(measure.keep_gauges, broker.inflight, lambda: reader)
        with trio.fail_after(3_600):  # of virtual time, which jumps while a thread of the store works
            await reader.asked_thrice.wait()
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert metrics.log_lag_records.labels("fickle", "0")._value.get() == 7
    assert ("fickle", "1") not in metrics.log_lag_records._metrics  # it moved to another broker


async def test_a_long_look_at_partitions_is_taken_less_often(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[float] = []

    async def slow() -> dict[tuple[str, int, Status], int]:
        looked_at.append(trio.current_time())
        await trio.sleep(1 if len(looked_at) == 1 else 0)
        return {("slow", 0, Status.PENDING): len(looked_at)}

    monkeypatch.setattr(broker.inflight, "depths_by_partition", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(measure.keep_gauges, broker.inflight, lambda: None)
        await trio.sleep(120)
        nursery.cancel_scope.cancel()
    pauses_s = [later - earlier for earlier, later in pairwise(looked_at)]
    assert pauses_s[0] >= measure.PAUSES_PER_LOOK
    assert set(pauses_s[1:]) == {measure.EVERY_S}
    assert metrics.partition_rows.labels("slow", "0", "pending")._value.get() == len(looked_at)
