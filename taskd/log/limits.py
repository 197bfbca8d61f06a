"""What every log refuses for good, decided before anything is sent."""

from __future__ import annotations

import re
from functools import lru_cache

from taskd.log.base import Outgoing, Record, Rejected

MAX_RECORD_BYTES = 10_000_000
READ_MAX_BYTES = 16_000_000  # one batch of reading stays below this, unless a single record is larger

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")  # Kafka's rule, so that a topic works on every log


def size_bytes(record: Outgoing | Record) -> int:
    """What counts against the largest record: key, value and headers."""
    size = len(record.value) + len(record.key or b"")
    if record.headers:
        for name, value in record.headers:
            size += len(name) + len(value)
    return size


def refusal(record: Outgoing, max_record_bytes: int) -> Rejected | None:
    """Why the log never will take `record`; None when it may."""
    if not is_topic(record.topic):
        return Rejected(
            f"expected a topic name of at most 249 letters, digits, '.', '_' and '-', found {record.topic!r}"
        )
    size = size_bytes(record)
    if size > max_record_bytes:
        return Rejected(
            f"the record for topic {record.topic} has {size} bytes, the log takes at most {max_record_bytes}"
        )
    return None


@lru_cache(maxsize=256)  # every record is asked about, and there are few topics
def is_topic(name: str) -> bool:
    return _TOPIC.fullmatch(name) is not None and name not in (".", "..")
