"""The judge is judged: each broken promise is seen, and what may happen under faults is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from history import Files, History, Line, Produced, parse

from taskd.activation.ids import retry_id
from taskd.admin.wait import Seen
from taskd.log.base import Partition, Record

GONE = Seen("a", state="gone", outcome="complete", attempts=1)
RAN = [Line("START", "k", "a", 0), Line("END", "k", "a", 0)]


def judged(
    kind: str = "noop",
    lines: list[Line] | None = None,
    *seen: Seen,
    value: bytes = b"v",
    letters: tuple[Record, ...] = (),
    problems: tuple[str, ...] = (),
) -> list[str]:
    files = Files(problems, frozenset({b"v"}), letters)
    statuses = {status.id: status for status in seen or (GONE,)}
    history = History([Produced("k", kind, "a", value)], RAN if lines is None else lines, statuses, files, 5)
    return [problem.split(":")[0] for problem in history.check()]


def letter(id_: str, value: bytes = b"v", reason: bool = True) -> Record:
    headers = (("taskd-id", id_.encode()), *([("taskd-reason", b"error")] if reason else []))
    return Record(Partition("taskd-dlq", 0), 0, 0, b"a", value, headers)


FAILED = replace(GONE, outcome="failed", reason="error", dead_lettered=True)
BY_CRASHES = replace(GONE, outcome="failed", reason="poison", attempts=5)
ONCE_LOST = replace(GONE, outcome="failed", reason="at_most_once")
SECOND = retry_id("a", 1)
THIRD = retry_id(SECOND, 2)
RETRIED = (
    replace(GONE, outcome="retried", continued_as=SECOND),
    replace(GONE, id=SECOND, outcome="retried", continued_as=THIRD),
    replace(GONE, id=THIRD),
)


def test_what_may_be() -> None:
    assert judged() == []
    assert judged("noop", RAN * 2) == [], "a duplicate run is counted, not forbidden"
    assert judged("noop", RAN[:1], BY_CRASHES) == [], "five workers died under it"
    assert judged("noop", RAN[:1], replace(BY_CRASHES, attempts=3)) == [], "three children died under it"
    assert judged("once", RAN[:1], ONCE_LOST) == []
    assert judged("retried", [*RAN, Line("END", "k", THIRD, 2)], *RETRIED) == []
    assert judged("fails_once", RAN[:1], FAILED, letters=(letter("a"),) * 2) == []


@pytest.mark.parametrize("state", ["pending", "processing", "failure", "unknown"])
def test_lost(state: str) -> None:
    assert judged("noop", RAN, replace(GONE, state=state, outcome="")) == ["I1"]


def test_acknowledged_and_not_in_the_log() -> None:
    assert judged("noop", RAN, GONE, value=b"other") == ["I1"]


def test_a_retry_that_was_published_and_never_arrived() -> None:
    assert judged("retried", RAN, *RETRIED[:2]) == ["I1"]


def test_started_twice_though_at_most_once() -> None:
    assert judged("once", [RAN[0], *RAN]) == ["I2"]


def test_complete_without_an_end() -> None:
    assert judged("noop", RAN[:1]) == ["I3"]


@pytest.mark.parametrize(
    "seen",
    [
        replace(FAILED, dead_lettered=False),
        replace(BY_CRASHES, attempts=2),
        replace(BY_CRASHES, reason="deadline", attempts=4),
        replace(GONE, outcome="expired"),
    ],
)
def test_failed_without_a_reason_that_may_be(seen: Seen) -> None:
    assert judged("noop", RAN, seen) == ["I3"]


def test_a_failure_that_came_to_nothing() -> None:
    assert judged("fails", RAN[:1], replace(FAILED, dead_lettered=False)) == ["I3"]
    assert judged("fails", RAN, GONE) == ["I3"]


def test_a_retry_under_a_foreign_id() -> None:
    assert "I4" in judged("retried", RAN, replace(RETRIED[0], continued_as="b"), *RETRIED[1:])


def test_too_many_runs() -> None:
    assert judged("noop", [*RAN, Line("START", "k", SECOND, 1)]) == ["I6"]
    assert judged("noop", RAN, replace(GONE, attempts=6)) == ["I6"]


def test_dead_letters() -> None:
    assert judged("fails_once", RAN[:1], FAILED) == ["I9"], "none"
    assert judged("fails_once", RAN[:1], FAILED, letters=(letter("b"),)) == ["I9"], "another's"
    assert judged("fails_once", RAN[:1], FAILED, letters=(letter("a", b"changed"),)) == ["I9"]
    assert judged("fails_once", RAN[:1], FAILED, letters=(letter("a", reason=False),)) == ["I9"]


def test_files() -> None:
    assert judged(problems=("not sound",)) == ["I11"]


def test_lines_cut_by_a_kill() -> None:
    assert parse("START k a 0\nEND k a 0\nSTART k") == RAN
