"""When a task runs again: delays that grow, rules for single exceptions, what a service asks for."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.activation.backoff import Backoff, RetryRule
from taskd.activation.retry import (
    Decision,
    ProcessingDeadlineExceeded,
    Raised,
    Retry,
    RetryAfter,
    RetryTaskError,
    TimedOut,
    decide,
)

STEADY = Backoff(jitter=0)


def delays(policy: Retry, error: BaseException, runs: int, rng: Random | None = None) -> list[int | None]:
    found = []
    for attempts in range(runs):
        decision = decide(policy, attempts, Raised(error), rng)
        assert decision.status == "retry"
        found.append(decision.delay_on_retry)
    return found


# ---- back-off


def test_each_retry_waits_twice_as_long_up_to_the_maximum() -> None:
    policy = Retry(times=9, on=(OSError,), delay=10, backoff=replace(STEADY, maximum=timedelta(minutes=2)))
    assert delays(policy, OSError(), 7) == [10, 20, 40, 80, 120, 120, 120]


def test_a_factor_of_one_is_a_steady_delay() -> None:
    policy = Retry(times=9, on=(OSError,), delay=timedelta(seconds=1.2), backoff=Backoff(factor=1, jitter=0))
    assert delays(policy, OSError(), 3) == [2, 2, 2]


def test_asking_for_a_retry_waits_as_the_policy_says_or_as_the_task_does() -> None:
    policy = Retry(times=9, delay=10, backoff=Backoff(jitter="full"))
    rng = Random(1)
    assert len(set(delays(policy, RetryTaskError(), 8, rng))) > 1
    assert delays(policy, RetryTaskError(delay=7), 3, rng) == [7, 7, 7]
    assert delays(policy, RetryAfter(7), 3, rng) == [7, 7, 7]


def test_without_chance_there_is_no_jitter() -> None:
    policy = Retry(times=9, on=(OSError,), delay=10, backoff=Backoff(jitter="full"))
    assert delays(policy, OSError(), 3) == [10, 20, 40]


@given(
    first_s=st.integers(0, 10**9),
    factor=st.floats(1, 1e6),
    maximum_s=st.integers(1, 10**9),
    jitter=st.just("full") | st.floats(0, 1),
    attempts=st.integers(0, 2**32),
    seed=st.integers(),
)
def test_jitter_only_shortens_and_the_maximum_holds(
    first_s: int, factor: float, maximum_s: int, jitter: float | Literal["full"], attempts: int, seed: int
) -> None:
    backoff = Backoff(factor=factor, maximum=maximum_s, jitter=jitter)
    longest_s = backoff.delay_s(first_s, attempts, None)
    assert min(first_s, maximum_s) <= longest_s <= maximum_s
    found_s = backoff.delay_s(first_s, attempts, Random(seed))
    part = 1.0 if jitter == "full" else jitter
    assert longest_s * (1 - part) - 1 <= found_s <= longest_s


@given(first_s=st.integers(1, 1000), factor=st.floats(1, 10), attempts=st.integers(0, 60))
def test_a_later_retry_never_waits_less(first_s: int, factor: float, attempts: int) -> None:
    backoff = Backoff(factor=factor, jitter=0)
    assert backoff.delay_s(first_s, attempts, None) <= backoff.delay_s(first_s, attempts + 1, None)


def test_what_failed_together_does_not_come_back_together() -> None:
    backoff = Backoff(jitter=0.5)
    rng = Random(7)
    found = [backoff.delay_s(1000, 0, rng) for _ in range(500)]
    assert min(found) < 550
    assert max(found) > 950
    assert len(set(found)) > 200


# ---- one rule for each exception

RULES = Retry(
    times=5,
    on=(OSError,),
    ignore=(FileNotFoundError,),
    delay=10,
    per_exception={
        ConnectionError: RetryRule(delay=60, backoff=STEADY),
        ConnectionResetError: RetryRule(delay=0),
        KeyError: RetryRule(times=2),
        ProcessingDeadlineExceeded: RetryRule(delay=300),
    },
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(), [10, 10, 10, 10]),
        (ConnectionError(), [60, 120, 240, 480]),
        (ConnectionAbortedError(), [60, 120, 240, 480]),
        (ConnectionResetError(), [0, 0, 0, 0]),
        (ProcessingDeadlineExceeded(), [300, 300, 300, 300]),
        (RetryTaskError(), [10, 10, 10, 10]),
    ],
)
def test_the_most_specific_rule_counts(error: BaseException, expected: list[int]) -> None:
    assert delays(RULES, error, 4) == expected
    assert decide(RULES, 4, Raised(error)).status == "failure"


def test_a_rule_can_allow_fewer_runs() -> None:
    assert decide(RULES, 0, Raised(KeyError())) == Decision("retry", "error", 6, 10)
    assert decide(RULES, 1, Raised(KeyError())) == Decision("failure", "error")


def test_a_rule_makes_its_type_lead_to_a_retry_but_ignored_stays_ignored() -> None:
    assert decide(RULES, 0, Raised(FileNotFoundError())).status == "failure"
    assert decide(RULES, 0, Raised(ValueError())).status == "failure"
    assert decide(RULES, 0, TimedOut()) == Decision("retry", "timeout", 6, 300)
    assert decide(replace(RULES, ignore=(OSError,)), 0, Raised(ConnectionError())).status == "failure"


def test_a_rule_for_those_who_ask() -> None:
    class Throttled(RetryTaskError):
        """The service wants fewer calls."""

    policy = Retry(times=9, delay=1, per_exception={Throttled: RetryRule(times=2, delay=30)})
    assert delays(policy, Throttled(), 1) == [30]
    assert decide(policy, 1, Raised(Throttled())) == Decision("failure", "exhausted")
    assert delays(policy, RetryTaskError(), 2) == [1, 1]


def test_a_policy_can_be_a_key_and_keeps_its_rules() -> None:
    rules = {OSError: RetryRule(delay=1)}
    policy = Retry(times=2, per_exception=rules)
    rules.clear()
    assert hash(policy) == hash(replace(policy))
    assert list(policy.per_exception) == [OSError]


# ---- what a service asks for


@pytest.mark.parametrize(
    ("after", "delay_s"), [(0, 0), (90, 90), (1.01, 2), (timedelta(minutes=2, milliseconds=1), 121)]
)
def test_retry_after_counts_whole_seconds(after: float | timedelta, delay_s: int) -> None:
    assert RetryAfter(after).delay == delay_s


@pytest.mark.parametrize("after", [-1, timedelta(seconds=-5), float("nan"), float("inf"), "60", True])
def test_retry_after_something_else_is_refused(after: Any) -> None:
    with pytest.raises(ValueError, match="RetryAfter: expected"):
        RetryAfter(after)


DATE = "Wed, 21 Oct 2026 07:28:00 GMT"


@pytest.mark.parametrize(
    ("headers", "delay_s"),
    [
        ({"Retry-After": "120"}, 120),
        ({"retry-after": " 0 "}, 0),
        ({"RETRY-AFTER": "Wed, 21 Oct 2026 07:29:30 GMT", "date": DATE}, 90),
        ({"Retry-After": "Wed, 21 Oct 2026 07:00:00 GMT", "Date": DATE}, 0),
        # no more than asked for
        ({"Retry-After": "9" * 400}, 86_400),
        ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT", "Date": DATE}, 86_400),
        # left to the policy
        ({}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Wed, 21 Oct 2026 07:29:30 GMT"}, None),
        ({"Retry-After": "Wed, 21 Oct 2026 07:29:30 GMT", "Date": "Wed, 21 Oct 2026 07:29:30"}, None),
        ({"Retry-After": "²"}, None),
    ],
)
def test_what_an_http_answer_asks_for(headers: dict[str, str], delay_s: int | None) -> None:
    asked = RetryAfter.from_headers(headers)
    assert asked.delay == delay_s
    assert isinstance(asked, RetryTaskError)


def test_the_longest_wait_for_a_service_can_be_set() -> None:
    headers = {"Retry-After": "7200"}
    assert RetryAfter.from_headers(headers, at_most=timedelta(hours=1)).delay == 3600


@given(headers=st.dictionaries(st.sampled_from(["Retry-After", "Date"]), st.text(max_size=60)))
def test_no_header_breaks_it(headers: dict[str, str]) -> None:
    delay_s = RetryAfter.from_headers(headers).delay
    assert delay_s is None or 0 <= delay_s <= 86_400


# ---- what makes no sense


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Backoff(factor=0.5), "Backoff.factor: expected a number of at least 1"),
        (lambda: Backoff(factor=float("inf")), "Backoff.factor"),
        (lambda: Backoff(jitter=1.5), 'expected 0 to 1, or "full"; found 1.5'),
        (lambda: Backoff(jitter="some"), "found 'some'"),  # type: ignore[arg-type]
        (lambda: Backoff(maximum=0), "Backoff.maximum"),
        (lambda: RetryRule(times=0), "RetryRule.times"),
        (lambda: RetryRule(delay=-1), "RetryRule.delay"),
        (lambda: RetryRule(backoff=2), "RetryRule.backoff: expected a Backoff"),  # type: ignore[arg-type]
        (lambda: Retry(backoff=2), "Retry.backoff: expected a Backoff"),  # type: ignore[arg-type]
        (lambda: Retry(backoff=Backoff()), "a backoff needs a delay"),
        (lambda: Retry(per_exception={OSError: RetryRule(backoff=Backoff())}), "a backoff needs a delay"),
        (lambda: Retry(per_exception={OSError: 5}), "a RetryRule for each"),  # type: ignore[dict-item]
        (lambda: Retry(per_exception={int: RetryRule()}), "a RetryRule for each"),  # type: ignore[dict-item]
        (
            lambda: Retry(ignore=(OSError,), per_exception={OSError: RetryRule()}),
            "OSError is in both `ignore` and `per_exception`",
        ),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(make: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make()
