"""Reading from the log: what is stored, when reading pauses, what happens to revoked partitions."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio

from taskd.activation.lifecycle import Status
from taskd.errors import LogUnavailable, StoreError
from taskd.inflight.base import Inserted
from taskd.ingest.backpressure import Limits
from taskd.ingest.loop import COMMIT_AFTER_S
from taskd.log.base import Partition
from taskd.log.memory import MemoryLog
from taskd.testing.clock import START_WALL_MS, TrioClock
from taskd.wire.envelope import scan

Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only


async def test_reading_pauses_at_the_limit_says_why_and_goes_on(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    async with open_broker(tmp_path, limits=Limits(max_pending_count=3)) as broker:
        await broker.produce(*(broker.activation(f"id{n}") for n in range(10)))
        await broker.settle()
        assert broker.inflight.counts()[Status.PENDING] == 3
        assert await broker.committed() == 3
        assert "max_pending_count is 3" in broker.ingest.paused["pending"]
        for n in range(10):
            assert (await broker.get_task()).id == f"id{n}"
            await broker.set_status(f"id{n}")
            await broker.settle()
        assert await broker.committed() == 10
        assert broker.ingest.paused == {}


async def test_a_batch_closes_as_soon_as_nothing_more_is_ready(autojump_clock: Clock, broker: Broker) -> None:
    await broker.settle()
    began = trio.current_time()
    for number in range(3):
        await broker.produce(broker.activation(f"id{number}"))
        await broker.settle()
        assert broker.inflight.counts()[Status.PENDING] == number + 1
    assert trio.current_time() == began
    assert await broker.committed() == 3


async def test_too_much_handed_out_pauses_reading(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    async with open_broker(tmp_path, limits=Limits(max_processing_count=1)) as broker:
        await broker.produce(broker.activation("a"))
        await broker.settle()
        await broker.get_task()
        await trio.sleep(6)
        await broker.produce(broker.activation("b"))
        await broker.settle()
        # The read that waited when the limit was reached may still have taken one batch.
        await broker.produce(broker.activation("c"))
        await broker.settle()
        assert "processing" in broker.ingest.paused
        await broker.set_status("a")
        await broker.settle()
        assert "processing" not in broker.ingest.paused


async def test_delayed_rows_beyond_their_limit_wait_in_the_log(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    now = datetime.fromtimestamp(START_WALL_MS / 1000, UTC)
    async with open_broker(tmp_path, limits=Limits(max_delay_count=2)) as broker:
        await broker.produce(*(broker.activation(f"id{n}", delay=60, received_at=now) for n in range(5)))
        await trio.sleep(5)
        assert broker.inflight.counts()[Status.DELAYED] == 2
        assert "delayed" in broker.ingest.paused
        await trio.sleep(60)
        assert broker.inflight.counts()[Status.PENDING] == 5


async def test_nothing_is_committed_while_the_store_fails(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = broker.inflight.insert

    async def failing(arrivals: object) -> Inserted:
        raise StoreError("disk full")

    monkeypatch.setattr(broker.inflight, "insert", failing)
    await broker.produce(broker.activation("a"))
    await trio.sleep(3)
    assert await broker.committed() is None
    assert "disk full" in broker.ingest.failing
    monkeypatch.setattr(broker.inflight, "insert", insert)
    await trio.sleep(6)
    assert await broker.committed() == 1
    assert broker.ingest.failing == ""
    assert (await broker.get_task()).id == "a"


async def test_a_revoked_partition_is_given_up_after_what_was_read_is_committed(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(*(broker.activation(f"id{n}") for n in range(20)))
    await broker.settle()
    async with broker.log.open_reader(["taskd"], "taskd") as other:
        await trio.sleep(1)
        assert broker.reader.assigned.isdisjoint(other.assigned)
        assert len(broker.reader.assigned | other.assigned) == 1
        assert await other.read_batch(100, 1) == []  # all of it was committed before it was given up
        await broker.produce(broker.activation("later"))
        later = await other.read_batch(100, 1)
    await trio.sleep(6)
    assert (later == []) or [r.offset for r in later] == [20]
    assert await broker.committed() == 21


class Commits:
    """What a reader is asked to commit, with the time."""

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[float, dict[Partition, int]]] = []
        self._commit = broker.reader.commit
        monkeypatch.setattr(broker.reader, "commit", self)

    async def __call__(self, offsets: dict[Partition, int], metadata: str = "") -> None:
        self.seen.append((trio.current_time(), dict(offsets)))
        await self._commit(offsets, metadata)


async def test_batches_that_follow_each_other_share_a_commit(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = Commits(broker, monkeypatch)
    await broker.settle()
    began = trio.current_time()
    for number in range(5):
        await broker.produce(broker.activation(f"id{number}"))
        await trio.sleep(COMMIT_AFTER_S / 10)
    await trio.sleep(1)
    ((at, offsets),) = commits.seen
    assert at == pytest.approx(began + COMMIT_AFTER_S)
    assert offsets == {Partition("taskd", 0): 5}
    await trio.sleep(60)
    assert len(commits.seen) == 1  # nothing is owed any more


async def test_what_is_owed_is_committed_before_a_partition_is_given_up(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog(2, clock=TrioClock())
    async with open_broker(tmp_path, log) as broker:
        commits = Commits(broker, monkeypatch)
        await broker.settle()
        began = trio.current_time()
        await broker.produce(*(broker.activation(f"id{n}") for n in range(20)))
        await broker.settle()
        assert commits.seen == []  # it is still owed
        async with log.open_reader(["taskd"], "taskd") as other:
            await broker.settle()
            (moved,) = other.assigned
            ((at, offsets),) = commits.seen
            assert (at, list(offsets)) == (began, [moved])
            assert await other.committed(moved) == offsets[moved]
            assert await other.read_batch(100, 1) == []


async def test_what_is_owed_is_committed_before_feeding_ends(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = Commits(broker, monkeypatch)
    await broker.settle()
    began = trio.current_time()
    await broker.produce(broker.activation("a"))
    await broker.settle()
    assert commits.seen == []
    broker.ingest.stop()
    await broker.settle()
    assert commits.seen == [(began, {Partition("taskd", 0): 1})]


async def test_what_may_run_once_only_is_committed_at_once(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = Commits(broker, monkeypatch)
    await broker.settle()
    began = trio.current_time()
    await broker.produce(
        broker.activation("a"), broker.activation("b", retry_state=broker.at_most_once_policy())
    )
    await broker.settle()
    assert commits.seen == [(began, {Partition("taskd", 0): 2})]


class Refusing(Commits):
    """Refuses the first two commits, as Kafka does while a group rebalances."""

    async def __call__(self, offsets: dict[Partition, int], metadata: str = "") -> None:
        if len(self.seen) < 2:
            self.seen.append((trio.current_time(), dict(offsets)))
            raise LogUnavailable("rebalancing")
        await super().__call__(offsets, metadata)


async def test_what_is_owed_is_tried_again_before_a_partition_is_given_up(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog(2, clock=TrioClock())
    async with open_broker(tmp_path, log) as broker:
        Refusing(broker, monkeypatch)
        await broker.settle()
        await broker.produce(*(broker.activation(f"id{n}") for n in range(20)))
        await broker.settle()
        async with log.open_reader(["taskd"], "taskd") as other:
            assert await other.read_batch(100, 5) == []
            (moved,) = other.assigned
            assert await other.committed(moved)


async def test_what_is_owed_is_tried_again_before_feeding_ends(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = Refusing(broker, monkeypatch)
    await broker.settle()
    await broker.produce(broker.activation("a"))
    await broker.settle()
    broker.ingest.stop()
    await trio.sleep(5)
    assert await broker.reader.committed(Partition("taskd", 0)) == 1
    assert len(commits.seen) == 3


async def test_a_log_that_is_away_does_not_hold_up_a_stop(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    async def away(offsets: object, metadata: str = "") -> None:
        tried.append(trio.current_time())
        await trio.sleep(5)
        raise LogUnavailable("no answer")

    monkeypatch.setattr(broker.reader, "commit", away)
    await broker.settle()
    await broker.produce(broker.activation("a"))
    await broker.settle()
    broker.ingest.stop()
    began = trio.current_time()
    await trio.sleep(60)
    assert max(tried) <= began + 5  # once; what else was about to try is cut off


async def test_a_commit_does_not_hold_up_the_next_batch(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(offsets: object, metadata: str = "") -> None:
        await trio.sleep(30)
        raise LogUnavailable("away")

    with monkeypatch.context() as away:
        away.setattr(broker.reader, "commit", slow)
        await broker.produce(broker.activation("a"))
        await trio.sleep(1)
        await broker.produce(broker.activation("b"))
        await broker.settle()
        assert [(await broker.get_task()).id for _ in range(2)] == ["a", "b"]
    await trio.sleep(60)
    assert await broker.committed() == 2


async def test_offsets_that_were_refused_are_committed_without_a_next_batch(
    autojump_clock: Clock, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(offsets: object, metadata: str = "") -> None:
        raise LogUnavailable("away")

    with monkeypatch.context() as away:
        away.setattr(broker.reader, "commit", refuse)
        await broker.produce(broker.activation("a"))
        await trio.sleep(8)
        assert (await broker.get_task()).id == "a"
        assert await broker.committed() is None
    await trio.sleep(8)
    assert await broker.committed() == 1


async def test_a_revocation_does_not_wait_for_room(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    now = datetime.fromtimestamp(START_WALL_MS / 1000, UTC)
    log = MemoryLog(2, clock=TrioClock())
    async with open_broker(tmp_path, log, limits=Limits(max_delay_count=1)) as broker:
        await broker.produce(*(broker.activation(f"id{n}", delay=600, received_at=now) for n in range(4)))
        await trio.sleep(1)
        assert "delayed" in broker.ingest.paused
        async with log.open_reader(["taskd"], "taskd") as other:
            await trio.sleep(1)
            (moved,) = other.assigned
            read = {scan(record.value).id for record in await other.read_batch(10, 1)}
            await trio.sleep(1_300)
            delayed_here = {f"id{n}" for n in range(4)} - read
            described = await broker.inflight.describe([f"id{n}" for n in range(4)])
    assert moved in {Partition("taskd", 0), Partition("taskd", 1)}
    stored = {found.id for found in described if found.status is not None}
    assert stored >= delayed_here
    assert len(read & stored) <= 1  # what was stored before, but nothing that waited when it was revoked


async def test_stop_ends_feeding_after_the_batch_in_hand(autojump_clock: Clock, broker: Broker) -> None:
    await broker.produce(broker.activation("a"))
    await broker.settle()
    broker.ingest.stop()
    await broker.settle()
    await broker.produce(broker.activation("b"))
    await trio.sleep(10)
    assert await broker.committed() == 1


async def test_activations_of_one_namespace_keep_their_order_and_none_blocks_another(
    autojump_clock: Clock, broker: Broker
) -> None:
    await broker.produce(
        *(broker.activation(f"hot{n}", namespace="hot") for n in range(50)),
        broker.activation("calm", namespace="calm"),
    )
    await broker.settle()
    handed_out = [(await broker.get_task()).id for _ in range(10)]
    assert "calm" in handed_out[:2]
    hot = [id_ for id_ in handed_out if id_ != "calm"]
    assert hot == [f"hot{n}" for n in range(9)]


async def test_a_batch_that_waited_while_its_partition_was_elsewhere_is_not_stored(
    autojump_clock: Clock, tmp_path: Path, open_broker: Any
) -> None:
    log = MemoryLog(2, clock=TrioClock())
    async with open_broker(tmp_path, log, limits=Limits(max_delay_count=8)) as broker:
        await broker.produce(*(broker.activation(f"full{n}", delay=60) for n in range(8)))
        await trio.sleep(1)
        await broker.produce(*(broker.activation(f"held{n}", delay=60) for n in range(8)))
        await trio.sleep(6)  # these are read, and wait for room
        async with log.open_reader(["taskd"], "taskd") as other:
            await trio.sleep(1)
            (partition,) = other.assigned
            seen = await other.read_batch(50, 1)
            await broker.produce(*(broker.activation(f"later{n}", delay=60) for n in range(20)))
            seen += await other.read_batch(50, 1)
            await other.commit({partition: seen[-1].offset + 1})
        for _ in range(600):
            await trio.sleep(1)
            assert (await broker.reader.committed(partition) or 0) > seen[-1].offset
        stored = await broker.inflight.describe([scan(record.value).id for record in seen])
        assert [found.id for found in stored if found.status is not None] == []
        assert broker.inflight.counts()[Status.PENDING] == 36 - len(seen)  # all the others came, once
