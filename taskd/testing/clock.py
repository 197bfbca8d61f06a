"""Clocks for tests: one that stands until it is set, one that follows Trio's, real or virtual."""

from __future__ import annotations

import trio

from taskd.clock import Now

START_WALL_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z


class FixedClock:
    """Stands still until `advance`."""

    def __init__(self, wall_ms: int = START_WALL_MS, mono_ms: int = 0) -> None:
        self.wall_ms = wall_ms
        self.mono_ms = mono_ms
        self.may_expire = True

    def now(self) -> Now:
        return Now(self.wall_ms, self.mono_ms, self.may_expire)

    def advance(self, seconds: float) -> None:
        self.wall_ms += round(seconds * 1000)
        self.mono_ms += round(seconds * 1000)


class TrioClock:
    """Trio's clock: on the autojump clock, time passes when everybody waits."""

    def now(self) -> Now:
        mono_ms = round(trio.current_time() * 1000)
        return Now(START_WALL_MS + mono_ms, mono_ms)
