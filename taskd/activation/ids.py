"""Ids of activations: new ones, or derived from what they follow.

With derived ones, doing a thing twice after a crash gives the same id twice.
"""

from __future__ import annotations

import hashlib
import os

from taskd.clock import rough_wall_ms

_DRAWN = 64  # ids at once: asking the system for each takes longer than all the rest of making a call
_DIGITS = 19  # random ones of each id
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))  # its upper bits are 10
_spare: tuple[int, list[str]] = (0, [])  # the process that drew them, and what it has not used


def new_id() -> str:
    """A UUID of version 7, as 32 hexadecimal digits; from any thread.

    Such ids begin with the time, so those that come together lie together in the index of the store. With
    random ones each insert changes a page of its own: at 100,000 rows a batch costs three times as much.
    """
    global _spare
    drawn_by, spare = _spare
    own = os.getpid()  # asked each time: no hook of Python's tells of a fork in C, as of uWSGI's workers
    if drawn_by == own:
        try:
            return spare.pop()
        except IndexError:
            pass
    at = f"{rough_wall_ms():012x}"
    drawn = os.urandom(_DRAWN * _DIGITS // 2).hex()
    ids = [_version_7(at, drawn[n : n + _DIGITS]) for n in range(0, _DRAWN * _DIGITS, _DIGITS)]
    _spare = own, ids[1:]
    return ids[0]


def _version_7(at: str, random: str) -> str:
    return f"{at}7{random[:3]}{_VARIANT[random[3]]}{random[4:]}"


def _derived(*parts: object) -> str:
    joined = "\0".join(str(part) for part in parts)
    return hashlib.sha256(joined.encode()).hexdigest()[:32]


def retry_id(activation_id: str, attempts: int) -> str:
    """The id of the retry of `activation_id` whose retry state says `attempts`."""
    return _derived("taskd-retry", activation_id, attempts)


def raw_record_id(topic: str, partition: int, offset: int, timestamp_ms: int) -> str:
    """The id of the activation made of a foreign record."""
    return _derived("taskd-raw", topic, partition, offset, timestamp_ms)


def scheduled_id(entry: str, nominal_time_ms: int) -> str:
    """The id of one run of a schedule's entry."""
    return _derived("taskd-schedule", entry, nominal_time_ms)
