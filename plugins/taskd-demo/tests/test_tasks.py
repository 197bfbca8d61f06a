"""Tasks are functions: call them."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing
from taskd_demo.tasks import add, flaky, noop, wait

from taskd import RetryTaskError


def test_add_logs_the_sum(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        add(2, 3)
    assert caplog.messages == ["2 + 3 = 5"]


def test_noop_does_nothing() -> None:
    noop()


def test_wait_waits() -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(wait, 30.0, clock=clock)
    assert clock.current_time() == 30


def test_flaky_completes_when_nothing_should_fail() -> None:
    flaky(failures=0)


def test_flaky_asks_for_another_run() -> None:
    with pytest.raises(RetryTaskError, match="run 1 of 2 that fail by design"):
        flaky(failures=2)
