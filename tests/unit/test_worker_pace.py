"""How far ahead a worker takes work."""

from __future__ import annotations

from taskd.worker.pace import LINGER_S, MAX_AHEAD, Pace


def paced(*durations_s: float) -> Pace:
    pace = Pace()
    for duration_s in durations_s:
        pace.observe(duration_s)
    return pace


def test_nothing_is_taken_ahead_before_anything_is_known() -> None:
    assert Pace().prefetch([0, 0], 256) == 0
    assert Pace().ahead() == 0


def test_prefetch_covers_fifty_milliseconds_per_slot() -> None:
    assert paced(0.001).prefetch([0, 0], 1_000) == 100
    assert paced(0.001).prefetch([0, 0], 64) == 64
    assert paced(0.05).prefetch([0, 0], 256) == 2
    assert paced(1.0).prefetch([0, 0], 256) == 0


def test_ahead_is_for_quick_tasks_only() -> None:
    assert paced(0.0).ahead() == MAX_AHEAD
    assert paced(0.01).ahead() == 2
    assert paced(0.1).ahead() == 0


def test_a_task_that_is_still_running_counts_for_what_it_shows() -> None:
    assert paced(0.001).prefetch([10.0, 10.0], 256) == 0
    assert paced(0.001).prefetch([10.0, 0.0], 256) == 50


def test_a_task_whose_end_may_lie_unread_in_the_pipe_does_not_count() -> None:
    assert paced(0.001).prefetch([0.019, 0.019], 256) == 100
    assert paced(0.001).prefetch([0.05, 0.019], 256) == 51


def test_one_slow_task_is_forgotten_after_some_quick_ones() -> None:
    pace = paced(10.0, *[0.0001] * 60)
    assert pace.prefetch([0, 0], 256) > 100


def test_reports_of_quick_tasks_gather_while_their_child_has_enough_to_do() -> None:
    assert Pace().linger_s(100) == 0
    assert paced(0.00001).linger_s(1) == 0
    assert 0 < paced(0.00001).linger_s(20) < 20 * 0.00004
    assert paced(0.00001).linger_s(10_000) == LINGER_S
