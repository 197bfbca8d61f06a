"""When a link tells its news: at once while its broker is idle, together while it is not."""

from __future__ import annotations

from taskd.worker.gather import ENOUGH, GATHER_S, MANY, Gathering


def test_nothing_waits_while_nothing_is_unanswered() -> None:
    gathering = Gathering()
    assert gathering.until(1, now=5.0) == 5.0
    assert gathering.starts_until(5.0) == 5.0
    gathering.sent(MANY, now=5.0)
    gathering.answered()
    assert gathering.until(1, now=5.0) == 5.0
    assert gathering.starts_until(5.0) == 5.0


def test_results_wait_for_the_answer_to_those_before_them_but_not_for_long() -> None:
    gathering = Gathering()
    gathering.sent(1, now=5.0)
    assert gathering.until(1, now=5.001) == 5.0 + GATHER_S
    assert gathering.until(ENOUGH, now=5.001) == 5.001


def test_results_that_come_in_numbers_gather_while_more_are_to_come() -> None:
    gathering = Gathering()
    gathering.sent(MANY, now=5.0)
    gathering.answered()
    assert gathering.until(1, now=5.001, more=True) == 5.0 + GATHER_S
    assert gathering.until(ENOUGH, now=5.001, more=True) == 5.001
    gathering.sent(MANY - 1, now=6.0)
    gathering.answered()
    assert gathering.until(1, now=6.001, more=True) == 6.001


def test_starts_wait_only_while_results_come_in_numbers() -> None:
    gathering = Gathering()
    gathering.sent(MANY - 1, now=5.0)
    assert gathering.starts_until(5.001) == 5.001
    gathering.sent(MANY, now=5.0)
    assert gathering.starts_until(5.001) == 5.0 + GATHER_S
