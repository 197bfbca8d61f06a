"""Backups, restores and recovery over an embedded log, in process."""

from __future__ import annotations

import json
import sqlite3
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from taskd.activation.lifecycle import Status
from taskd.cli.store import explain_offsets, parse_time, summary
from taskd.config.schema import BrokerConfig
from taskd.daemon import backup as backups
from taskd.daemon import recover as recovery
from taskd.daemon.backup import back_up, restore
from taskd.daemon.evacuate import evacuate
from taskd.daemon.recover import Recovered, Rewound, parse_place, recover
from taskd.database import hold_lock
from taskd.errors import ConfigError, StartupError
from taskd.inflight.base import Arrival, ClaimRequest, LeaseKind, Policy, Report, ReportStatus, Verdict
from taskd.inflight.quarantine import set_aside_if_damaged
from taskd.inflight.writer import open_inflight
from taskd.log.base import Outgoing, Partition
from taskd.log.embedded import open_embedded
from taskd.testing.clock import START_WALL_MS, FixedClock
from taskd.wire.generated.sentry_protos.taskbroker.v1 import TaskActivation

P = Partition("taskd", 0)


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture
def config(tmp_path: Path) -> BrokerConfig:
    return BrokerConfig(data_dir=tmp_path / "data")


def arrival(id_: str, offset: int) -> Arrival:
    raw = bytes(TaskActivation(id=id_, taskname="task", namespace="ns"))
    return Arrival(id_, "ns", "task", "", None, 10, None, None, 0, True, False, "taskd", 0, offset, None, raw)


@asynccontextmanager
async def running(config: BrokerConfig, clock: FixedClock) -> Any:
    """What a broker has open: its log and its store, and how it feeds one from the other."""
    async with AsyncExitStack() as stack:
        log = await stack.enter_async_context(open_embedded(config.data_dir, clock=clock))
        store = await stack.enter_async_context(
            open_inflight(config.data_dir / "inflight.sqlite", clock, Policy())
        )
        yield log, store


async def produce(log: Any, *ids: str) -> None:
    await log.append([Outgoing("taskd", arrival(id_, 0).activation) for id_ in ids])


async def feed(log: Any, store: Any, upto: int = 1_000) -> list[str]:
    """Read, store, commit; the ids that were new to the store."""
    new = []
    async with log.open_reader(["taskd"], "taskd") as reader:
        while records := await reader.read_batch(upto, 0.05):
            for record in records:
                id_ = TaskActivation.parse(record.value).id
                if (await store.insert([arrival(id_, record.offset)])).pending:
                    new.append(id_)
            await reader.commit({P: records[-1].offset + 1})
    return new


async def claim(store: Any, limit: int = 100) -> list[Any]:
    leases: list[Any] = await store.claim(ClaimRequest(limit, LeaseKind.STREAM, holder="w"))
    return leases


async def finish(store: Any, *leases: Any) -> None:
    await store.report([Report(lease.id, lease.fence, ReportStatus.COMPLETE) for lease in leases])


# ---- backup and restore


async def test_a_backup_of_a_running_broker_holds_what_it_acknowledged(
    config: BrokerConfig, clock: FixedClock, tmp_path: Path
) -> None:
    async with running(config, clock) as (log, store):
        await produce(log, "done", "held", "waits")
        await feed(log, store)
        done, held = await claim(store, 2)
        await finish(store, done)
        await produce(log, "unread")
        manifest = await trio.to_thread.run_sync(back_up, config, tmp_path / "copy", clock)
        assert set(manifest.files) == {"inflight.sqlite", "log.sqlite"}
        await produce(log, "after the backup")
        await feed(log, store)
        later = await claim(store)
        await finish(store, held, *later)
    with pytest.raises(StartupError, match="exists") as refused:
        restore(config, tmp_path / "copy", clock, replace=False)
    assert refused.value.exit_code == 73
    done_ = restore(config, tmp_path / "copy", clock, replace=True)
    clock.advance(0.001)  # fences follow the wall clock
    assert len(done_.set_aside) == 2
    async with running(config, clock) as (log, store):
        known = {found.id: found.status for found in await store.describe(["done", "held", "waits"])}
        assert known == {"done": Status.GONE, "held": Status.PROCESSING, "waits": Status.PENDING}
        assert await feed(log, store) == ["unread"]
        # Fences are larger than any before, also those given after the backup.
        new = await claim(store)
        assert min(lease.fence for lease in new) > max(lease.fence for lease in later)
        (stale,) = [lease for lease in later if lease.id == "waits"]
        assert await store.report([Report("waits", stale.fence, ReportStatus.COMPLETE)]) == [
            Verdict.SUPERSEDED
        ]


