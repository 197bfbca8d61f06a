"""The store's file: opening it, its statements, lanes and counters. Synchronous; one caller at a time.

`arrivals`, `leases` and `departures` hold what is done with the rows; `writer` gathers their callers
into transactions.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

import apsw
import outcome

from taskd.activation.lifecycle import HELD, Event, Status, after
from taskd.activation.switches import Board, Gate
from taskd.clock import Now
from taskd.database import (
    MAX_IDLE_WAL_BYTES,
    apply_in_one_transaction,
    cut_wal,
    disk_trouble,
    is_damage,
    open_database,
    open_for_reading,
    wal_bytes,
)
from taskd.errors import StartupError, StoreError
from taskd.groupcommit import Write
from taskd.inflight.base import Depth, Policy
from taskd.inflight.limits import Limit, Limits
from taskd.inflight.schema import prepare_schema

PROBE_BYTES = 256 * 1024
KEPT_FREE_PAGES = 8_192  # 32 MB that will be filled again are not worth giving back


_KEEPS_SEQ = HELD | {Status.PARKED}  # from there a row comes back to its old place in the lane


@dataclass(slots=True)
class Lane:
    """Where rows wait for each other: those of a namespace, but for its limited tasks, which have their own.

    `limits` are those that hold for every row of it.
    """

    number: int
    application: str
    namespace: str
    taskname: str = ""  # of a limited task; empty: the namespace's lane
    counts: Counter[Status] = field(default_factory=Counter)
    limits: tuple[Limit, ...] = ()

    @property
    def held(self) -> int:
        """Live leases."""
        return self.counts[Status.PROCESSING] + self.counts[Status.CLAIMED]

    @property
    def name(self) -> tuple[str, str]:
        return self.application, self.namespace


class Transition(NamedTuple):
    """One move of one activation, for the log of transitions."""

    id: str
    before: Status | None
    event: Event
    status: Status


@dataclass(slots=True)
class Changes:
    """What one write, or one batch of them, changed beside the rows; undone when the rows are."""

    events: Counter[tuple[Event, Status]] = field(default_factory=Counter)
    counts: Counter[tuple[int, Status]] = field(default_factory=Counter)
    lanes: list[Lane] = field(default_factory=list)  # new
    dropped_lanes: list[Lane] = field(default_factory=list)
    board_before: Board | None = None  # the switches changed; these held before
    wakes_claims: bool = False  # rows may have become claimable without having moved
    undo: list[Callable[[], object]] = field(default_factory=list)  # what else is to be taken back
    discarded: Counter[str] = field(default_factory=Counter)  # ended without a dead letter, by reason
    unknown: set[tuple[str, str, str]] = field(default_factory=set)  # (application, namespace, task): parked
    durations_ms: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by metric
    moves: list[tuple[int, Status | None, Event, Status]] = field(default_factory=list)  # (row, …), if traced
    transitions: list[Transition] = field(default_factory=list)  # the same by id, once committed

    def absorb(self, other: Changes) -> None:
        self.events.update(other.events)
        self.counts.update(other.counts)
        self.lanes.extend(other.lanes)
        self.dropped_lanes.extend(other.dropped_lanes)
        self.board_before = self.board_before or other.board_before
        self.wakes_claims |= other.wakes_claims
        self.undo.extend(other.undo)
        self.discarded.update(other.discarded)
        self.unknown.update(other.unknown)
        for metric, values_ms in other.durations_ms.items():
            self.durations_ms[metric] += values_ms
        self.moves.extend(other.moves)


NOTHING: Final = Changes()  # never changed itself


class SqliteStore:
    """The open file and what is kept in memory beside it: lanes and their counters.

    `on_commit(changes)` is called after each transaction, `on_undo()` when a write or all of them were
    undone, `on_damage()` when the file turned out to be damaged; all in the thread that committed.
    """

    def __init__(self, path: Path, now: Now, policy: Policy) -> None:
        self.path = path
        self.policy = policy
        self.queries = load_queries()
        self.on_commit: Callable[[Changes], None] = lambda changes: None
        self.on_undo: Callable[[], None] = lambda: None
        self.on_damage: Callable[[], None] = lambda: None
        self.traced = False  # whether every transition is told by id; costs a look-up each
        self.lanes: dict[int, Lane] = {}
        self.lanes_version = 0  # rises with each lane that comes or goes
        self._by_name: dict[tuple[str, str, str], Lane] = {}
        self.limits = Limits(policy.limits, policy.strict_order_namespaces, now.mono_ms)
        self.unsettled: frozenset[str] = frozenset()  # namespaces whose rows are on their way to other lanes
        self.full_pools: set[str] = set()  # found full, and no lease ended since
        self.trouble = ""  # why the disk takes no rows, until a probe succeeds
        self._columns: set[str] | None = None  # of the table of rows, once asked for
        self._cut_wal = False  # after the next commit
        self._last_lane = 0  # numbers are never used again while the file is open
        self.board = Board()  # see taskd.inflight.switches
        # By lane, and by the names that the claimant knows: up to this seq, nothing that waits may go.
        self.passed: dict[int, dict[frozenset[str] | None, int]] = {}
        self._write = Changes()
        self._batch = NOTHING  # of the writes so far that this transaction keeps
        self.db = open_database(path)
        try:
            self._migrate()
            self.store_id = self._meta("store_id") or self._new_store_id()
            self.last_fence = int(self._meta("last_fence") or 0)
            self.last_seq = int(self._meta("last_seq") or 0)
            self._saved: tuple[int, int] | None = None  # both as the file has them; None: not known
            self.finished_until_ms = int(self._meta("finished_until_ms") or 0)
            self._load_lanes()
            self._page_bytes = int(self.db.pragma("page_size"))
            self.used_bytes = self._measure_used()
            # Monotonic clocks do not survive a reboot: every lease begins again at full length.
            self.run("restart_leases", now.mono_ms + policy.grace_ms, now.mono_ms)
            self.run("restart_claims", now.mono_ms + policy.claim_ms)
        except BaseException as error:
            self.db.close()
            if isinstance(error, apsw.Error):
                raise _unusable(path, error) from error
            raise

    def close(self) -> None:
        try:
            self.db.close()
        except apsw.Error:  # the disk failed: what is committed stays in the write-ahead log
            self.db.close(True)

    # ---- transactions

    def apply(self, writes: Sequence[Write]) -> list[outcome.Outcome[object]]:
        """Perform `writes` in one transaction; counters follow the rows, also when some or all are undone.

        On a full disk each is tried by itself: what ends an activation may still fit where others do not.
        """
        try:
            results = self._apply_together(writes)
        except StoreError as error:
            self._note(error)
            if len(writes) == 1 or not isinstance(error.__cause__, apsw.FullError):
                raise
            results = [self._apply_alone(write) for write in writes]
        for result in results:
            if isinstance(result, outcome.Error) and isinstance(result.error, StoreError):
                self._note(result.error)
        if self._cut_wal:
            self._cut_wal = not cut_wal(self.db)
        return results

    def _apply_alone(self, write: Write) -> outcome.Outcome[object]:
        try:
            return self._apply_together([write])[0]
        except StoreError as error:
            return outcome.Error(error)

    def _note(self, error: StoreError) -> None:
        self.trouble = disk_trouble(error) or self.trouble
        if is_damage(error):
            self.on_damage()

    def _apply_together(self, writes: Sequence[Write]) -> list[outcome.Outcome[object]]:
        self._batch = NOTHING
        tracked = [partial(self._tracked, write) for write in writes]
        try:
            results = apply_in_one_transaction(self.db, tracked, before_commit=self._save_counters)
        except BaseException:
            self._saved = None
            self._undo(self._batch)
            raise
        batch = self._batch
        if batch.moves:
            batch.transitions = [
                Transition(found[0], before, event, status)
                for row, before, event, status in batch.moves
                if (found := self.one("id_of", row)) is not None  # else deleted in this very transaction
            ]
        self.on_commit(batch)
        return results

    def _tracked(self, write: Write) -> object:
        self._write = Changes()
        try:
            result = write()
        except BaseException:
            self._undo(self._write)
            raise
        if self._batch is NOTHING:
            self._batch = self._write
        else:
            self._batch.absorb(self._write)
        return result

    def _undo(self, changes: Changes) -> None:
        for lane in changes.dropped_lanes:
            self._keep_lane(lane)
        for (number, status), change in changes.counts.items():
            self.lanes[number].counts[status] -= change
        for lane in changes.lanes:
            self._lose_lane(lane)
        for lane in changes.dropped_lanes:  # one of the same name may have come and gone meanwhile
            if lane.number in self.lanes:
                self._keep_lane(lane)
        if changes.board_before is not None:
            self.board = changes.board_before
        for undo in reversed(changes.undo):
            undo()
        self.full_pools.clear()
        self.passed.clear()
        self.on_undo()

    def _save_counters(self) -> None:
        rows = [
            (n, status, self.lanes[n].counts[status])
            for (n, status), by in self._batch.counts.items()
            if by and n in self.lanes
        ]
        if rows:
            self.db.executemany(self.queries["write_depth"], rows)
        if self._batch.counts:  # else no row moved, so none took a fence or a number either
            saved_fence, saved_seq = self._saved or (None, None)
            if self.last_fence != saved_fence:
                self.run("write_meta", "last_fence", str(self.last_fence))
            if self.last_seq != saved_seq:
                self.run("write_meta", "last_seq", str(self.last_seq))
            self._saved = self.last_fence, self.last_seq
            self.used_bytes = self._measure_used()

    # ---- statements

    def run(self, name: str, *values: Any) -> Any:
        """An apsw cursor over the rows of a named statement; their types are the statement's."""
        return self.db.execute(self.queries[name], values)

    def run_many(self, name: str, values: Sequence[Sequence[Any]]) -> int:
        """A named statement for each of `values`. Returns how many rows it changed together."""
        before = self.db.total_changes()
        self.db.executemany(self.queries[name], values)
        return self.db.total_changes() - before

    def run_if_all(self, name: str, values: Iterable[Sequence[Any]], rows: int) -> bool:
        """A named statement for each of `values`; unless they change so many rows, nothing is done."""
        self.db.execute("SAVEPOINT all_rows")
        before = self.db.total_changes()
        for each in values:
            self.run(name, *each)
        complete: bool = self.db.total_changes() - before == rows
        if not complete:
            self.db.execute("ROLLBACK TO all_rows")
        self.db.execute("RELEASE all_rows")
        return complete

    def one(self, name: str, *values: Any) -> Any:
        """The first row of a statement, None when it has none."""
        return self.run(name, *values).fetchone()

    # ---- the life cycle's one hook

    def move(self, row: int, lane: int, before: Status | None, event: Event) -> Status:
        """The status `event` leads to, counted; the caller writes it. Raises IllegalTransition."""
        return self.move_all((row,), lane, before, event)

    def move_all(self, rows: Sequence[int], lane: int, before: Status | None, event: Event) -> Status:
        """The same for several rows of one lane."""
        status = after(before, event)
        if self.traced:
            self._write.moves += [(row, before, event, status) for row in rows]
        self._write.events[event, status] += len(rows)
        if self.passed and status is Status.PENDING and before in _KEEPS_SEQ:
            self.passed.pop(lane, None)
        if self.limits.rules and before in HELD and status not in HELD:
            self._make_room(lane)
        self._count(lane, before, -len(rows))
        self._count(lane, status, len(rows))
        return status

    def forget(self, lane: int, count: int) -> None:
        """So many tombstones of a lane were deleted."""
        self._count(lane, Status.GONE, -count)
        self.drop_lane_if_empty(lane)

    def adopt(self, lane: Lane, status: Status, row: Mapping[str, Any]) -> bool:
        """Take over a row of another store as it is; False when its id is known here.

        Columns that this schema does not have are passed over.
        """
        if self._columns is None:
            self._columns = {n for (n,) in self.db.execute("SELECT name FROM pragma_table_info('inflight')")}
        names = [name for name in row if name in self._columns]
        places = ", ".join("?" * (len(names) + 1))
        sql = (
            f"INSERT INTO inflight (lane, {', '.join(names)}) VALUES ({places}) "  # noqa: S608 - own columns
            "ON CONFLICT (id) DO NOTHING"
        )
        self.db.execute(sql, (lane.number, *(row[name] for name in names)))
        if self.db.changes() == 0:
            self.drop_lane_if_empty(lane.number)
            return False
        self._count(lane.number, status, +1)
        return True

    def remember_finished_until(self, wall_ms: int) -> None:
        """Keep tombstones until then, whatever their age."""
        self.finished_until_ms = max(self.finished_until_ms, wall_ms)
        self.run("write_meta", "finished_until_ms", str(self.finished_until_ms))
        self.run("write_meta", "last_fence", str(self.last_fence))
        self.run("write_meta", "last_seq", str(self.last_seq))

    def discard(self, reason: str) -> None:
        """An activation ends for this reason, and nothing of it is kept but its id."""
        self._write.discarded[reason] += 1

    def note_unknown(self, lane: Lane, taskname: str) -> None:
        """Nobody who is connected knows this task: it was parked."""
        self._write.unknown.add((lane.application, lane.namespace, taskname))

    def measure(self, metric: str, value_ms: int) -> None:
        """Note a duration; it is observed once the transaction is committed."""
        self._write.durations_ms[metric].append(max(value_ms, 0))

    def measure_since(self, metric: str, received_at_ms: Iterable[int], now: Now) -> None:
        """Note how long ago each of these moments was."""
        wall_ms = now.wall_ms
        self._write.durations_ms[metric] += [max(wall_ms - at_ms, 0) for at_ms in received_at_ms]

    def _count(self, lane: int, status: Status | None, change: int) -> None:
        if status is not None:
            self.lanes[lane].counts[status] += change
            self._write.counts[lane, status] += change

    # ---- lanes

    def lane_of(self, application: str, namespace: str, taskname: str = "") -> Lane:
        """Where rows of this task wait; a lane that is not there is made."""
        taskname = self.limits.lane_task(application, namespace, taskname) if self.limits.rules else ""
        lane = self._by_name.get((application, namespace, taskname))
        if lane is None:
            self._last_lane += 1
            lane = Lane(self._last_lane, application, namespace, taskname)
            self.run("add_lane", lane.number, application, namespace, taskname)
            self._keep_lane(lane)
            self._write.lanes.append(lane)
        return lane

    def drop_lane_if_empty(self, number: int) -> None:
        """Forget a lane without rows and tombstones, or producers could make up lanes without end."""
        lane = self.lanes[number]
        if not any(lane.counts.values()):
            self.run("drop_depths", number)
            self.run("drop_lane", number)
            self._lose_lane(lane)
            self._write.dropped_lanes.append(lane)

    def _keep_lane(self, lane: Lane) -> None:
        self.lanes[lane.number] = self._by_name[lane.application, lane.namespace, lane.taskname] = lane
        self.lanes_version += 1
        self.limits.attach(lane)

    def _lose_lane(self, lane: Lane) -> None:
        del self.lanes[lane.number]
        self._by_name.pop((lane.application, lane.namespace, lane.taskname), None)
        self.lanes_version += 1
        self.limits.detach(lane)
        self.passed.pop(lane.number, None)

    # ---- limits

    def set_limits(self, limits: Limits) -> None:
        """These hold from here on; rows that wait in other lanes than they say are `relane`d."""
        self.limits = limits
        for lane in self.lanes.values():
            limits.attach(lane)
        self.full_pools.clear()

    def relane(self, row: int, status: Status, before: Lane, after: Lane) -> None:
        """Move a row to another lane; it keeps its number in the order."""
        self.run("relane", after.number, row)
        self._count(before.number, status, -1)
        self._count(after.number, status, +1)
        self.passed.pop(after.number, None)
        self.drop_lane_if_empty(before.number)

    def take_tokens(self, limits: Iterable[Limit], count: int, now: Now) -> None:
        """So much was handed out under these limits."""
        for limit in limits:
            if limit.bucket is not None:
                limit.bucket.take(count, now.mono_ms)
                self.when_undone(partial(limit.bucket.put_back, count))

    def return_token(self, row: int, lane: int) -> None:
        """A row that was handed out surely was not started."""
        if not self.limits.rated:
            return
        its = self.lanes[lane]
        in_order = self.limits.in_order(its, self.one("taskname", row)[0])
        for limit in (*its.limits, *in_order):
            if limit.bucket is not None:
                limit.bucket.put_back(1)
                self.when_undone(partial(limit.bucket.put_back, -1))

    def held_back(self, lane: int, taskname: str, now: Now) -> str:
        """The limits that leave this row no room now, in words; empty: none."""
        its = self.lanes[lane]
        limits = (*its.limits, *self.limits.in_order(its, taskname))
        full = [limit.words for limit in limits if not limit.room(now.mono_ms)]
        return f"held back by {', '.join(full)}" if full else ""

    def when_undone(self, undo: Callable[[], object]) -> None:
        """If this write does not come to be, call `undo`."""
        self._write.undo.append(undo)

    def _make_room(self, lane: int) -> None:
        """A lease ended: somebody else may have the room it leaves."""
        if self.limits.pools or self.lanes[lane].limits:
            self.full_pools.clear()
            self.wake_claims()

    # ---- switches

    def gate(self, lane: Lane) -> Gate:
        """What operators' switches say of this lane now."""
        return self.board.gate(lane.application, lane.namespace)

    def set_board(self, board: Board) -> None:
        """Other switches hold from here on in this transaction, and after it if it commits."""
        self._write.board_before = self._write.board_before or self.board
        self.board = board
        self.passed.clear()
        self.wake_claims()

    def wake_claims(self) -> None:
        """Once committed, let those who wait for claimable rows look again."""
        self._write.wakes_claims = True

    # ---- room

    def _measure_used(self) -> int:
        pages: int = self.db.pragma("page_count") - self.db.pragma("freelist_count")
        return pages * self._page_bytes

    def shrink(self, max_pages: int) -> int:
        """Give free pages back to the disk once they are a large part of the file. Returns how many.

        Asked now and then, it also has the write-ahead log cut back when that has grown.
        """
        self._cut_wal = wal_bytes(self.path) > MAX_IDLE_WAL_BYTES
        free = int(self.db.pragma("freelist_count"))
        if free <= max(self.db.pragma("page_count") // 4, KEPT_FREE_PAGES):
            return 0
        # One page for each step; without fetching, only the first is given back.
        self.db.execute(f"PRAGMA incremental_vacuum({max_pages:d})").fetchall()
        return free - int(self.db.pragma("freelist_count"))

    def probe(self) -> None:
        """Write something, to see whether the disk takes it."""
        self.run("write_meta", "probe", "x" * PROBE_BYTES)
        self.run("write_meta", "probe", "")

    def depths(self) -> list[Depth]:
        """Rows by application, namespace and status; what is empty is left out."""
        return _by_namespace(
            (lane, status, count)
            for lane in list(self.lanes.values())
            for status, count in list(lane.counts.items())
            if count
        )

    def depths_by_partition(self) -> dict[tuple[str, int, Status], int]:
        """Rows that are not finished by where they came from, read beside the writer: any thread may ask.

        It reads each of them, so ask every few seconds at most.
        """
        with open_for_reading(self.path) as db:
            rows: list[Any] = db.execute(self.queries["by_partition"]).fetchall()
        return {(topic, partition, Status(status)): count for topic, partition, status, count in rows}

    def recount(self) -> list[Depth]:
        """The same, counted from the rows: slow, for checks only."""
        return _by_namespace(
            (self.lanes[lane], Status(status), count) for lane, status, count in self.run("recount")
        )

    def next_seq(self) -> int:
        return self.next_seqs(1)[0]

    def next_seqs(self, count: int) -> range:
        first = self.last_seq + 1
        self.last_seq += count
        return range(first, first + count)

    def next_fences(self, count: int, now: Now) -> range:
        """Larger than any before, also when the file was restored from a copy: wall time in microseconds."""
        first = max(self.last_fence + 1, now.wall_ms * 1000)
        self.last_fence = first + count - 1
        return range(first, first + count)

    # ---- opening

    def _migrate(self) -> None:
        prepare_schema(self.db, self.path)

    def _meta(self, name: str) -> str | None:
        row = self.one("read_meta", name)
        return None if row is None else str(row[0])

    def _new_store_id(self) -> str:
        store_id = uuid.uuid4().hex
        self.run("write_meta", "store_id", store_id)
        return store_id

    def _load_lanes(self) -> None:
        for number, application, namespace, taskname in self.run("lanes"):
            self._keep_lane(Lane(number, application, namespace, taskname))
        for number, status, count in self.run("depths"):
            self.lanes[number].counts[Status(status)] = count
        self._last_lane = max(self.lanes, default=0)
        for number in list(self.lanes):
            self.drop_lane_if_empty(number)


def _by_namespace(counts: Iterable[tuple[Lane, Status, int]]) -> list[Depth]:
    total: dict[tuple[str, str, Status], int] = {}
    for lane, status, count in counts:
        key = lane.application, lane.namespace, status
        total[key] = total.get(key, 0) + count
    return [Depth(*key, count) for key, count in total.items()]


def _unusable(path: Path, error: apsw.Error) -> StartupError:
    return StartupError(
        f"{path} cannot be used as a store: {type(error).__name__}: {error}. "
        "Restore it from a copy, or move it away to begin with an empty one.",
        exit_code=73,
    )


def load_queries() -> dict[str, str]:
    """The statements of queries.sql by name."""
    return dict(_parse(files("taskd.inflight").joinpath("queries.sql").read_text()))


def _parse(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split("-- name: ")[1:]:
        name, _, statement = part.partition("\n")
        yield name.strip(), statement.strip()
