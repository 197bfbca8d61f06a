"""Operators' switches as rows of the store, and what they do to rows that wait.

The board in memory (`SqliteStore.board`) always is what the table says: it changes in the transaction
that changes the rows, and goes back with it. So what arrives, is claimed or is looked through in one
transaction meets one and the same board, and nothing slips between a switch and its effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from taskd.activation.lifecycle import WAITING, Status
from taskd.activation.switches import (
    Arguments,
    Board,
    Gate,
    Switch,
    SwitchKind,
    SwitchSource,
    conditions_of,
    conditions_text,
)
from taskd.clock import Now
from taskd.errors import Undecodable
from taskd.inflight.base import Ref
from taskd.inflight.departures import Departures
from taskd.inflight.sqlite import SqliteStore
from taskd.wire import parameters
from taskd.wire.envelope import scan_call

KILLED = "killswitch"  # the reason stored with what a killswitch dropped
DEMOTED = "demoted"  # ... and with what was forwarded because its namespace is demoted
READ_BYTES = 16 * 1024 * 1024  # of activations that one round decodes for their arguments


@dataclass(frozen=True, slots=True)
class Replaced:
    """What a change took away and what it put in place; equal orders are in neither."""

    added: tuple[Switch, ...] = ()
    removed: tuple[Switch, ...] = ()


@dataclass(frozen=True, slots=True)
class DemotedTo:
    """Where demoted namespaces go. `cluster`: bootstrap servers; None: where the dead letters are."""

    topic: str
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class Looked:
    """One round through the rows. `last_row`: where the next begins; None: there are no more.

    `stopped`: dropped although a worker on the stream has them, by worker; it is to be told.
    """

    last_row: int | None
    rows: int = 0
    dropped: int = 0
    forwarded: int = 0
    stopped: tuple[tuple[str, Ref], ...] = ()


def killed_by(gate: Gate, taskname: str, activation: bytes) -> Switch | None:
    """The killswitch that this call falls under. Arguments that cannot be read fall under none."""
    kills = gate.kills.get(taskname)
    if not kills:
        return None
    whole = next((switch for switch in kills if not switch.conditions), None)
    if whole is not None:
        return whole
    arguments = _arguments(activation)
    if arguments is None:
        return None
    return next(
        (switch for switch in kills if any(condition.holds(arguments) for condition in switch.conditions)),
        None,
    )


def _arguments(activation: bytes) -> Arguments | None:
    try:
        call = scan_call(activation)
        return parameters.decode(call.parameters_bytes, call.parameters_json, call.headers)
    except Undecodable:
        return None


class Switches:
    """The table of switches. Opening it loads the board."""

    def __init__(self, store: SqliteStore, departures: Departures) -> None:
        self._store = store
        self._departures = departures
        store.board = Board(map(_switch, store.run("switches")))
        found = store.one("read_meta", "demoted_to")
        self.demoted_to = DemotedTo(*json.loads(found[0])) if found else DemotedTo("taskworker-long")

    # ---- orders

    def put(self, switch: Switch, now: Now) -> Switch:
        """Set a switch; one of the same source and subject is replaced. Returns it as stored."""
        board = [old for old in self._store.board.switches if not _same_order(old, switch)]
        for old in self._store.board.switches:
            if _same_order(old, switch):
                self._store.run("remove_switch", old.number)
        stored = self._add(switch, now)
        self._store.set_board(Board([*board, stored]))
        return stored

    def remove(self, numbers: Iterable[int]) -> tuple[Switch, ...]:
        """Take these away. Returns those there were."""
        wanted = set(numbers)
        return self._take(switch for switch in self._store.board.switches if switch.number in wanted)

    def replace(
        self,
        source: SwitchSource,
        switches: Sequence[Switch],
        now: Now,
        demoted_to: DemotedTo | None = None,
    ) -> Replaced:
        """Make these the only switches of `source`; those that were there already stay as they are."""
        if demoted_to is not None and demoted_to != self.demoted_to:
            where = json.dumps([demoted_to.topic, demoted_to.cluster])
            self._store.run("write_meta", "demoted_to", where)
            self._store.when_undone(partial(setattr, self, "demoted_to", self.demoted_to))
            self.demoted_to = demoted_to
        old = {(s.kind, s.subject): s for s in self._store.board.switches if s.source is source}
        new = {(switch.kind, switch.subject): switch for switch in switches}
        removed = self._take(switch for key, switch in old.items() if key not in new)
        added = tuple(self._add(switch, now) for key, switch in new.items() if key not in old)
        if added:
            self._store.set_board(Board([*self._store.board.switches, *added]))
        return Replaced(added, removed)

    def end(self, now: Now) -> tuple[Switch, ...]:
        """Take away what is over. Returns them."""
        if not now.may_expire:
            return ()
        return self._take(
            switch
            for switch in self._store.board.switches
            if switch.until_ms is not None and switch.until_ms <= now.wall_ms
        )

    def _add(self, switch: Switch, now: Now) -> Switch:
        conditions = conditions_text(switch.conditions) if switch.conditions else None
        self._store.run(
            "add_switch",
            switch.kind.value,
            switch.application,
            switch.namespace,
            switch.taskname,
            conditions,
            switch.reason,
            switch.author,
            switch.source.value,
            now.wall_ms,
            switch.until_ms,
        )
        return replace(switch, number=self._store.db.last_insert_rowid(), created_at_ms=now.wall_ms)

    def _take(self, switches: Iterator[Switch]) -> tuple[Switch, ...]:
        taken = tuple(switches)
        for switch in taken:
            self._store.run("remove_switch", switch.number)
        if taken:
            self._store.set_board(
                Board(switch for switch in self._store.board.switches if switch not in taken)
            )
        return taken

    # ---- effects on rows that wait

    def apply(self, after_row: int, limit: int, now: Now) -> Looked:
        """Look at `limit` rows behind `after_row`: drop what is killed, forward what is demoted."""
        rows = self._store.run("rows_after", after_row, limit).fetchall()
        dropped = forwarded = looked = read_bytes = 0
        last_row = after_row
        stopped: list[tuple[str, Ref]] = []
        for row, number, lane_number, taskname, id_, fence, holder in rows:
            last_row, looked, status = row, looked + 1, Status(number)
            # Of what runs, only workers on the stream can be told to stop; the rest ends by itself.
            runs = status is Status.PROCESSING and holder is not None
            if status not in WAITING and not runs:
                continue
            lane = self._store.lanes[lane_number]
            gate = self._store.gate(lane)
            if taskname in gate.kills:
                activation = self._store.one("activation", row)[0]
                read_bytes += len(activation)
                if killed_by(gate, taskname, activation):
                    self._departures.drop(row, lane_number, status, now, KILLED)
                    dropped += 1
                    if runs:
                        stopped.append((holder, Ref(id_, fence)))
                    if read_bytes > READ_BYTES:
                        break
                    continue
            if gate.demoted and not runs:
                self._departures.forward(row, lane_number, status, None, DEMOTED)
                forwarded += 1
            if read_bytes > READ_BYTES:
                break
        is_end = looked == len(rows) < limit
        return Looked(None if is_end else last_row, looked, dropped, forwarded, tuple(stopped))


def _same_order(one: Switch, other: Switch) -> bool:
    return (one.kind, one.source, one.subject) == (other.kind, other.source, other.subject)


def _switch(values: tuple[object, ...]) -> Switch:
    number, kind, application, namespace, taskname, conditions, reason, author, source, created, until = (
        values
    )
    assert isinstance(number, int)
    assert isinstance(created, int)
    return Switch(
        kind=SwitchKind(kind),
        application=_text(application),
        namespace=_text(namespace),
        taskname=_text(taskname),
        conditions=() if conditions is None else conditions_of(str(conditions)),
        reason=str(reason),
        author=str(author),
        source=SwitchSource(source),
        created_at_ms=created,
        until_ms=until if isinstance(until, int) else None,
        number=number,
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
