"""The bucket of tokens: over no stretch of time more than its rate and one burst."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.inflight.rates import Bucket, Rate

RATES = st.builds(Rate, st.integers(1, 5_000), st.sampled_from([1_000, 60_000, 3_600_000]))
STEPS = st.lists(st.tuples(st.integers(0, 5_000), st.integers(0, 50), st.integers(0, 3)), max_size=60)


@given(RATES, STEPS)
def test_no_stretch_of_time_sees_more_than_the_rate_and_a_burst(rate: Rate, steps: list) -> None:
    bucket, now_ms = Bucket(rate, 1_000), 1_000
    used: list[tuple[int, int]] = []
    for pause_ms, wanted, unused in steps:
        now_ms += pause_ms
        taken = min(wanted, bucket.tokens(now_ms))
        bucket.take(taken, now_ms)
        back = min(unused, taken)
        bucket.put_back(back)
        used.append((now_ms, taken - back))
    for first, (since_ms, _) in enumerate(used):
        total = 0
        for until_ms, count in used[first:]:
            total += count
            # A clock that tells whole milliseconds may be one behind.
            assert total <= rate.burst + (until_ms - since_ms + 1) * rate.count / rate.per_ms


@given(RATES, st.integers(1, 100))
def test_the_next_token_is_there_when_it_was_said_to_be(rate: Rate, owed: int) -> None:
    bucket = Bucket(rate, 0)
    bucket.take(owed, 0)
    ready_ms = bucket.ready_at_ms()
    assert bucket.tokens(ready_ms) == 1 or rate.count > rate.per_ms
    assert bucket.tokens(ready_ms - 1) == 0
    bucket.take(-1, ready_ms)  # one came back
    assert bucket.tokens(ready_ms) >= 1


@given(RATES)
def test_every_token_of_an_hour_comes(rate: Rate) -> None:
    bucket, taken, now_ms = Bucket(rate, 0), 0, 0
    while now_ms < 3_600_000 and taken < 500:
        now_ms = bucket.ready_at_ms()
        if now_ms <= 3_600_000:
            bucket.take(1, now_ms)
            taken += 1
    assert taken == min(3_600_000 * rate.count // rate.per_ms, 500)


@pytest.mark.parametrize(
    ("rate", "burst"),
    [(Rate(100, 1_000), 100), (Rate(30, 60_000), 1), (Rate(600, 60_000), 10), (Rate(5, 3_600_000), 1)],
)
def test_a_burst_is_what_a_second_brings_and_one_at_least(rate: Rate, burst: int) -> None:
    bucket = Bucket(rate, 0)
    assert bucket.tokens(0) == 0
    assert bucket.tokens(10**9) == burst
    bucket.put_back(5)
    assert bucket.tokens(10**9) == burst
