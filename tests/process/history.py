"""Decides from what was seen whether a run kept its promises. Pure: it starts, reads and waits for nothing.

What is seen: ids whose produce was acknowledged, lines that the tasks themselves wrote, what the broker
says of each id at the end, and what lies in its files after it stopped. Invariants by their numbers:

* I1  nothing is lost: every acknowledged activation is in the log, and ended in one terminal state.
* I2  at most once: at most one START.
* I3  otherwise: at least one END, or a dead letter, or a counted discard for a reason that may be.
* I4  a retry follows exactly the activation that asked for it, under the id derived from it.
* I6  starts and attempts never exceed their limits.
* I9  the dead letters hold every exhausted activation; one never retried byte for byte.
* I11 the files are sound, the depth counters equal a recount.

Duplicate runs are no violation under faults; they are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import apsw

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import Status
from taskd.admin.wait import Seen
from taskd.log.base import Record
from taskd.log.tables import Tables

NAMED_AT_MOST = 5
MAX_CRASHES = 3  # what the configuration says when it says nothing
STOPPED_BY_CRASHES = ("poison", "deadline")  # reasons of the broker when workers died under it too often


@dataclass(frozen=True, slots=True)
class Kind:
    """What is promised of one kind of task. `runs`: its policy's, the first included."""

    completes: bool
    runs: int = 1
    dead_letter: bool = False
    at_most_once: bool = False


KINDS: Mapping[str, Kind] = {
    "noop": Kind(completes=True),
    "nap": Kind(completes=True),
    "delayed": Kind(completes=True),
    "torn": Kind(completes=True),
    "retried": Kind(completes=True, runs=3, dead_letter=True),
    "fails": Kind(completes=False, runs=2, dead_letter=True),
    "fails_once": Kind(completes=False, dead_letter=True),
    "unknown": Kind(completes=False),
    "once": Kind(completes=True, at_most_once=True),
}


@dataclass(frozen=True, slots=True)
class Produced:
    """One activation whose produce was acknowledged."""

    key: str
    kind: str
    id: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Line:
    """What a task wrote: START or END, of the produced key, under which id and attempt number."""

    word: str
    key: str
    id: str
    attempts: int


def parse(text: str) -> list[Line]:
    """The lines of a record file; a last one without its end was cut by a kill."""
    complete = text[: text.rfind("\n") + 1].splitlines()
    return [Line(word, key, id_, int(n)) for word, key, id_, n in map(str.split, complete)]


@dataclass(frozen=True, slots=True)
class Files:
    """A broker's data folder after it stopped."""

    problems: tuple[str, ...]
    values: frozenset[bytes]  # of all records in the log
    dead_letters: tuple[Record, ...]


@dataclass(slots=True)
class History:
    """Everything seen of one run. `statuses`: of every id produced, run or followed by another."""

    produced: Sequence[Produced]
    lines: Sequence[Line]
    statuses: Mapping[str, Seen]
    files: Files
    max_processing_attempts: int
    problems: list[str] = field(default_factory=list)

    def check(self) -> list[str]:
        """Every violation, as a sentence that begins with the invariant's number."""
        self.problems = [f"I11: {problem}" for problem in self.files.problems]
        starts = Counter(line.id for line in self.lines if line.word == "START")
        ended = {line.key for line in self.lines if line.word == "END"}
        last = {produced.key: self._follow(produced) for produced in self.produced}
        for produced in self.produced:
            self._judge(produced, last[produced.key], starts, ended)
        self._judge_lines(starts)
        self._judge_dead_letters(last)
        return self.problems

    def duplicates(self) -> int:
        """Runs beyond the first of one activation."""
        return sum(count - 1 for count in self._starts().values())

    def stopped_by_crashes(self) -> int:
        return sum(seen.reason in STOPPED_BY_CRASHES for seen in self.statuses.values())

    def _starts(self) -> Counter[str]:
        return Counter(line.id for line in self.lines if line.word == "START")

    def _follow(self, produced: Produced) -> Seen:
        """The status of the last of its retries; each must follow from the one before."""
        seen, runs = self._status(produced.id), 0
        while seen.outcome == "retried":
            runs += 1
            if seen.continued_as != retry_id(seen.id, runs):
                self._say("I4", produced, f"retry {runs} is {seen.continued_as}, not derived from {seen.id}")
                break
            seen = self._status(seen.continued_as)
        return seen

    def _status(self, id_: str) -> Seen:
        return self.statuses.get(id_, Seen(id_))

    def _judge(self, produced: Produced, last: Seen, starts: Counter[str], ended: Collection[str]) -> None:
        kind = KINDS[produced.kind]
        if produced.value not in self.files.values:
            self._say("I1", produced, "was acknowledged and is not in the log")
        if last.state != "gone":
            self._say("I1", produced, f"is {last.state} at the end ({last.id})")
        elif last.outcome == "complete":
            if not kind.completes:
                self._say("I3", produced, "completed, though it always fails")
            elif produced.key not in ended:
                self._say("I3", produced, "is complete, though it never ran to its end")
        elif last.outcome != "failed":
            self._say("I3", produced, f"ended as {last.outcome}")
        elif not self._may_fail(kind, last):
            self._say("I3", produced, f"failed: {last.reason}: {last.error}")
        elif last.dead_lettered != kind.dead_letter:
            self._say("I3", produced, f"dead-lettered: {last.dead_lettered}, its policy: {kind.dead_letter}")
        if kind.at_most_once and starts[produced.id] > 1:
            self._say("I2", produced, f"started {starts[produced.id]} times")

    def _may_fail(self, kind: Kind, last: Seen) -> bool:
        if kind.at_most_once:
            return last.reason == "at_most_once"  # its worker or its broker died under it
        if last.reason in STOPPED_BY_CRASHES:
            limit = self.max_processing_attempts
            return last.attempts >= (min(limit, MAX_CRASHES) if last.reason == "poison" else limit)
        return not kind.completes

    def _judge_lines(self, starts: Counter[str]) -> None:
        kinds = {produced.key: KINDS[produced.kind] for produced in self.produced}
        for line in self.lines:
            if line.key in kinds and line.attempts >= kinds[line.key].runs:
                self.problems.append(f"I6: {line.key} ran as attempt {line.attempts}, its policy allows less")
        for id_, seen in self.statuses.items():
            if seen.attempts > self.max_processing_attempts:
                self.problems.append(f"I6: {id_} was started {seen.attempts} times by the broker's count")

    def _judge_dead_letters(self, last: Mapping[str, Seen]) -> None:
        found: dict[str, list[Record]] = {}
        for record in self.files.dead_letters:
            found.setdefault(dict(record.headers).get("taskd-id", b"").decode(), []).append(record)
        for produced in self.produced:
            seen = last[produced.key]
            if not seen.dead_lettered:
                continue
            letters = found.get(seen.id, [])
            if not letters:
                self._say("I9", produced, "is dead-lettered, and no dead letter names it")
            for letter in letters:
                if "taskd-reason" not in dict(letter.headers):
                    self._say("I9", produced, "has a dead letter without its reason")
                if seen.id == produced.id and letter.value != produced.value:
                    self._say("I9", produced, "has a dead letter that differs from what was produced")

    def _say(self, invariant: str, produced: Produced, what: str) -> None:
        self.problems.append(f"{invariant}: {produced.kind} {produced.key} ({produced.id}) {what}")

    def report(self) -> str:
        """A few lines for whoever watches the test."""
        kinds = Counter(produced.kind for produced in self.produced)
        outcomes = Counter(self._follow(produced).outcome or "none" for produced in self.produced)
        return (
            f"{len(self.produced)} produced {dict(kinds)}, ended {dict(outcomes)}; "
            f"{sum(self._starts().values())} runs, {self.duplicates()} of them duplicates; "
            f"{len(self.files.dead_letters)} dead letters; stopped by crashes: {self.stopped_by_crashes()}"
        )


