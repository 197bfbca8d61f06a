"""The store's schema: an old file is brought up to date, a newer one is opened or refused in words."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import apsw
import pytest

from taskd.activation.lifecycle import Status
from taskd.database import open_database
from taskd.errors import StartupError
from taskd.inflight import schema
from taskd.inflight.base import ClaimRequest, LeaseKind, Policy
from taskd.inflight.writer import open_inflight
from taskd.testing.clock import START_WALL_MS, FixedClock

VERSION_1 = (Path(__file__).parents[1] / "fixtures" / "store_version_1.sql").read_text()

# As the first version stored it: one waits, one is held, one left a tombstone.
ROWS_1 = """
INSERT INTO meta VALUES ('store_id', 'the-id'), ('last_fence', '41'), ('last_seq', '3');
INSERT INTO lane VALUES (1, 'shop', 'mail');
INSERT INTO depth VALUES (1, 1, 1), (1, 5, 1), (1, 12, 1);
INSERT INTO inflight (id, status, lane, seq, taskname, topic, partition, offset, activation, received_at_ms,
  stored_at_ms, deadline_ms, retry_attempts, dead_letter, at_most_once, fence, finished_at_ms)
VALUES ('waits', 1, 1, 1, 'send', 'taskd', 0, 0, x'01', 1, 1, 10000, 0, 1, 0, 0, NULL),
       ('held', 5, 1, 2, 'send', 'taskd', 0, 1, x'02', 1, 1, 10000, 0, 1, 0, 41, NULL),
       ('done', 12, 1, 3, 'send', 'taskd', 0, 2, NULL, 1, 1, 10000, 0, 1, 0, 0, 5);
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "store.sqlite"
    db = open_database(path)
    db.execute(VERSION_1)
    db.execute(ROWS_1)
    db.pragma("user_version", 1)
    db.close()
    return path


def objects(db: apsw.Connection) -> set[tuple[str, str, str]]:
    """Every table by its columns, everything else by its text."""
    found = set()
    for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL"):
        if kind == "table":
            columns = sorted(
                map(
                    str,
                    db.execute(
                        f"SELECT name, type, \"notnull\", dflt_value FROM pragma_table_info('{name}')"
                    ),
                )
            )
            found.add((kind, name, str(columns)))
        else:
            found.add((kind, name, re.sub(r"\s+", " ", sql)))
    return found


def test_an_old_file_migrated_is_like_a_new_one(old: Path, tmp_path: Path) -> None:
    new = open_database(tmp_path / "new.sqlite")
    migrated = open_database(old)
    for db in (new, migrated):
        schema.prepare_schema(db, Path(db.filename))
        assert db.pragma("user_version") == schema.SCHEMA_VERSION
    assert objects(migrated) == objects(new)
    new.close()
    migrated.close()


async def test_what_an_old_file_holds_goes_on(old: Path) -> None:
    async with open_inflight(old, FixedClock(), Policy(), inline=True) as store:
        assert store.store_id == "the-id"
        known = {found.id: found.status for found in await store.describe(["waits", "held", "done"])}
        assert known == {"waits": Status.PENDING, "held": Status.PROCESSING, "done": Status.GONE}
        (lease,) = await store.claim(ClaimRequest(10, LeaseKind.STREAM, holder="w"))
        assert lease.id == "waits"
        assert lease.fence > 41


def test_a_step_that_fails_leaves_the_file_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = open_database(old)
    before = objects(db)
    monkeypatch.setattr(schema, "_mark", lambda db, version: db.execute("SELECT nonsense"))
    with pytest.raises(apsw.SQLError):
        schema.prepare_schema(db, old)
    assert (objects(db), db.pragma("user_version")) == (before, 1)
    db.close()


@pytest.mark.parametrize("readable", [True, False])
async def test_a_newer_file_says_who_may_open_it(tmp_path: Path, readable: bool) -> None:
    path = tmp_path / "store.sqlite"
    async with open_inflight(path, FixedClock(), Policy(), inline=True) as store:
        db, newer = store._store.db, schema.SCHEMA_VERSION + 1
        db.execute("ALTER TABLE inflight ADD COLUMN later TEXT")
        db.execute(
            "DROP VIEW inflight_taskactivations; CREATE VIEW inflight_taskactivations AS SELECT 1 AS later"
        )
        db.execute(
            "UPDATE meta SET value = ? WHERE name = 'min_reader_version'",
            (str(newer - 1 if readable else newer),),
        )
        db.pragma("user_version", newer)
    if not readable:
        with pytest.raises(
            StartupError, match=f"schema version {newer}.*must know version {newer}"
        ) as refused:
            async with open_inflight(path, FixedClock(), Policy(), inline=True):
                pass
        assert refused.value.exit_code == 73
        return
    async with open_inflight(path, FixedClock(), Policy(), inline=True) as store:
        assert store._store.db.pragma("user_version") == newer
        assert store._store.db.execute("SELECT later FROM inflight_taskactivations").get == 1


def test_every_version_has_its_step_and_its_readers() -> None:
    assert set(schema.MIN_READER_VERSIONS) == set(range(1, schema.SCHEMA_VERSION + 1))
    for version in range(2, schema.SCHEMA_VERSION + 1):
        assert schema.FOLDER.joinpath(f"migrations/to_{version}.sql").is_file()


async def test_the_view_shows_what_is_not_finished(old: Path) -> None:
    async with open_inflight(old, FixedClock(), Policy(), inline=True) as store:
        core = store._store
        core.db.execute(
            "UPDATE inflight SET started_at_ms = ?, expires_at_ms = 7000 WHERE id = 'held'", (START_WALL_MS,)
        )
        reader = sqlite3.connect(f"file:{old}?mode=ro", uri=True)
        reader.row_factory = sqlite3.Row
        rows = {row["id"]: dict(row) for row in reader.execute("SELECT * FROM inflight_taskactivations")}
        reader.close()
        assert {id_: row["status"] for id_, row in rows.items()} == {"waits": "Pending", "held": "Processing"}
        assert rows["held"] == {
            "id": "held",
            "activation": b"\x02",
            "topic": "taskd",
            "partition": 0,
            "offset": 1,
            "namespace": "mail",
            "taskname": "send",
            "application": "shop",
            "status": "Processing",
            "received_at": 0,
            "added_at": 0,
            "processing_attempts": 0,
            "processing_deadline_duration": 10,
            "processing_deadline": START_WALL_MS // 1000 + 10,
            "delay_until": None,
            "expires_at": 7,
            "at_most_once": 0,
            "on_attempts_exceeded": "Deadletter",
            "retry_attempts": 0,
        }
