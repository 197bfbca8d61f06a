"""What becomes of the work of a worker that stops, or that does not know whether it is its own any more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from taskd.wire.frames import Assignment, HandBack, LeaseRef
from taskd.worker.backlog import Backlog
from taskd.worker.plain import PlainAccount


def nothing() -> None:
    pass


def backlog(*, on_stop: Callable[[], None] = nothing, hands_back: bool = True) -> Backlog:
    return Backlog(nothing, nothing, on_stop, hands_back=hands_back)


def work(*ids: str) -> list[Assignment]:
    return [Assignment(id_, 1, b"activation", 10_000) for id_ in ids]


def test_what_runs_is_broken_off_and_what_was_stopped_before_stays_so() -> None:
    ended: list[str] = []
    held = backlog(on_stop=lambda: ended.append("stopped"))
    account = held.account("store")
    held.accept(account, work("a", "b", "c"), 0.0)
    jobs = held.take(3, 1, 0.0)
    for job in jobs[:2]:
        account.start(job)
    held.stop(account, [LeaseRef("b", 1)])
    assert sorted(held.running) == ["a", "b"]
    held.close()
    held.break_off("it still ran")
    assert [(job.stopped, job.broken_off) for job in jobs] == [
        (True, "it still ran"),
        (True, ""),
        (True, "it still ran"),
    ]
    assert ended == ["stopped", "stopped"]


def test_what_still_waits_where_nothing_can_be_handed_back_is_given_up() -> None:
    held = backlog(hands_back=False)
    account = PlainAccount("broker:1")
    held.accounts["broker:1"] = account
    held.accept(account, work("a"), 0.0)
    held.close()
    assert len(held) == 1, "it was to be run"
    held.break_off("it still ran")
    assert (len(held), held.jobs_count) == (0, 0)


@pytest.mark.parametrize("other", ["", "other"])
def test_after_a_lapse_only_what_waits_of_that_store_goes_back(other: str) -> None:
    held = backlog()
    account = held.account("store")
    held.accept(account, work("a", "b"), 0.0)
    held.take(1, 1, 0.0)
    if other:
        held.accept(held.account(other), work("x"), 0.0)
    held.lapse(account)
    assert account.news() == [HandBack((LeaseRef("b", 1),))]
    assert len(held) == bool(other)
