"""What is asked of a copy of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taskd.database import open_for_reading


def newest_offsets(path: Path) -> dict[tuple[str, int], int]:
    """The largest offset of each (topic, partition) that is in the store, finished or not."""
    with open_for_reading(path) as db:
        rows: list[Any] = db.execute(
            "SELECT topic, partition, max(offset) FROM inflight GROUP BY topic, partition"
        ).fetchall()
    return {(topic, number): offset for topic, number, offset in rows}
