"""No application fills the store alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import trio

from taskd.activation.lifecycle import Status
from taskd.wire.envelope import scan

Clock = Any  # pytest-trio takes the clock among the test's own arguments only


def waiting(broker: Any) -> Counter[str]:
    return Counter({d.application: d.count for d in broker.inflight.depths() if d.status is Status.PENDING})


async def test_what_is_beyond_the_share_goes_to_the_overflow_topic_as_it_came(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    async with open_broker(tmp_path, share=3, overflow_topic="taskd-long") as broker:
        hot = [broker.activation(f"hot{n}", application="hot") for n in range(10)]
        calm = [broker.activation(f"calm{n}", application="calm") for n in range(2)]
        await broker.produce(*hot, *calm, key=b"key")
        await broker.settle()
        assert waiting(broker) == {"hot": 3, "calm": 2}
        assert await broker.committed() == 12
        records = await broker.records("taskd-long")
        assert [(record.value, record.key) for record in records] == [(raw, b"key") for raw in hot[3:]]
        assert (await broker.inflight.describe(["hot9"]))[0].status is None


async def test_without_an_overflow_topic_reading_waits_and_names_the_application(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    async with open_broker(tmp_path, share=3) as broker:
        await broker.produce(*(broker.activation(f"hot{n}", application="hot") for n in range(3)))
        await broker.settle()
        await broker.produce(broker.activation("hot3", application="hot"))
        await trio.sleep(5)
        assert "'hot'" in broker.ingest.paused["application"]
        assert await broker.committed() == 3
        task = await broker.get_task(application="hot")
        await broker.set_status(task.id)
        await trio.sleep(1)
        assert broker.ingest.paused == {}
        assert await broker.committed() == 4


async def test_stopping_while_there_is_no_room_commits_nothing_of_the_batch(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    async with open_broker(tmp_path, share=1) as broker:
        await broker.produce(broker.activation("a", application="hot"))
        await broker.settle()
        await broker.produce(broker.activation("b", application="hot"))
        await trio.sleep(2)
        broker.ingest.stop()
        await trio.sleep(2)
        assert await broker.committed() == 1
        assert waiting(broker) == {"hot": 1}
        assert scan((await broker.records("taskd"))[1].value).id == "b"
