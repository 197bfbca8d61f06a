"""The embedded log's file: schema and statements. Synchronous; threads and transactions are the caller's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack

from taskd.database import open_database
from taskd.errors import StartupError
from taskd.log.base import Headers, Partition, Record

VERSION = 1

# One 64-bit key orders everything: the partition's id above, the offset in the low 40 bits (10^12 records).
OFFSET_BITS = 40
OFFSETS = 1 << OFFSET_BITS

# The timestamp stands before the value, so that a search by time does not read large values.
# A committed offset of NULL: the group reads the partition and has not committed yet.
# first_offset and the newest record say where a partition goes on, also when it was trimmed empty.
SCHEMA = f"""
CREATE TABLE partition (
  id INTEGER PRIMARY KEY,
  topic TEXT NOT NULL,
  number INTEGER NOT NULL,
  first_offset INTEGER NOT NULL DEFAULT 0,
  UNIQUE (topic, number)
);
CREATE TABLE record (
  position INTEGER PRIMARY KEY,
  timestamp_ms INTEGER NOT NULL,
  key BLOB,
  headers BLOB,
  value BLOB NOT NULL
);
CREATE TABLE committed (
  "group" TEXT NOT NULL,
  partition_id INTEGER NOT NULL REFERENCES partition (id),
  next_offset INTEGER,
  metadata TEXT NOT NULL DEFAULT '',
  PRIMARY KEY ("group", partition_id)
) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
"""


class Tables:
    """The statements, on one connection of their own. apsw's errors pass through."""

    def __init__(self, path: Path) -> None:
        """Raises StartupError (exit 73) when the folder or file cannot be written."""
        self.path = path
        self.db = open_database(path)

    def prepare(self) -> None:
        """Create the schema in a new file. Raises StartupError (exit 73) when a newer taskd wrote it."""
        version = self.db.pragma("user_version")
        if version == 0:
            self.db.execute(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        elif version != VERSION:
            raise StartupError(
                f"the log {self.path} has schema version {version}, this taskd knows up to {VERSION}. "
                "Start the newer taskd that wrote it, or give this one a data_dir of its own.",
                exit_code=73,
            )

    def partitions(self) -> Iterator[tuple[Partition, int, int, int]]:
        """Every partition with its id, first offset and end."""
        rows: list[Any] = self.db.execute("SELECT id, topic, number, first_offset FROM partition").fetchall()
        for partition_id, topic, number, first in rows:
            yield Partition(topic, number), partition_id, first, self._end(partition_id, first)

    def _end(self, partition_id: int, first: int) -> int:
        base = partition_id * OFFSETS
        newest: Any = self.db.execute(
            "SELECT max(position) FROM record WHERE position >= ? AND position < ?", (base, base + OFFSETS)
        ).get
        return first if newest is None else int(newest) - base + 1

    def commits(self) -> list[tuple[str, Partition, int | None]]:
        rows = self.db.execute(
            'SELECT "group", topic, number, next_offset FROM committed JOIN partition ON id = partition_id'
        )
        return [(group, Partition(topic, number), offset) for group, topic, number, offset in rows]

    def create(self, topics: Mapping[str, int]) -> None:
        """Topics that exist keep their partitions."""
        for topic, partitions in topics.items():
            if self.db.execute("SELECT count(*) FROM partition WHERE topic = ?", (topic,)).get == 0:
                self.db.executemany(
                    "INSERT INTO partition (topic, number) VALUES (?, ?)",
                    [(topic, number) for number in range(partitions)],
                )

    def insert(self, partition_id: int, records: Iterable[Record]) -> None:
        base = partition_id * OFFSETS
        self.db.executemany(
            "INSERT INTO record (position, timestamp_ms, key, headers, value) VALUES (?, ?, ?, ?, ?)",
            [
                (
                    base + offset,
                    timestamp_ms,
                    key,
                    msgpack.packb(headers) if headers else None,
                    value,
                )
                for _, offset, timestamp_ms, key, value, headers in records
            ],
        )

    def read(
        self, partition_id: int, partition: Partition, offset: int, max_records: int, max_bytes: int
    ) -> list[Record]:
        base = partition_id * OFFSETS
        records: list[Record] = []
        total = 0
        for position, timestamp_ms, key, headers, value in self.db.execute(
            "SELECT position, timestamp_ms, key, headers, value FROM record "
            "WHERE position >= ? AND position < ? ORDER BY position LIMIT ?",
            (base + offset, base + OFFSETS, max_records),
        ):
            records.append(
                Record(
                    partition, position - base, timestamp_ms, key, value, _headers(headers) if headers else ()
                )
            )
            total += len(value)
            if total >= max_bytes:
                break
        return records

    def first_at(self, partition_id: int, timestamp_ms: int) -> int | None:
        base = partition_id * OFFSETS
        position: Any = self.db.execute(
            "SELECT position FROM record WHERE position >= ? AND position < ? AND timestamp_ms >= ? "
            "ORDER BY position LIMIT 1",
            (base, base + OFFSETS, timestamp_ms),
        ).get
        return None if position is None else int(position) - base

    def join(self, group: str, partition_ids: Iterable[int]) -> None:
        self.db.executemany(
            'INSERT INTO committed ("group", partition_id) VALUES (?, ?) ON CONFLICT DO NOTHING',
            [(group, partition_id) for partition_id in partition_ids],
        )

    def commit(self, group: str, offsets: Iterable[tuple[int, int]], metadata: str) -> None:
        self.db.executemany(
            'INSERT INTO committed ("group", partition_id, next_offset, metadata) VALUES (?, ?, ?, ?) '
            "ON CONFLICT DO UPDATE SET next_offset = excluded.next_offset, metadata = excluded.metadata",
            [(group, partition_id, offset, metadata) for partition_id, offset in offsets],
        )

    def trim(self, partition_id: int, up_to_offset: int, before_ms: int, max_records: int) -> int:
        """Drop records below `up_to_offset` that are older than `before_ms`; the new first offset."""
        base = partition_id * OFFSETS
        first: Any = self.db.execute("SELECT first_offset FROM partition WHERE id = ?", (partition_id,)).get
        up_to = min(up_to_offset, first + max_records, self._end(partition_id, first))
        kept: Any = self.db.execute(
            "SELECT min(position) FROM record WHERE position >= ? AND position < ? AND timestamp_ms >= ?",
            (base + first, base + up_to, before_ms),
        ).get
        new_first = max(first, up_to if kept is None else kept - base)
        if new_first > first:
            self.db.execute(
                "DELETE FROM record WHERE position >= ? AND position < ?", (base + first, base + new_first)
            )
            self.db.execute("UPDATE partition SET first_offset = ? WHERE id = ?", (new_first, partition_id))
            self.db.execute("PRAGMA incremental_vacuum(256)").fetchall()  # pages, given back a few at a time
        return int(new_first)


def _headers(packed: bytes) -> Headers:
    return tuple((name, value) for name, value in msgpack.unpackb(packed))
