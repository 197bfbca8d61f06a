"""The parts of the demo that need no daemon; `make demo` runs the whole."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from taskd_webhooks.post import NotDelivered
from taskd_webhooks.tasks import SECRET_VARIABLE, deliver
from taskd_webhooks.testing import Receiver

from taskd.activation.retry import RetryTaskError
from taskd.admin.wait import Final

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo")


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("moody_receiver")


def event_with(moody: Any, status: int, times: int | None) -> dict[str, Any]:
    for line in (EXAMPLES / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event: dict[str, Any] = json.loads(line)["event"]
        if moody.mood_of(event["id"]) == (status, times):
            return event
    raise AssertionError(f"no event with {status} {times} times")


def test_the_calls_are_those_of_the_file_sent_elsewhere(demo: Any) -> None:
    calls = demo.read_calls("http://127.0.0.1:1")
    assert len(calls) == 500
    assert all(call["url"].startswith("http://127.0.0.1:1/hooks/") for call in calls)


def test_moods_are_as_many_as_intended(demo: Any, moody: Any) -> None:
    moods = [moody.mood_of(call["event"]["id"]) for call in demo.read_calls("")]
    assert sum(mood.status == 503 for mood in moods) == 39  # about 8 %
    assert sum(mood.status == 500 for mood in moods) == 3
    assert sum(mood.status == 410 for mood in moods) == 2


@pytest.mark.parametrize("times", [1, 2])
def test_the_receiver_takes_an_event_after_some_tries(
    receiver: Receiver, moody: Any, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "s")
    receipts = moody.Receipts("s")
    receiver.answer = receipts.answer
    event = event_with(moody, 503, times)
    for _ in range(times):
        with pytest.raises(RetryTaskError):
            deliver(receiver.url, event)
    deliver(receiver.url, event)
    assert receipts.taken == {event["id"]: 1}


def test_the_receiver_never_takes_some(
    receiver: Receiver, moody: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "s")
    receipts = moody.Receipts("s")
    receiver.answer = receipts.answer
    for status, error in ((500, RetryTaskError), (410, NotDelivered)):
        with pytest.raises(error):
            deliver(receiver.url, event_with(moody, status, None))
    assert not receipts.taken


def test_the_receiver_takes_nothing_that_is_not_signed(
    receiver: Receiver, moody: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "another")
    receipts = moody.Receipts("s")
    receiver.answer = receipts.answer
    with pytest.raises(NotDelivered, match="answered 401"):
        deliver(receiver.url, event_with(moody, 204, 0))
    assert receipts.forged == 1


def test_the_balance(demo: Any, moody: Any) -> None:
    taken, dead = event_with(moody, 204, 0)["id"], event_with(moody, 500, None)["id"]
    receipts = moody.Receipts("s")
    receipts.taken[taken] = 2
    receipts.taken_at_s[taken] = 10.5
    ends = [Final("a", "complete", retries=1), Final("b", "failed", retries=4, dead_lettered=True)]
    result = demo.balance([taken, dead], ends, receipts, {taken: 10.0, dead: 10.0}, 3.0)
    assert result.problems == []
    assert (
        result.figures | {"lost": "0", "delivered more than once": "1", "latency p99": "500 ms"}
        == result.figures
    )
    assert (result.figures["retried"], result.figures["dead-lettered"]) == ("2", "1")


@pytest.mark.parametrize(
    ("kind", "end", "taken", "wrong"),
    [
        ((204, 0), Final("a", "complete"), 0, "never reached the receiver"),
        ((503, 2), Final("a", "unfinished"), 0, "never reached the receiver, taskd says unfinished"),
        (
            (503, 1),
            Final("a", "failed", error="Traceback\nOSError: x"),
            1,
            r"taskd says failed \(OSError: x\)",
        ),
        ((500, None), Final("a", "complete"), 0, "should have become a dead letter"),
        ((410, None), Final("a", "failed"), 0, "should have become a dead letter"),
    ],
)
def test_what_is_wrong_is_said(
    demo: Any, moody: Any, kind: tuple[int, int | None], end: Final, taken: int, wrong: str
) -> None:
    said = demo.judge(event_with(moody, *kind)["id"], end, taken)
    assert said is not None
    assert re.search(wrong, said)
