"""Ids derived from what they follow, so that doing a thing twice after a crash gives the same id twice."""

from __future__ import annotations

import hashlib


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
