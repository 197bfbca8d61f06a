"""How long a task waits before it runs again: longer each time, up to an end, and not all tasks alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from taskd.activation.durations import Duration, optional_seconds, seconds

if TYPE_CHECKING:
    from random import Random

FULL: Literal["full"] = "full"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Each retry waits `factor` times as long as the one before, `maximum` (seconds, or a timedelta) at most.

    `jitter`: how much of that is left to chance, from 0 to 1, so that what failed together does not come
    back together. With 0.1 a retry waits between 90 % and 100 % of it, with 1 or "full" between nothing
    and all of it; never longer.
    """

    factor: float = 2.0
    maximum: Duration = 3_600
    jitter: float | Literal["full"] = 0.1

    def __post_init__(self) -> None:
        if not _is_number(self.factor) or self.factor < 1:
            raise ValueError(f"Backoff.factor: expected a number of at least 1, found {self.factor!r}")
        if self.jitter != FULL and not (_is_number(self.jitter) and 0 <= self.jitter <= 1):
            raise ValueError(f'Backoff.jitter: expected 0 to 1, or "full"; found {self.jitter!r}')
        seconds(self.maximum, "Backoff.maximum", at_least=1)

    @property
    def maximum_s(self) -> int:
        return seconds(self.maximum, "Backoff.maximum")

    def delay_s(self, first_s: int, attempts: int, rng: Random | None) -> int:
        """Before the retry that follows run number `attempts` (0 is the first); without `rng` no jitter."""
        longest_s = self._grown_s(first_s, attempts)
        part = 1.0 if self.jitter == FULL else self.jitter
        chance = 0.0 if rng is None else rng.random()
        return round(longest_s * (1 - part * chance))

    def _grown_s(self, first_s: int, attempts: int) -> float:
        try:
            return min(first_s * self.factor**attempts, self.maximum_s)
        except OverflowError:
            return self.maximum_s


@dataclass(frozen=True, slots=True)
class RetryRule:
    """What is different after one type of exception. What is None is as the policy says.

    `times` counts runs, those that ended otherwise included; it can only be lower than the policy's.
    """

    times: int | None = None
    delay: Duration | None = None
    backoff: Backoff | None = None

    def __post_init__(self) -> None:
        if self.times is not None and (not isinstance(self.times, int) or self.times < 1):
            raise ValueError(
                f"RetryRule.times counts runs: expected an int of at least 1, found {self.times!r}"
            )
        optional_seconds(self.delay, "RetryRule.delay")
        check_backoff(self.backoff, "RetryRule")


def check_backoff(backoff: object, where: str) -> None:
    if backoff is not None and not isinstance(backoff, Backoff):
        raise TypeError(f"{where}.backoff: expected a Backoff, found {backoff!r}")


def after_seconds(value: float | timedelta, what: str) -> int:
    """What a task asks for, in whole seconds, rounded up. Raises ValueError."""
    return seconds(math.ceil(value) if isinstance(value, float) and _is_number(value) else value, what)


def asked_by_headers(headers: Mapping[str, str], at_most_s: int) -> int | None:
    """The seconds that an HTTP answer asks to wait, 0 to `at_most_s`; None when it does not clearly say.

    `Retry-After` is a number of seconds or a date. A date counts from the answer's own `Date`, so it does
    not matter whether the two clocks agree.
    """
    found = {name.lower(): value.strip() for name, value in headers.items()}
    asked = found.get("retry-after", "")
    if asked.isascii() and asked.isdigit():
        return int(asked) if len(asked) < 10 and int(asked) < at_most_s else at_most_s
    from email.utils import parsedate_to_datetime

    try:
        left = parsedate_to_datetime(asked) - parsedate_to_datetime(found.get("date", ""))
    except (TypeError, ValueError):  # no date, or only one of them names its zone
        return None
    return min(max(math.ceil(left.total_seconds()), 0), at_most_s)
