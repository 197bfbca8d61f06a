"""Which task a child began, in memory that it shares with its worker: nobody is woken by a start.

The worker looks there when it has a reason to, also when the child is dead. Most tasks are over before it
does, and their report says enough. The memory holds one note, of the newest task that began. Imported at
both ends.

A note is not written at once, and other processors may see its bytes change in any order, though only
nanoseconds apart. So the number is written first and again at last, and a reader reads twice: two readings
that agree, with the same number at both ends, are of one note.
"""

from __future__ import annotations

import struct
import time
from mmap import mmap

from taskd.worker.entry_pipe import Started, Verdict

# Number, start by the monotonic clock in ns, max_attempts, delay, status, quiet; the number once more.
_NOTE = struct.Struct("=QQqqBB6xQ")
NOTE_BYTES = _NOTE.size
_NONE = -1  # for what is left open
_REASON = "timeout"

_pack_into = _NOTE.pack_into


def write(memory: mmap, started: Started, begun_ns: int) -> bool:
    """`begun_ns`: of the monotonic clock, which is one per machine. False: it is to be told by a report."""
    number, (status, reason, error, max_attempts, delay_s), quiet, _ = started
    if reason != _REASON or error:
        return False
    attempts = _NONE if max_attempts is None else max_attempts
    delay = _NONE if delay_s is None else delay_s
    try:
        _pack_into(memory, 0, number, begun_ns, attempts, delay, status, quiet, number)
    except struct.error:
        return False
    return True


def read(memory: mmap) -> Started | None:
    """The newest, and how long ago it was; None: there is none, or it is being written just now."""
    data = memory[:NOTE_BYTES]
    number, begun_ns, attempts, delay, status, quiet, again = _NOTE.unpack(data)
    if not number or number != again or memory[:NOTE_BYTES] != data:
        return None
    max_attempts = None if attempts == _NONE else attempts
    on_timeout = Verdict(status, _REASON, "", max_attempts, None if delay == _NONE else delay)
    return Started(number, on_timeout, bool(quiet), max(time.monotonic_ns() - begun_ns, 0) / 1e9)
