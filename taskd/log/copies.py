"""The file of an embedded log from outside: what a backup asks of it, and mends in its copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taskd.database import open_database, open_for_reading
from taskd.log.base import Partition

LOG_FILE = "log.sqlite"

Committed = dict[tuple[str, Partition], int | None]
"""The offset each group reads on from; None: it has not committed yet."""


def committed(path: Path) -> Committed:
    with open_for_reading(path) as db:
        rows: list[Any] = db.execute(
            'SELECT "group", topic, number, next_offset FROM committed JOIN partition ON id = partition_id'
        ).fetchall()
    return {(group, Partition(topic, number)): offset for group, topic, number, offset in rows}


def first_offsets(path: Path) -> dict[Partition, int]:
    with open_for_reading(path) as db:
        rows: list[Any] = db.execute("SELECT topic, number, first_offset FROM partition").fetchall()
    return {Partition(topic, number): offset for topic, number, offset in rows}


def set_committed(path: Path, wanted: Committed) -> None:
    """Let every group of a copy read on from where `wanted` says; what is not in it, from the beginning."""
    db = open_database(path)
    try:
        with db:
            db.execute("UPDATE committed SET next_offset = NULL")
            for (group, partition), offset in wanted.items():
                db.execute(
                    'UPDATE committed SET next_offset = ? WHERE "group" = ? AND partition_id = '
                    "(SELECT id FROM partition WHERE topic = ? AND number = ?)",
                    (offset, group, *partition),
                )
        db.execute("PRAGMA journal_mode = DELETE").fetchall()
    finally:
        db.close()
