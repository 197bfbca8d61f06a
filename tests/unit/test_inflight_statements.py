"""The store's statements: each is used, and none reads more rows than it must."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from taskd.database import open_database
from taskd.inflight import sqlite as sqlite_module
from taskd.inflight.sqlite import load_queries


def test_every_statement_is_used_and_every_used_one_exists() -> None:
    sources = "".join(path.read_text() for path in Path(sqlite_module.__file__).parent.glob("*.py"))
    used = set(re.findall(r'(?:\.run|\.one|\.run_many|\.run_if_all|\._run)\(\s*"(\w+)"', sources))
    used |= set(re.findall(r'queries\["(\w+)"\]', sources))
    assert used == set(load_queries())


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[apsw.Connection]:
    db = open_database(tmp_path / "plans.sqlite")
    db.execute((Path(sqlite_module.__file__).parent / "schema.sql").read_text())
    yield db
    db.close()


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        ("waiting_in_lane", "inflight_waiting"),
        ("due", "inflight_due"),
        ("expiring", "inflight_expiring"),
        ("leases_over", "inflight_leases"),
        ("restart_leases", "inflight_leases"),
        ("held_by", "inflight_holders"),
        ("held", "inflight_holders"),
        ("holders", "inflight_holders"),
        ("leaving", "inflight_leaving"),
        ("demoted", "inflight_leaving"),
        ("tasks_in_lane", "inflight_waiting"),
        ("claims_over", "inflight_claims"),
        ("restart_claims", "inflight_claims"),
        ("forgettable", "inflight_gone"),
        ("oldest_gone", "inflight_gone"),
    ],
)
def test_hot_statements_use_their_partial_index(empty: apsw.Connection, statement: str, index: str) -> None:
    (plan,) = _plan(empty, statement)
    assert f"INDEX {index}" in plan


@pytest.mark.parametrize(
    "statement",
    sorted(set(load_queries()) - {"recount", "by_partition", "lanes", "depths", "left", "switches", "pools"}),
)
def test_no_statement_scans_or_sorts_the_table(empty: apsw.Connection, statement: str) -> None:
    for step in _plan(empty, statement):
        assert not re.search(r"SCAN \w+(?! USING)\b(?!.*INDEX)", step), step
        assert "TEMP B-TREE" not in step


def _plan(db: apsw.Connection, statement: str) -> list[str]:
    text = load_queries()[statement]
    rows = db.execute(f"EXPLAIN QUERY PLAN {text}", (0,) * text.count("?"))
    return [str(detail) for *_, detail in rows]
