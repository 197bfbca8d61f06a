"""The table in README.md names tests that exist, and leaves none of the walk out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = (HERE / "README.md").read_text()
ROWS = [row.split("|")[1:3] for row in TABLE.splitlines() if row.startswith("| ") and "proved by" not in row]
NAMED = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", "".join(tests for _, tests in ROWS))


def names_in(file: Path) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE))


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_the_tests_named_exist(file: str, name: str) -> None:
    found = names_in(HERE.parent / file)
    assert name in found if name else found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_every_row_has_a_test(row: list[str]) -> None:
    assert "`" in row[1] or "§" in row[1]


@pytest.mark.parametrize("module", ["test_states.py", "test_ingest.py"])
def test_the_whole_walk_is_in_the_table(module: str) -> None:
    assert names_in(HERE / module) == {name for file, name in NAMED if file == f"contract/{module}"}
