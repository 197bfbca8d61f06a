"""The summary's figures, and the exit code that goes with them."""

from __future__ import annotations

import pytest

from taskd.admin.wait import Final
from taskd.cli.summary import Summary, percentiles


def ended(outcome: str = "complete", ms: int = 0, **more: object) -> Final:
    return Final(id="i", outcome=outcome, received_at_ms=1, finished_at_ms=1 + ms, **more)


@pytest.mark.parametrize(
    ("sent", "outcomes", "code"),
    [
        (2, None, 0),
        (1, None, 1),
        (2, ["complete", "complete"], 0),
        (2, ["complete", "failed"], 3),
        (2, ["complete", "expired"], 3),
        (2, ["failed", "unfinished"], 1),
        (2, ["complete", "forgotten"], 1),
        (1, ["complete"], 1),
    ],
)
def test_exit_codes(sent, outcomes, code):
    finals = None if outcomes is None else [ended(outcome) for outcome in outcomes]
    assert Summary("a:b", 2, ids=["x"] * sent, finals=finals).exit_code == code


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        ([], (None, None)),
        ([7], (7, 7)),
        ([1, 2], (1, 2)),
        (range(1, 101), (50, 99)),
        (range(1, 201), (100, 198)),
    ],
)
def test_percentiles(latencies, expected):
    assert percentiles([ended(ms=ms) for ms in latencies]) == expected
    assert percentiles([Final("x", "unfinished"), *(ended(ms=ms) for ms in latencies)]) == expected


def test_for_people_and_for_programs():
    finals = [
        ended(ms=5),
        ended("failed", 9, retries=2, dead_lettered=True, last_id="z", reason="error", error="boom"),
    ]
    summary = Summary("a:b", 3, ["x", "y"], ["c was not scheduled"], finals, 1.23456)
    assert summary.as_json() == {
        "task": "a:b",
        "sent": 2,
        "not_sent": 1,
        "complete": 1,
        "retried": 1,
        "failed": 1,
        "dead_lettered": 1,
        "expired": 0,
        "dropped": 0,
        "unfinished": 0,
        "forgotten": 0,
        "p50_ms": 5,
        "p99_ms": 9,
        "seconds": 1.235,
        "errors": ["c was not scheduled"],
        "ids": ["x", "y"],
    }
    lines = summary.lines()
    assert "dead-lettered 1" in lines
    assert "not sent      1" in lines
    assert lines[-1] == "failed        z error: boom"
    assert not any(line.startswith("expired") for line in lines)


def test_ids_are_shown_when_nobody_waited():
    lines = Summary("a:b", 12, [f"id{number}" for number in range(12)]).lines()
    assert sum(line.startswith("id") for line in lines) == 10
    assert lines[-1].strip() == "and 2 more; --json prints them all"
