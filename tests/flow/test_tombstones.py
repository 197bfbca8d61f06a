"""How long ids that finished are remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio
import trio.testing

from taskd.upkeep.storage import Tombstones

TTL_S = 600


async def test_what_finished_is_remembered_while_its_record_may_come_again(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, open_broker: Any
) -> None:
    """The log went away before it took the offset: when it is back, after long, the record comes again."""
    async with open_broker(tmp_path) as broker:
        away = True
        (forget,) = [duty for duty in broker.upkeep.duties if duty.name == "forget"]
        forget.round = Tombstones(
            broker.inflight,
            broker.clock,
            ttl_ms=lambda: TTL_S * 1000,
            max_count=lambda: 1_000,
            limit=100,
            log_away=lambda: away,
        ).round
        record = broker.activation("a")
        await broker.produce(record)
        await broker.settle()
        await broker.get_task()
        await broker.set_status("a")
        await trio.sleep(3 * TTL_S)
        away = False
        await trio.sleep(TTL_S / 2)
        await broker.produce(record)
        await trio.sleep(2)
        (found,) = await broker.inflight.describe(["a"])
        assert found.status is not None
        assert found.status.word == "gone"
        await trio.sleep(TTL_S)
        (found,) = await broker.inflight.describe(["a"])
        assert found.status is None  # all is well: forgotten after its time
