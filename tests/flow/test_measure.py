"""The gauges of a broker whose log comes and goes."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

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
