"""A disk that is full, fails or loses what was not synced; a file that is damaged."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio.testing
from rows import arrival, check

from taskd import database
from taskd.activation.lifecycle import Status
from taskd.errors import StoreError
from taskd.inflight import writer as writer_module
from taskd.inflight.base import Arrival, ClaimRequest, LeaseKind, Policy, Report, ReportStatus
from taskd.inflight.quarantine import found_aside, set_aside_at_next_start, set_aside_if_damaged
from taskd.inflight.salvage import Salvaged, salvage
from taskd.inflight.sqlite import SqliteStore
from taskd.inflight.writer import Inflight, open_inflight
from taskd.testing.clock import FixedClock
from taskd.testing.faults import Disk, open_disk
from taskd.wire.generated.sentry_protos.taskbroker.v1 import TaskActivation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


def opened(path: Path, *, inline: bool = True) -> Any:
    return open_inflight(path, FixedClock(), Policy(), inline=inline)


def arrivals(*ids: str, size: int = 10) -> list[Arrival]:
    return [arrival(id_, received_at_ms=None, activation=b"x" * size) for id_ in ids]


async def claim(store: Inflight, limit: int = 10) -> list[Any]:
    return await store.claim(ClaimRequest(limit, LeaseKind.STREAM, holder="w"))


# ---- power


async def lose_power_after_insert(path: Path, disk: Disk) -> None:
    async with opened(path) as store:
        await store.insert(arrivals("acknowledged"))
        disk.cut_power()
    disk.restore_power()


async def test_what_was_acknowledged_survives_a_power_cut(path: Path) -> None:
    with open_disk() as disk:
        await lose_power_after_insert(path, disk)
    async with opened(path) as store:
        assert [lease.id for lease in await claim(store)] == ["acknowledged"]
        check(store)


async def test_the_shim_tells_full_from_normal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with `synchronous=NORMAL` loses it: else the test above would prove nothing."""
    real = database.open_database

    def careless(path: Path) -> Any:
        db = real(path)
        db.execute("PRAGMA synchronous = NORMAL")
        return db

    monkeypatch.setattr("taskd.inflight.sqlite.open_database", careless)
    with open_disk() as disk:
        await lose_power_after_insert(path, disk)
    async with opened(path) as store:
        assert await claim(store) == []


# ---- a full disk


@pytest.mark.parametrize("inline", [True, False])
async def test_a_full_disk_stops_the_taking_and_goes_on_by_itself(
    path: Path, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_disk() as disk:
        async with opened(path, inline=inline) as store:
            await store.insert(arrivals("held", "waits", size=100_000))
            (lease,) = await claim(store, 1)
            await store.shrink(1)
            store._store.db.wal_checkpoint()  # what the log of changes has room for can be written again
            disk.full = True
            with pytest.raises(StoreError, match="FullError"):
                await store.insert(arrivals("too much", size=1_000_000))
            assert store.trouble == "the disk is full"
            writes = disk.writes
            with pytest.raises(StoreError, match="the disk is full"):
                await store.insert(arrivals("another"))
            assert await claim(store) == []
            assert not store.claimable(None, ())
            assert disk.writes == writes  # nothing was even tried
            # Results are taken: they fit in the room that the files have.
            await store.report([Report(lease.id, lease.fence, ReportStatus.COMPLETE)])
            assert store.counts() == {Status.GONE: 1, Status.PENDING: 1}
            with monkeypatch.context() as patch:
                patch.setattr(writer_module, "free_bytes", lambda path: 1_000)
                with pytest.raises(StoreError, match="the disk is full: 1000 bytes are free"):
                    await store.probe()
            wake = store.watch_claimable()
            disk.full = False
            await store.probe()
            assert store.trouble == ""
            with trio.fail_after(5):
                await wake.wait()
            await store.insert(arrivals("another"))
            assert [lease.id for lease in await claim(store)] == ["waits", "another"]
            check(store)


async def test_on_a_full_disk_neighbours_are_tried_one_by_one(path: Path) -> None:
    with open_disk() as disk:
        async with opened(path) as store:
            await store.insert(arrivals("held", size=200_000))
            (lease,) = await claim(store)
            store._store.db.wal_checkpoint()
            disk.full = True
            now = store._clock.now()
            report = Report(lease.id, lease.fence, ReportStatus.COMPLETE)
            results = store._store.apply(
                [
                    lambda: store._leases.report([report], now),
                    lambda: store._arrivals.insert(arrivals("too much", size=1_000_000), now),
                ]
            )
            results[0].unwrap()
            with pytest.raises(StoreError):
                results[1].unwrap()
            assert store.counts() == {Status.GONE: 1}
            disk.full = False
            check(store)


async def test_a_limit_of_the_file_itself_is_a_full_disk_too(path: Path) -> None:
    async with opened(path) as store:
        core = store._store
        core.db.execute(f"PRAGMA max_page_count = {core.db.pragma('page_count') + 5}")
        with pytest.raises(StoreError):
            await store.insert(arrivals("too much", size=1_000_000))
        assert store.trouble == "the disk is full"
        with pytest.raises(StoreError):
            await store.probe()
        core.db.execute("PRAGMA max_page_count = 1000000")
        await store.probe()
        await store.insert(arrivals("fits"))
        check(store)


# ---- I/O errors


@pytest.mark.parametrize("nth", range(1, 8))
async def test_an_io_error_at_the_nth_write(path: Path, nth: int) -> None:
    with open_disk() as disk:
        async with opened(path) as store:
            await store.insert(arrivals("before"))
            disk.fails_at = nth
            taken = []
            for number in range(8):
                try:
                    await store.insert(arrivals(f"{number}"))
                except StoreError:
                    pass
                else:
                    taken.append(f"{number}")
            assert store.trouble.startswith("the disk fails: ")
            assert len(taken) < 8
            with pytest.raises(StoreError):
                await store.probe()
            disk.fails_at = None
            await store.probe()
            assert [lease.id for lease in await claim(store)] == ["before", *taken]
            check(store)
    async with opened(path) as store:
        assert store.counts() == {Status.PROCESSING: 1 + len(taken)}
        check(store)


async def test_a_disk_that_does_not_sync_acknowledges_nothing(path: Path) -> None:
    with open_disk() as disk:
        async with opened(path) as store:
            disk.unsyncable = True
            with pytest.raises(StoreError, match="IOError"):
                await store.insert(arrivals("a"))
            assert store.trouble
            disk.unsyncable = False
            await store.probe()
            await store.insert(arrivals("a"))
            check(store)


# ---- damage


async def fill(path: Path, count: int = 300) -> None:
    async with opened(path) as store:
        await store.insert(arrivals(*(f"{n}" for n in range(count)), size=2_000))


def flip(path: Path, offset: int, length: int = 64) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(length)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in before))