def named(problems: Sequence[str]) -> str:
    """The first problems of each invariant, for an assertion's message."""
    by_invariant: dict[str, list[str]] = {}
    for problem in problems:
        by_invariant.setdefault(problem.split(":")[0], []).append(problem)
    lines = [f"{len(problems)} violations"]
    for found in by_invariant.values():
        lines += found[:NAMED_AT_MOST]
        if len(found) > NAMED_AT_MOST:
            lines.append(f"... and {len(found) - NAMED_AT_MOST} more of {found[0].split(':')[0]}")
    return "\n".join(lines)


def read_files(data_dir: Path, *, topic: str = "taskd", deadletter_topic: str = "taskd-dlq") -> Files:
    """What a broker left behind. It must have stopped: the log must be read to its end, all rows gone."""
    problems = list(_store_problems(data_dir / "inflight.sqlite"))
    log = Tables(data_dir / "log.sqlite")
    try:
        problems += _log_problems(log, topic)
        records = list(_records(log))
    finally:
        log.db.close()
    return Files(
        tuple(problems),
        frozenset(record.value for record in records),
        tuple(record for record in records if record.partition.topic == deadletter_topic),
    )


def _store_problems(path: Path) -> Iterator[str]:
    db = apsw.Connection(str(path))
    try:
        yield from _unsound(db, path)
        counted = "SELECT lane, status, count(*) FROM inflight GROUP BY lane, status"
        recount = {(lane, status): count for lane, status, count in db.execute(counted)}
        kept = {
            (lane, status): count
            for lane, status, count in db.execute("SELECT lane, status, count FROM depth WHERE count <> 0")
        }
        if kept != recount:
            yield f"the depth counters say {kept}, a recount {recount}"
        left = db.execute(
            "SELECT status, count(*) FROM inflight WHERE status <> ? GROUP BY 1", (Status.GONE,)
        )
        for status, count in left:
            yield f"{count} rows are still {Status(status).word}"
        for id_, stuck in db.execute("SELECT id, stuck FROM inflight WHERE stuck IS NOT NULL"):
            yield f"{id_} is stuck: {stuck}"
    finally:
        db.close()


def _log_problems(log: Tables, topic: str) -> Iterator[str]:
    yield from _unsound(log.db, log.path)
    committed = {partition: offset for _, partition, offset in log.commits()}
    for partition, _, _, end in log.partitions():
        if partition.topic == topic and (committed.get(partition) or 0) != end:
            yield f"{partition} ends at {end} and is committed up to {committed.get(partition)}"


def _unsound(db: apsw.Connection, path: Path) -> Iterator[str]:
    found = [row[0] for row in db.execute("PRAGMA integrity_check")]
    if found != ["ok"]:
        yield f"{path.name} is not sound: {found}"


def _records(log: Tables) -> Iterable[Record]:
    for partition, partition_id, first, end in log.partitions():
        yield from log.read(partition_id, partition, first, end - first + 1, 1 << 40)
