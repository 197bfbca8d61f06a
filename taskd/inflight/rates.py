"""How often something may begin: a rate, and the bucket of tokens that keeps it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` times in `per_ms` milliseconds."""

    count: int
    per_ms: int

    @property
    def burst(self) -> int:
        """As many may begin at once after a pause: what one second brings, one at least."""
        return max(self.count * 1000 // self.per_ms, 1)


class Bucket:
    """Tokens that come at a rate, up to its burst. Times are of the monotonic clock.

    A new one is empty: whoever restarts a broker again and again gains nothing. Counted in whole numbers,
    `per_ms` to a token, so nothing is lost to rounding. One thread changes it, any may look.
    """

    __slots__ = ("_rate", "_state")

    def __init__(self, rate: Rate, now_ms: int) -> None:
        self._rate = rate
        self._state = (0, now_ms)  # the level, and when that was; together, for those who look

    def tokens(self, now_ms: int) -> int:
        """Whole tokens that are there."""
        return max(self._level(now_ms) // self._rate.per_ms, 0)

    def take(self, count: int, now_ms: int) -> None:
        """Take so many, whether they are there or not; what is missing has to come first."""
        level = self._level(now_ms) - count * self._rate.per_ms
        self._state = (min(level, self._most), now_ms)

    def put_back(self, count: int) -> None:
        """So many were taken for nothing; a full bucket takes no more. Negative: they were not, after all."""
        level, at_ms = self._state
        self._state = (min(level + count * self._rate.per_ms, self._most), at_ms)

    def ready_at_ms(self) -> int:
        """When the first whole token is there, or was."""
        level, at_ms = self._state
        return at_ms + max(-((level - self._rate.per_ms) // self._rate.count), 0)

    @property
    def _most(self) -> int:
        """The burst, and what a millisecond brings of the next token: clocks tell no less."""
        rate = self._rate
        return rate.burst * rate.per_ms + min(rate.count, rate.per_ms) - 1

    def _level(self, now_ms: int) -> int:
        level, at_ms = self._state
        return min(level + max(now_ms - at_ms, 0) * self._rate.count, self._most)