@pytest.mark.parametrize("moment", ["before the store", "before the log"])
async def test_nothing_is_lost_whatever_happens_meanwhile(
    config: BrokerConfig, clock: FixedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The broker reads, finishes and publishes in the middle of a backup."""
    async with running(config, clock) as (log, store):
        await produce(log, "read before", "retried", "read meanwhile")
        async with log.open_reader(["taskd"], "taskd") as reader:
            records = await reader.read_batch(2, 1)
            await store.insert([arrival("read before", 0), arrival("retried", 1)])
            await reader.commit({P: records[-1].offset + 1})

        async def meanwhile() -> None:
            await feed(log, store)
            (lease,) = [lease for lease in await claim(store) if lease.id == "retried"]
            await produce(log, "the retry")
            await finish(store, lease)

        real = backups.copy_database

        def copy(source: Path, target: Path) -> None:
            if source.name == ("inflight.sqlite" if moment == "before the store" else "log.sqlite"):
                trio.from_thread.run(meanwhile)
            real(source, target)

        monkeypatch.setattr(backups, "copy_database", copy)
        await trio.to_thread.run_sync(back_up, config, tmp_path / "copy", clock)
        monkeypatch.undo()
    restore(config, tmp_path / "copy", clock, replace=True)
    async with running(config, clock) as (log, store):
        await feed(log, store)
        found = {d.id for d in await store.describe(["read before", "read meanwhile"]) if d.status}
        assert found == {"read before", "read meanwhile"}
        left = [d.id for d in await store.describe(["retried", "the retry"]) if d.status in (1, 5)]
        assert left  # one of the two is still to be run


async def test_a_log_that_drops_records_meanwhile_is_copied_again(
    config: BrokerConfig, clock: FixedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config, clock) as (log, store):
        await produce(log, "a")
        await feed(log, store)
    monkeypatch.setattr(backups.copies, "first_offsets", lambda path: {P: 5})
    with pytest.raises(StartupError, match="dropped records while it was copied, 3 times"):
        back_up(config, tmp_path / "copy", clock)


def test_what_is_no_backup_is_refused(config: BrokerConfig, clock: FixedClock, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="there is no store at"):
        back_up(config, tmp_path / "copy", clock)
    with pytest.raises(StartupError, match="is not a backup"):
        restore(config, tmp_path, clock, replace=False)


async def test_a_changed_backup_is_refused(config: BrokerConfig, clock: FixedClock, tmp_path: Path) -> None:
    async with running(config, clock):
        pass
    copy = tmp_path / "copy"
    back_up(config, copy, clock)
    with pytest.raises(StartupError, match="is not empty"):
        back_up(config, copy, clock)
    kafka = config.model_copy(update={"log": config.log.model_copy(update={"kind": "kafka"})})
    with pytest.raises(StartupError, match="was made with"):
        restore(kafka, copy, clock, replace=True)
    with hold_lock(config.data_dir / "broker.lock"), pytest.raises(StartupError) as locked:
        restore(config, copy, clock, replace=True)
    assert locked.value.exit_code == 75
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["log.sqlite"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StartupError, match="was changed"):
        restore(config, copy, clock, replace=True)


# ---- recovery


async def test_finished_work_is_dropped_when_the_log_is_read_again(
    config: BrokerConfig, clock: FixedClock
) -> None:
    path = config.data_dir / "inflight.sqlite"
    async with running(config, clock) as (log, store):
        await produce(log, *(f"{n}" for n in range(300)))
        await feed(log, store)
        await finish(store, *await claim(store, 100))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size * 3 // 4)
        file.write(b"\xff" * 6_000)
    aside = set_aside_if_damaged(path, "full", clock.now())
    assert aside is not None
    async with running(config, clock) as (log, store):  # the broker had begun anew, and knows nothing
        assert await feed(log, store) == []
        with pytest.raises(StartupError) as locked:
            await recover(config, clock, from_offsets={}, from_time_ms=0)
        assert locked.value.exit_code == 75
    done = await recover(config, clock, from_offsets={P: 0}, from_time_ms=None)
    assert done.rewound == [Rewound(P, 300, 0)]
    ((_, found),) = done.salvaged
    assert found.finished > 20
    assert not found.complete
    async with running(config, clock) as (log, store):
        await feed(log, store)
        known = await store.describe([f"{n}" for n in range(300)])
        assert [d.id for d in known if d.status is None] == []  # nothing is lost
        waiting = {d.id for d in known if d.status is Status.PENDING}
        assert {f"{n}" for n in range(100, 300)} <= waiting
        assert len(waiting) == 300 - found.finished  # what was readable as finished does not run again
    again = await recover(config, clock, from_offsets={}, from_time_ms=None)
    assert again == Recovered()


async def test_rewinding_by_time_never_goes_ahead(
    config: BrokerConfig, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "LOOK_WITHIN_S", 0.2)
    async with running(config, clock) as (log, _store):
        await produce(log, "a")
        clock.advance(60)
        await produce(log, "b")
        clock.advance(60)
        await produce(log, "c")
        async with log.open_reader(["taskd"], "taskd") as reader:
            await reader.read_batch(2, 1)
            await reader.commit({P: 2})

    async def rewind(**how: Any) -> list[Rewound]:
        return (await recover(config, clock, **{"from_offsets": {}, "from_time_ms": None} | how)).rewound

    assert await rewind(from_time_ms=START_WALL_MS + 100_000) == [Rewound(P, 2, 2)]
    assert await rewind(from_offsets={P: 7}) == [Rewound(P, 2, 2)]
    assert await rewind(from_time_ms=START_WALL_MS + 30_000) == [Rewound(P, 2, 1)]
    assert await rewind(from_time_ms=START_WALL_MS + 500_000) == [Rewound(P, 1, 1)]
    assert await rewind(from_offsets={P: 0}) == [Rewound(P, 1, 0)]


async def test_a_partition_nobody_has_is_said(
    config: BrokerConfig, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ASSIGNED_WITHIN_S", 0.1)
    for partition in (Partition("taskd", 9), Partition("other", 0)):
        with pytest.raises(StartupError, match=str(partition)):
            await recover(config, clock, from_offsets={partition: 0}, from_time_ms=None)


def test_times_and_places() -> None:
    assert parse_time("90s", 100_000) == 10_000
    assert parse_time("2026-01-01T00:00:00Z", 0) == START_WALL_MS
    assert parse_time("2026-01-01T02:00:00+02:00", 0) == START_WALL_MS
    assert parse_place("a/b/3=17") == (Partition("a/b", 3), 17)
    for text in ("2026-01-01T00:00:00", "soon", "-3h", ""):
        with pytest.raises(ValueError, match="expected a time"):
            parse_time(text, 0)
    for text in ("taskd=3", "taskd/x=3", "taskd/0", "taskd/0=-1"):
        with pytest.raises(ValueError, match="expected TOPIC"):
            parse_place(text)


def test_a_summary_says_what_to_do_next() -> None:
    from taskd.inflight.salvage import Salvaged

    found = Salvaged(finished=3, complete=False, unusable=2, known=1)
    found.unfinished[Status.PENDING] = 4
    done = Recovered([(Path("x.damaged"), found)], [Rewound(P, 9, 4), Rewound(P, None, None)])
    assert summary(done, rewinds=True) == [
        "x.damaged: 3 finished ids; 4 pending",
        "  1 were known already",
        "  parts could not be read, 2 rows among them: read the log again",
        "taskd/0: reads again from 4, 5 records",
        "taskd/0: nothing was committed yet",
    ]
    assert "run this again with --from-time" in summary(Recovered(done.salvaged), rewinds=False)[-1]


async def test_a_backup_over_kafka_says_how_to_read_on(
    config: BrokerConfig, clock: FixedClock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kafka = config.model_copy(update={"log": config.log.model_copy(update={"kind": "kafka"})})
    async with open_inflight(config.data_dir / "inflight.sqlite", clock, Policy(), inline=True) as store:
        await store.insert([arrival("a", 41), arrival("b", 40)])
        manifest = back_up(kafka, tmp_path / "copy", clock)
    assert manifest.offsets == {"taskd/0": 42}
    assert set(manifest.files) == {"inflight.sqlite"}
    explain_offsets(manifest.offsets)
    assert "taskd recover --config FILE --from-offset taskd/0=42" in capsys.readouterr().out
    assert restore(kafka, tmp_path / "copy", clock, replace=True).manifest == manifest


async def test_an_embedded_log_is_not_evacuated(config: BrokerConfig) -> None:
    with pytest.raises(ConfigError, match="use `taskd backup`"):
        await evacuate(config, grace_s=0, stop=trio.Event())


def test_copies_are_single_files_for_any_sqlite(
    config: BrokerConfig, clock: FixedClock, tmp_path: Path
) -> None:
    async def make() -> None:
        async with running(config, clock) as (log, store):
            await produce(log, "a")
            await feed(log, store)

    trio.run(make)
    back_up(config, tmp_path / "copy", clock)
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == [
        "inflight.sqlite",
        "log.sqlite",
        "manifest.json",
    ]
    with sqlite3.connect(tmp_path / "copy" / "inflight.sqlite") as db:
        assert db.execute("SELECT id, status FROM inflight_taskactivations").fetchall() == [("a", "Pending")]
    db.close()
