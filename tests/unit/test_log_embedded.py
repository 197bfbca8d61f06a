"""The embedded log's disk: what is refused at the start, what is read back, what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
import trio

from taskd.clock import Now
from taskd.database import hold_lock
from taskd.errors import LogUnavailable, StartupError
from taskd.log import embedded
from taskd.log.base import Outgoing, Partition, Position
from taskd.log.embedded import EmbeddedLog, open_embedded

TOPIC = Partition("t", 0)
DAY_MS = 86_400_000


class SetClock:
    def __init__(self) -> None:
        self.ms = 1_800_000_000_000

    def now(self) -> Now:
        return Now(self.ms, self.ms)


async def refused(data_dir: Path) -> StartupError:
    with pytest.raises(StartupError) as caught:
        async with open_embedded(data_dir, clock=SetClock()):
            pass
    return caught.value


async def test_a_second_broker_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    async with open_embedded(tmp_path, clock=SetClock()):
        error = await refused(tmp_path)
    assert error.exit_code == 75
    assert "another running broker" in str(error)
    with hold_lock(tmp_path / "broker.lock"):
        async with open_embedded(tmp_path, clock=SetClock(), lock=False):
            pass


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    error = await refused(tmp_path / "file" / "data")
    assert error.exit_code == 73


async def test_a_file_of_a_newer_taskd(tmp_path: Path) -> None:
    async with open_embedded(tmp_path, clock=SetClock()):
        pass
    db = apsw.Connection(str(tmp_path / "log.sqlite"))
    db.execute("PRAGMA user_version = 99")
    db.close()
    error = await refused(tmp_path)
    assert error.exit_code == 73
    assert "schema version 99" in str(error)


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "log.sqlite").write_bytes(b"not a database" * 1_000)
    error = await refused(tmp_path)
    assert error.exit_code == 73


async def test_reading_on_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of it has left the memory, some has not: the reader sees one sequence."""
    monkeypatch.setattr(embedded, "RECENT_MAX_BYTES", 20_000)
    sent = [Outgoing("t", b"%d" % number, b"k", (("h", b"\x00"),)) for number in range(1_000)]
    async with open_embedded(tmp_path, clock=SetClock()) as log:
        await log.append(sent)
        async with log.open_reader(["t"], "g") as reader:
            records = []
            while len(records) < 1_000:
                records += await reader.read_batch(77, 5)
            assert await reader.read_batch(10, 0) == []
    assert [(r.offset, r.value, r.key, r.headers) for r in records] == [
        (offset, out.value, out.key, out.headers) for offset, out in enumerate(sent)
    ]


async def test_offsets_go_on_after_reopening(tmp_path: Path) -> None:
    for expected in (0, 1):
        async with open_embedded(tmp_path, clock=SetClock()) as log:
            assert await log.append([Outgoing("t", b"v")]) == [Position(TOPIC, expected)]


async def test_many_appends_become_few_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def counting(db: apsw.Connection, writes: list[Callable[[], object]]) -> object:
        batches.append(len(writes))
        return apply(db, writes)

    apply = embedded.apply_in_one_transaction
    monkeypatch.setattr(embedded, "apply_in_one_transaction", counting)
    async with open_embedded(tmp_path, clock=SetClock()) as log:
        await log.ensure_topics({"t": 1})
        batches.clear()
        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(log.append, [Outgoing("t", b"%d" % number)])
        assert sum(batches) == 500
        assert len(batches) < 100
        async with log.open_reader(["t"], "g") as reader:
            records = await reader.read_batch(1_000, 5)
    assert [record.offset for record in records] == list(range(500))


async def test_a_failed_transaction_is_answered_and_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_embedded(tmp_path, clock=SetClock()) as log, log.open_reader(["t"], "g") as reader:
        await log.append([Outgoing("t", b"0")])
        storage = log._sqlite
        db = storage._writing.db
        db.set_commit_hook(lambda: True)  # SQLite answers a failed COMMIT like a full disk does
        (answer,) = await log.append([Outgoing("t", b"lost")])
        assert isinstance(answer, LogUnavailable)
        with pytest.raises(LogUnavailable):
            await reader.commit({TOPIC: 1})
        assert await reader.committed(TOPIC) is None
        db.set_commit_hook(None)
        assert await log.append([Outgoing("t", b"1")]) == [Position(TOPIC, 1)]
        assert [record.value for record in await reader.read_batch(10, 5)] == [b"0", b"1"]


async def appended(log: EmbeddedLog, number: int) -> None:
    await log.append([Outgoing("t", b"v") for _ in range(number)])


def stored(log: EmbeddedLog) -> object:
    return log._sqlite._reading.db.execute("SELECT count(*) FROM record").get


async def test_only_what_all_have_read_and_is_old_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "TRIM_SLICE", 7)
    clock = SetClock()
    async with open_embedded(tmp_path, clock=clock, retention_s=86_400) as log:
        await appended(log, 50)
        clock.ms += 10 * DAY_MS
        assert await log.trim(clock.now()) == 0  # nobody has read
        async with log.open_reader(["t"], "one") as one, log.open_reader(["t"], "two") as two:
            await one.commit({TOPIC: 40})
            assert await log.trim(clock.now()) == 0  # `two` has joined and not committed
            clock.ms += embedded.TRIM_EVERY_MS
            await two.commit({TOPIC: 30})  # drops the first slice by itself
            assert stored(log) == 43
            assert await log.trim(clock.now()) == 23
            assert await log.trim(clock.now()) == 0
            await two.seek(TOPIC, 0)  # gone: goes on with what is there
            assert (await two.read_batch(100, 5))[0].offset == 30
            await appended(log, 5)
            await two.commit({TOPIC: 55})
            await one.commit({TOPIC: 55})
            await log.trim(clock.now())
            assert stored(log) == 5  # read by all and young
            clock.ms += 2 * DAY_MS
            assert await log.trim(Now(clock.ms, clock.ms, may_expire=False)) == 0
            await log.trim(clock.now())
            assert stored(log) == 0
    async with open_embedded(tmp_path, clock=clock) as log:  # an emptied partition does not begin anew
        assert await log.append([Outgoing("t", b"v")]) == [Position(TOPIC, 55)]
        async with log.open_reader(["t"], "one") as one:
            assert [record.offset for record in await one.read_batch(10, 5)] == [55]


async def test_a_disk_that_cannot_be_read_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.log.local.READ_AGAIN_S", 0.0)
    async with open_embedded(tmp_path, clock=SetClock()) as log:
        await appended(log, 3)
    async with open_embedded(tmp_path, clock=SetClock()) as log, log.open_reader(["t"], "g") as reader:
        tables = log._sqlite._reading
        read = tables.read
        healthy: list[bool] = []

        def fails_twice(*arguments: object) -> object:
            healthy.append(reader.healthy)
            if len(healthy) < 3:
                raise apsw.IOError("disk I/O error")
            return read(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(tables, "read", fails_twice)
        assert len(await reader.read_batch(10, 5)) == 3
        assert healthy == [True, False, False]
        assert reader.healthy
