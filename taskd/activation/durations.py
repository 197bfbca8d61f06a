"""Durations as task authors write them: seconds as an int, or a timedelta."""

from __future__ import annotations

import math
from datetime import timedelta

Duration = int | timedelta

MAX_S = 100 * 366 * 86_400  # a hundred years, where the broker ends a duration too


def seconds(value: object, what: str, *, at_least: int = 0) -> int:
    """`value` in whole seconds, rounded up. Raises ValueError that names `what`."""
    if isinstance(value, timedelta):
        whole = math.ceil(value.total_seconds())
    elif isinstance(value, int) and not isinstance(value, bool):
        whole = value
    else:
        raise ValueError(f"{what}: expected seconds as an int, or a timedelta; found {value!r}")
    if not at_least <= whole <= MAX_S:
        raise ValueError(f"{what}: expected {at_least} s to {MAX_S} s (100 years), found {value!r}")
    return whole


def optional_seconds(value: object, what: str, *, at_least: int = 0) -> int | None:
    return None if value is None else seconds(value, what, at_least=at_least)
