"""What waits goes back to the log, and is there what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

from taskd.activation.lifecycle import Status
from taskd.inflight.base import ClaimRequest, LeaseKind, Left
from taskd.log.memory import MemoryLog
from taskd.testing.clock import TrioClock
from taskd.upkeep.duties import Upkeep
from taskd.upkeep.evacuation import evacuation_duty
from taskd.wire.envelope import scan


async def test_what_waits_is_sent_back_and_runs_elsewhere(
    open_broker: Any, tmp_path: Path, autojump_clock: MockClock
) -> None:
    log = MemoryLog(clock=TrioClock())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with open_broker(tmp_path / "a", log) as old:
        now_ms = old.clock.now().wall_ms
        await old.produce(old.activation("held"))
        await old.settle()
        (held,) = await old.inflight.claim(ClaimRequest(1, LeaseKind.STREAM, holder="w"))
        # None of these says when it was received; the second waits from its arrival on.
        await old.produce(old.activation("waits"), old.activation("later", delay=60))
        await old.settle()
        assert old.inflight.counts() == {Status.PROCESSING: 1, Status.PENDING: 1, Status.DELAYED: 1}
        old.ingest.stop()
        await trio.sleep(20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Upkeep([evacuation_duty(old.inflight, 100)], old.clock).run)
            await trio.sleep(5)
            assert await old.inflight.left(10) == [Left("held", Status.PROCESSING, "")]
            await old.inflight.hand_back([held.ref])  # whatever comes to wait goes too
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        assert await old.inflight.left(10) == []
        assert old.inflight.counts() == {}  # no tombstones: the copies may come back here
        records = [scan(record.value) for record in await old.records("taskd")][3:]
        assert {(copy.id, copy.received_at_ms) for copy in records} == {
            ("held", now_ms),
            ("waits", now_ms),
            ("later", now_ms),
        }
    async with open_broker(tmp_path / "b", log) as new:
        await new.settle()
        counts = new.inflight.counts()
        assert counts == {Status.PENDING: 2, Status.DELAYED: 1}
        due_s = (now_ms - new.clock.now().wall_ms) / 1000 + 60
        assert 20 < due_s < 40  # of the 60 s, those that passed are over
        await trio.sleep(due_s + 2)
        assert new.inflight.counts() == {Status.PENDING: 3}


async def test_what_the_log_refuses_for_ever_is_named(
    open_broker: Any, tmp_path: Path, autojump_clock: MockClock
) -> None:
    log = MemoryLog(clock=TrioClock(), max_record_bytes=2_000)
    async with open_broker(tmp_path, log) as broker:
        await broker.produce(broker.activation("grows", parameters_bytes=b"x" * 1_970))
        await broker.settle()
        broker.ingest.stop()
        assert await broker.inflight.forward_all(10, "evacuated") == 1
        await trio.sleep(2)
        (left,) = await broker.inflight.left(10)
        assert (left.id, left.status) == ("grows", Status.FORWARDED)
        assert "2000" in left.stuck
