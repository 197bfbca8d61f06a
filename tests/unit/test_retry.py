from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.activation.retry import (
    Completed,
    Crashed,
    Decision,
    LastAction,
    NoRetriesRemainingError,
    Outcome,
    ProcessingDeadlineExceeded,
    Raised,
    Retry,
    RetryTaskError,
    TimedOut,
    decide,
)

NETWORK = Retry(times=3, on=(OSError,), ignore=(FileNotFoundError,), delay=30)
RETRY_30 = Decision("retry", "error", 4, 30)
FAILURE = Decision("failure", "error")


@pytest.mark.parametrize(
    ("policy", "attempts", "outcome", "expected"),
    [
        (NETWORK, 0, Completed(), Decision("complete")),
        (None, 0, Completed(), Decision("complete")),
        # no policy is one run
        (None, 0, Raised(OSError()), FAILURE),
        (None, 0, Raised(RetryTaskError()), Decision("failure", "exhausted")),
        (None, 0, TimedOut(), Decision("failure", "timeout")),
        (None, 0, Crashed(), Decision("failure", "crashed")),
        # allowed types, until the runs are used up
        (NETWORK, 0, Raised(OSError()), RETRY_30),
        (NETWORK, 1, Raised(ConnectionError()), RETRY_30),
        (NETWORK, 2, Raised(OSError()), FAILURE),
        (NETWORK, 7, Raised(OSError()), FAILURE),
        # an ignored type wins over an allowed one
        (NETWORK, 0, Raised(FileNotFoundError()), FAILURE),
        (NETWORK, 0, Raised(ValueError()), FAILURE),
        # asking for it, with the policy's delay or the task's own
        (NETWORK, 0, Raised(RetryTaskError()), Decision("retry", "requested", 4, 30)),
        (NETWORK, 0, Raised(RetryTaskError(delay=5)), Decision("retry", "requested", 4, 5)),
        (NETWORK, 0, Raised(RetryTaskError(delay=0)), Decision("retry", "requested", 4, 0)),
        (NETWORK, 2, Raised(RetryTaskError()), Decision("failure", "exhausted")),
        (Retry(times=2, ignore=(Exception,)), 0, Raised(RetryTaskError()), Decision("retry", "requested", 3)),
        (NETWORK, 2, Raised(NoRetriesRemainingError()), Decision("failure", "exhausted")),
        # multiprocessing's time-out always counts as allowed, unless ignored
        (NETWORK, 0, Raised(multiprocessing.TimeoutError()), RETRY_30),
        (
            Retry(times=3, ignore=(multiprocessing.TimeoutError,)),
            0,
            Raised(multiprocessing.TimeoutError()),
            FAILURE,
        ),
        (NETWORK, 2, Raised(multiprocessing.TimeoutError()), FAILURE),
        # the deadline only when it, or a base of it, is named
        (NETWORK, 0, TimedOut(), Decision("failure", "timeout")),
        (Retry(times=2, on=(Exception,)), 0, TimedOut(), Decision("failure", "timeout")),
        (
            Retry(times=2, on=(ProcessingDeadlineExceeded,)),
            0,
            TimedOut(),
            Decision("retry", "timeout", 3),
        ),
        (Retry(times=2, on=(BaseException,)), 0, TimedOut(), Decision("retry", "timeout", 3)),
        (
            Retry(times=2, on=(ProcessingDeadlineExceeded,)),
            0,
            Raised(ProcessingDeadlineExceeded()),
            Decision("retry", "timeout", 3),
        ),
        (Retry(times=9, on=(BaseException,)), 0, Crashed(), Decision("failure", "crashed")),
    ],
)
def test_decide(policy: Retry | None, attempts: int, outcome: Outcome, expected: Decision) -> None:
    assert decide(policy, attempts, outcome) == expected


@given(times=st.integers(1, 50), attempts=st.integers(0, 60))
def test_times_counts_runs(times: int, attempts: int) -> None:
    decision = decide(Retry(times=times, on=(Exception,)), attempts, Raised(Exception()))
    assert (decision.status == "retry") == (attempts + 1 < times)


def test_retries_remaining() -> None:
    assert [NETWORK.retries_remaining(attempts) for attempts in range(4)] == [2, 1, 0, 0]


def test_defaults_are_one_run_and_discard() -> None:
    policy = Retry()
    assert (policy.times, policy.times_exceeded, policy.delay) == (1, LastAction.Discard, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"times": 0}, "at least 1, found 0"),
        ({"times": True}, "found True"),
        ({"on": OSError}, "a tuple of exception types"),
        ({"on": ("OSError",)}, "a tuple of exception types"),
        ({"ignore": (int,)}, "Retry.ignore"),
        ({"times_exceeded": "discard"}, "a LastAction"),
        ({"delay": -1}, "found -1"),
        ({"delay": 1.5}, "found 1.5"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        Retry(**arguments)


def test_retry_after_must_be_seconds() -> None:
    with pytest.raises(ValueError, match="found -3"):
        RetryTaskError(delay=-3)
    assert str(RetryTaskError()) == "The task asked to be run again."
