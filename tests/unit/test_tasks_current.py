from __future__ import annotations

import pytest

from taskd import NoRetriesRemainingError, RetryTaskError, current_task, retry_task
from taskd.tasks.current import CurrentTask, running


def running_task(retries_remaining: int) -> CurrentTask:
    return CurrentTask(id="i", namespace="n", taskname="t", retries_remaining=retries_remaining)


def test_there_is_none_outside() -> None:
    assert current_task() is None


def test_it_is_known_inside_and_forgotten_after() -> None:
    task = running_task(1)
    with running(task):
        assert current_task() is task
    assert current_task() is None


def test_retry_task_asks_for_another_run() -> None:
    with running(running_task(1)), pytest.raises(RetryTaskError, match="busy") as caught:
        retry_task(30, message="busy")
    assert caught.value.delay == 30


def test_retry_task_says_when_no_run_is_left() -> None:
    with running(running_task(0)), pytest.raises(NoRetriesRemainingError):
        retry_task()


def test_retry_task_outside_raises_too() -> None:
    with pytest.raises(RetryTaskError):
        retry_task()
