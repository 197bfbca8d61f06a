"""Ids of activations: random, or derived from what they follow.

With derived ones, doing a thing twice after a crash gives the same id twice.
"""

from __future__ import annotations

import hashlib
import os

_DRAWN = 64  # ids at once: asking the system for each takes longer than all the rest of making a call
_spare: list[str] = []


def new_id() -> str:
    """128 random bits as 32 hexadecimal digits; from any thread."""
    try:
        return _spare.pop()
    except IndexError:
        drawn = os.urandom(16 * _DRAWN).hex()
        _spare.extend(drawn[at : at + 32] for at in range(32, len(drawn), 32))
        return drawn[:32]


os.register_at_fork(after_in_child=_spare.clear)  # or the child would use the ids of its parent


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
