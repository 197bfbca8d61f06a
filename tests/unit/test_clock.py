from __future__ import annotations

import time

import pytest

from taskd.clock import EXPIRY_PAUSE_MS, Now, StepWatch, SystemClock

WALL_MS = 1_767_225_600_000
HOUR_MS = 3_600_000


@pytest.fixture
def watch() -> StepWatch:
    watch = StepWatch()
    assert watch.observe(WALL_MS, 1_000) == Now(WALL_MS, 1_000, True)
    return watch


@pytest.mark.parametrize("step_ms", [HOUR_MS, -HOUR_MS, 60_001, -60_001, 10 * 366 * 24 * HOUR_MS])
def test_a_step_pauses_expiry_for_five_minutes(watch: StepWatch, step_ms: int) -> None:
    assert not watch.observe(WALL_MS + step_ms + 5, 1_005).may_expire
    assert watch.last_step_ms == step_ms
    later_ms = EXPIRY_PAUSE_MS - 1
    assert not watch.observe(WALL_MS + step_ms + 5 + later_ms, 1_005 + later_ms).may_expire
    assert watch.observe(WALL_MS + step_ms + 6 + later_ms, 1_006 + later_ms).may_expire


@pytest.mark.parametrize("step_ms", [0, 500, -500, 60_000, -60_000])
def test_what_is_no_longer_than_a_minute_is_no_step(watch: StepWatch, step_ms: int) -> None:
    assert watch.observe(WALL_MS + step_ms, 1_000).may_expire
    assert watch.last_step_ms == 0


@pytest.mark.parametrize("each_ms", [10, 900, 30_000])
def test_drift_never_adds_up_to_a_step(watch: StepWatch, each_ms: int) -> None:
    for n in range(1, 1_000):
        assert watch.observe(WALL_MS + n * (1_000 + each_ms), 1_000 + n * 1_000).may_expire


def test_a_long_silence_is_no_step(watch: StepWatch) -> None:
    assert watch.observe(WALL_MS + 100 * HOUR_MS, 1_000 + 100 * HOUR_MS).may_expire


def test_a_second_step_begins_the_pause_again(watch: StepWatch) -> None:
    watch.observe(WALL_MS + HOUR_MS, 1_000)
    back_at_ms = 1_000 + EXPIRY_PAUSE_MS - 1
    assert not watch.observe(WALL_MS + back_at_ms, back_at_ms).may_expire
    assert watch.last_step_ms < 0
    assert not watch.observe(WALL_MS + back_at_ms + 2, back_at_ms + 2).may_expire


def test_the_machines_clocks() -> None:
    clock = SystemClock()
    first, second = clock.now(), clock.now()
    assert first.wall_ms > WALL_MS
    assert second.mono_ms >= first.mono_ms
    assert second.may_expire
    assert clock.last_step_ms == 0


def test_being_stopped_between_two_readings_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP for two minutes, just after the first clock was read."""
    mono_ms = iter([1_000, 121_000, 121_000, 121_001, 121_001])
    wall_ms = iter([WALL_MS, WALL_MS + 120_000, WALL_MS + 120_001])
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(mono_ms) * 1_000_000)
    monkeypatch.setattr(time, "time_ns", lambda: next(wall_ms) * 1_000_000)
    clock = SystemClock()
    readings = [clock.now(), clock.now()]
    monkeypatch.undo()
    assert readings == [Now(WALL_MS + 120_000, 121_000, True), Now(WALL_MS + 120_001, 121_001, True)]
