"""The only reader of clocks. Everything else is given a `Now`."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

WALL_STEP_MS = 60_000  # a wall clock that moved this far against the monotonic one was set
READ_WITHIN_MS = 1_000  # both clocks are read within this, or read again
EXPIRY_PAUSE_MS = 300_000  # after a step, nothing expires for this long (design rule 2)


class Now(NamedTuple):
    """One moment, read once and passed on.

    `wall_ms`: milliseconds since 1970, for expiry, delay and schedules; it may be stepped.
    `mono_ms`: milliseconds of the monotonic clock, for leases, claims and time-outs.
    `may_expire`: False for five minutes after the wall clock was stepped by more than a minute.
    """

    wall_ms: int
    mono_ms: int
    may_expire: bool = True


class Clock(Protocol):
    def now(self) -> Now: ...


def rough_wall_ms() -> int:
    """Milliseconds since 1970, for what is only to lie roughly in the order of time."""
    return time.time_ns() // 1_000_000


def monotonic_s() -> float:
    """The monotonic clock in seconds, finely: for measuring how long something took.

    All processes of a machine read the same one.
    """
    return time.perf_counter()


def thread_cpu_ns() -> int:
    """What this thread has used of a processor: for measuring what something costs."""
    return time.thread_time_ns()


class StepWatch:
    """Notices steps of the wall clock; `readings` come in the order they were taken."""

    def __init__(self) -> None:
        self._offset_ms: int | None = None
        self._paused_until_mono_ms = 0
        self.last_step_ms = 0

    def observe(self, wall_ms: int, mono_ms: int) -> Now:
        offset_ms = wall_ms - mono_ms
        if self._offset_ms is not None and abs(offset_ms - self._offset_ms) > WALL_STEP_MS:
            self.last_step_ms = offset_ms - self._offset_ms
            self._paused_until_mono_ms = mono_ms + EXPIRY_PAUSE_MS
        # Always from the last reading: drift and slewing never add up to a step.
        self._offset_ms = offset_ms
        return Now(wall_ms, mono_ms, mono_ms >= self._paused_until_mono_ms)


class SystemClock:
    """The machine's clocks."""

    def __init__(self) -> None:
        self._watch = StepWatch()

    def now(self) -> Now:
        before_ms = time.monotonic_ns() // 1_000_000
        while True:
            wall_ms = time.time_ns() // 1_000_000
            mono_ms = time.monotonic_ns() // 1_000_000
            if mono_ms - before_ms < READ_WITHIN_MS:
                return self._watch.observe(wall_ms, mono_ms)
            before_ms = mono_ms  # stopped between the two readings: together they would look like a step

    @property
    def last_step_ms(self) -> int:
        return self._watch.last_step_ms
