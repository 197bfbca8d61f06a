"""Takes what can still be read out of a damaged store, so that the log may be read again without harm.

Rows are read one after the other from both ends; what lies in between and cannot be read is jumped over.
Every row that is taken is taken as it is: what waited waits, what was held is held under its old fence, what
was finished is remembered, so that its record is dropped when it is read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from taskd.activation.lifecycle import Status
from taskd.clock import Now
from taskd.errors import Undecodable
from taskd.inflight.relaning import read_laned, write_laned
from taskd.inflight.sqlite import SqliteStore
from taskd.wire.envelope import scan

REMEMBER_MS = 24 * 3_600_000  # finished ids outlive the reading of the log, which may take hours
UNREADABLE = (apsw.Error, UnicodeDecodeError)
SLICE = 500  # rows of one transaction
MAX_NUMBER = 2**60  # a larger one is damage: fences are microseconds since 1970, about 2**51
_NOT_TAKEN = {"row", "lane"}  # numbers of the file they come from

Row = dict[str, Any]


@dataclass(slots=True)
class Salvaged:
    """What was found. `complete`: everything could be read, as far as the file itself tells."""

    finished: int = 0
    unfinished: Counter[Status] = field(default_factory=Counter)
    known: int = 0  # were in the new store already
    unusable: int = 0  # rows whose content is damaged
    complete: bool = True


class DamagedFile:
    """Reads a damaged store. Open it with `open_damaged`; nothing in it is changed."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self.complete = True
        found = [name for (name,) in self._all("SELECT name FROM pragma_table_info('inflight')")]
        self.columns = [name for name in found if name.isidentifier()]  # they become SQL
        self._lanes = {
            lane: (application, namespace)
            for lane, application, namespace in self._all("SELECT lane, application, namespace FROM lane")
        }

    def meta(self, name: str) -> int:
        """A number kept with the store, 0 when it cannot be read."""
        found = self._all("SELECT value FROM meta WHERE name = ?", name)
        return int(found[0][0]) if found and str(found[0][0]).isdigit() else 0

    def rows(self) -> Iterator[Row]:
        """Every row that can be read, each once."""
        last = yield from self._ascending(0, None)
        if last is None:
            return
        self.complete = False
        first = yield from self._descending(last)
        step, at, bad = 1, last + 1, last + 1
        while at < first:  # what lies between the two ends
            end = yield from self._ascending(at - 1, first)
            found = end is None or end >= at
            if found and at > bad + 1:
                yield from self._descending(bad, at)  # what the last jumps passed over
            if end is None:
                return
            if found:
                step, at = 1, end + 1
                bad = at
            else:
                step, at = step * 2, at + step

    def _ascending(self, after: int, before: int | None) -> Generator[Row, None, int | None]:
        """Rows up to one that cannot be read; returns the last one, None when the end was reached."""
        last = after
        try:
            for values in self._select(f"row > {after:d} AND row < {before or 2**62:d} ORDER BY row"):
                last = values["row"]
                yield values
        except UNREADABLE:
            return last
        return None

    def _descending(self, after: int, before: int = 2**62) -> Generator[Row, None, int]:
        """Rows from the end, or from `before`, down to one that cannot be read; returns the first of them."""
        first = after + 1
        try:
            for values in self._select(f"row > {after:d} AND row < {before:d} ORDER BY row DESC"):
                first = values["row"]
                yield values
        except UNREADABLE:
            pass
        return first

    def _select(self, which: str) -> Iterator[Row]:
        names = ", ".join(self.columns)
        # NOT INDEXED: damage of an index must not hide rows.
        sql = f"SELECT {names} FROM inflight NOT INDEXED WHERE {which}"  # noqa: S608 - identifiers, numbers
        for values in self._db.execute(sql):
            yield dict(zip(self.columns, values, strict=True))

    def lane_of(self, row: Row) -> tuple[str, str]:
        """Application and namespace: from the file, else from the activation itself."""
        lane = self._lanes.get(row.get("lane"))
        if lane is not None:
            return lane
        if row.get("activation") is None:
            return "", ""
        envelope = scan(row["activation"])
        return envelope.application, envelope.namespace

    def _all(self, sql: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except UNREADABLE:
            self.complete = False
            return []


def salvage(damaged: Path, store: SqliteStore, now: Now) -> Salvaged:
    """Bring what `damaged` holds into `store`, in transactions of bounded size. May be repeated."""
    found = Salvaged()
    db = _opened(damaged)
    if db is None:
        found.complete = False
        return found
    try:
        file = DamagedFile(db)
        batch: list[Row] = []
        for row in file.rows() if file.columns else ():
            batch.append(row)
            if len(batch) == SLICE:
                _take(batch, file, store, now, found)
                batch = []
        _take(batch, file, store, now, found)
        # Of what cannot be read, this is the highest that a clock which went right can have given.
        store.last_fence = max(store.last_fence, file.meta("last_fence"), now.wall_ms * 1000)
        store.last_seq = max(store.last_seq, file.meta("last_seq"))
        found.complete = file.complete and not found.unusable and bool(file.columns)
    finally:
        db.close()
    store.remember_finished_until(now.wall_ms + REMEMBER_MS)
    if laned := read_laned(store)[0] | store.limits.laned:
        write_laned(store, laned, settled=False)  # the broker may start under other limits than these
    return found


def _opened(damaged: Path) -> apsw.Connection | None:
    for options in ("mode=ro", "immutable=1"):  # the second passes over a log of changes that is damaged too
        try:
            db = apsw.Connection(
                f"file:{damaged}?{options}", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
            )
            db.pragma("writable_schema", True)  # else a file that is too short cannot be read at all
            db.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        except apsw.Error:
            continue
        return db
    return None


def _take(rows: Sequence[Row], file: DamagedFile, store: SqliteStore, now: Now, found: Salvaged) -> None:
    def write() -> None:
        for row in rows:
            _take_one(row, file, store, now, found)

    (result,) = store.apply([write])
    result.unwrap()


def _take_one(row: Row, file: DamagedFile, store: SqliteStore, now: Now, found: Salvaged) -> None:
    _pass_numbers(row, store)
    try:
        status = _checked(row)
        lane = store.lane_of(*file.lane_of(row), str(row.get("taskname")))
        if status is Status.GONE:
            row = row | {"finished_at_ms": now.wall_ms}  # remembered anew from here
        added = store.adopt(lane, status, {k: v for k, v in row.items() if k not in _NOT_TAKEN})
    except (ValueError, TypeError, Undecodable, apsw.Error):
        found.unusable += 1
        return
    if not added:
        found.known += 1
    elif status is Status.GONE:
        found.finished += 1
    else:
        found.unfinished[status] += 1


def _pass_numbers(row: Row, store: SqliteStore) -> None:
    """No fence and no place in the order that was given is given again, also when `meta` cannot be read."""
    fence, seq = row.get("fence"), row.get("seq")
    if isinstance(fence, int) and fence < MAX_NUMBER:
        store.last_fence = max(store.last_fence, fence)
    if isinstance(seq, int) and seq < MAX_NUMBER:
        store.last_seq = max(store.last_seq, seq)


def _checked(row: Row) -> Status:
    """The row's status; raises ValueError, TypeError or Undecodable when its content cannot be right."""
    status = Status(row["status"])
    if not isinstance(row["id"], str) or not row["id"]:
        raise ValueError("no id")
    if status is Status.GONE:
        return status
    if not isinstance(row["activation"], bytes):
        raise TypeError("no activation")
    if status is not Status.FAILURE and scan(row["activation"]).id != row["id"]:
        raise ValueError("an activation of another id")
    return status