def harm(path: Path, kind: str) -> None:
    size = path.stat().st_size
    if kind == "header":
        flip(path, 0)
    elif kind == "page":
        flip(path, size // 2 // 4096 * 4096)
    elif kind == "truncated":
        with path.open("r+b") as file:
            file.truncate(size // 2)
    else:
        path.write_bytes(b"certainly not a database" * 1_000)
    Path(f"{path}-wal").write_bytes(b"")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["header", "page", "truncated", "garbage"])
async def test_a_damaged_file_is_set_aside(path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    await fill(path)
    harm(path, kind)
    aside, complete = set_aside_if_damaged(path, "quick", FixedClock().now())
    assert aside is not None
    assert complete
    assert {name.removesuffix("-wal").removesuffix("-shm") for name in names(path.parent)} == {aside.name}
    assert found_aside(path) == [aside]
    assert aside.name == "store.sqlite.damaged-20260101T000000.000"
    assert set_aside_if_damaged(path, "quick", FixedClock().now()) == (None, True)
    async with opened(path) as store:
        await store.insert(arrivals("goes on"))
        check(store)
    said = capsys.readouterr()
    assert str(aside) in said.out + said.err
    assert "taskd recover" in said.out + said.err


@pytest.mark.parametrize("how", ["quick", "full", "off"])
async def test_a_sound_file_stays(path: Path, how: Any) -> None:
    assert set_aside_if_damaged(path, how, FixedClock().now()) == (None, True)  # none yet
    await fill(path, 3)
    assert set_aside_if_damaged(path, how, FixedClock().now()) == (None, True)
    async with opened(path) as store:
        assert len(await claim(store)) == 3


async def test_a_check_holds_up_the_start_no_longer_than_allowed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(path)
    harm(path, "page")
    with monkeypatch.context() as patch:
        patch.setattr(database, "PROGRESS_STEPS", 1)
        assert set_aside_if_damaged(path, "quick", FixedClock().now(), within_s=0) == (None, False)
    assert set_aside_if_damaged(path, "quick", FixedClock().now(), within_s=60).aside is not None


async def test_what_was_found_damaged_in_use_is_set_aside_at_the_next_start(path: Path) -> None:
    await fill(path, 3)
    set_aside_at_next_start(path, "row 7 missing")
    aside, _ = set_aside_if_damaged(path, "off", FixedClock().now())
    assert aside is not None
    assert found_aside(path) == [aside]
    await fill(path, 3)
    set_aside_at_next_start(path, "row 7 missing")
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    copy.replace(path)  # it was put back from a copy meanwhile
    assert set_aside_if_damaged(path, "quick", FixedClock().now()) == (None, True)
    assert found_aside(path) == [aside]


@pytest.mark.parametrize("inline", [True, False])
async def test_damage_that_is_met_stops_the_taking_for_good(path: Path, inline: bool) -> None:
    await fill(path)
    third = path.stat().st_size // 3 // 4096 * 4096  # noqa: ASYNC240 - a test
    flip(path, third, third)
    async with opened(path, inline=inline) as store:
        assert await claim(store, 300) == []
        with trio.fail_after(5):
            await store.damaged.wait()
        assert "the file is damaged" in store.trouble
        with pytest.raises(StoreError, match="the file is damaged"):
            await store.probe()
        with pytest.raises(StoreError, match="the file is damaged"):
            await store.insert(arrivals("more"))
        assert await claim(store) == []


async def test_the_write_ahead_log_is_cut_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.inflight.sqlite.MAX_IDLE_WAL_BYTES", 100_000)
    async with opened(path) as store:
        reader = database.apsw.Connection(str(path))
        reader.execute("BEGIN; SELECT count(*) FROM inflight").fetchall()
        for n in range(20):
            await store.insert(arrivals(f"{n}", size=100_000))
            await store.shrink(10)
        assert store.wal_bytes > 1_000_000  # the reader holds it, and nobody waits for the reader
        reader.close()
        await store.shrink(10)
        assert store.wal_bytes == 0
        check(store)


# ---- salvage


async def fill_in_all_states(path: Path) -> None:
    async with opened(path) as store:
        await store.insert(
            [
                arrival._replace(activation=bytes(TaskActivation(id=arrival.id, taskname="task")))
                for arrival in arrivals(*(f"{n:03}" for n in range(400)))
            ]
        )
        leases = await claim(store, 200)
        await store.report(
            [Report(lease.id, lease.fence, ReportStatus.COMPLETE) for lease in leases[:150]]
            + [Report(lease.id, lease.fence, ReportStatus.RETRY) for lease in leases[150:160]]
        )
        core = store._store
        core.db.execute("UPDATE inflight SET error = hex(randomblob(1000))")  # a page holds only a few


def salvaged(damaged: Path, path: Path) -> Salvaged:
    clock = FixedClock()
    clock.advance(3_600)
    store = SqliteStore(path, clock.now(), Policy())
    found = salvage(damaged, store, clock.now())
    store.close()
    return found


async def test_everything_is_taken_from_a_file_that_is_sound(path: Path, tmp_path: Path) -> None:
    await fill_in_all_states(path)
    new = tmp_path / "new.sqlite"
    found = salvaged(path, new)
    assert found.complete
    assert found.finished == 150
    assert found.unfinished == {Status.PENDING: 200, Status.PROCESSING: 40, Status.RETRY: 10}
    async with opened(new) as store:
        check(store)
        assert await store.forget(600_000, 1_000, 100) == 0  # an hour is over; they are remembered anew
        assert (await store.insert(arrivals("000"))).duplicate == 1
        assert [lease.id for lease in await claim(store, 1)] == ["200"]
    again = salvaged(path, new)
    assert (again.known, again.finished, again.unfinished) == (400, 0, {})


@pytest.mark.parametrize("seed", range(6))
async def test_what_can_be_read_is_taken(path: Path, tmp_path: Path, seed: int) -> None:
    await fill_in_all_states(path)
    rng = random.Random(seed)
    size = path.stat().st_size  # noqa: ASYNC240 - a test
    if seed == 0:
        with path.open("r+b") as file:
            file.truncate(size // 2)
    else:
        # Leaves of the table and of its indexes; without the root of the table nothing could be found.
        for _ in range(seed):
            flip(path, rng.randrange(size // 4, size), length=rng.randrange(1, 5_000))
    new = tmp_path / "new.sqlite"
    found = salvaged(path, new)
    assert 20 < found.finished + found.unfinished.total() <= 400
    async with opened(new) as store:
        check(store)
        await claim(store, 400)


@pytest.mark.parametrize("wall_clock_set_back_s", [0, 24 * 3600])
async def test_no_fence_is_used_again_when_the_highest_cannot_be_read(
    path: Path, tmp_path: Path, wall_clock_set_back_s: int
) -> None:
    await fill_in_all_states(path)
    db = database.apsw.Connection(str(path))
    (highest,) = db.execute("SELECT max(fence) FROM inflight").fetchone()
    (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'meta'").fetchone()
    db.close()
    flip(path, (page - 1) * 4096, 4096)
    clock = FixedClock()
    clock.wall_ms -= wall_clock_set_back_s * 1000
    new = tmp_path / "new.sqlite"
    store = SqliteStore(new, clock.now(), Policy())
    found = salvage(path, store, clock.now())
    store.close()
    assert found.unfinished.total() == 250
    assert not found.complete
    store = SqliteStore(new, clock.now(), Policy())
    assert store.last_fence >= max(highest, clock.wall_ms * 1000)
    assert store.last_seq >= 400
    store.close()


async def test_of_garbage_nothing_is_taken(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"certainly not a database" * 1_000)  # noqa: ASYNC240
    found = salvaged(path, tmp_path / "new.sqlite")
    assert found == Salvaged(complete=False)
