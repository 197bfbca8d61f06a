"""What tasks print, on its way from a child's standard output and error to the worker's log.

A line is cut at `MAX_LINE_BYTES`, and a child that prints more than its budget is still read, so that it
is not held up, but what it prints beyond is dropped, and how much that was is said.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable

import structlog

from taskd.worker.entry_pipe import LINE_BREAK, LOG_MARK, NUMBER_MARK

log = structlog.get_logger("taskd.worker.output")

MAX_LINE_BYTES = 8_192
READ_BYTES = 65_536
READS_AT_ONCE = 16  # then somebody else is to have a turn
BUDGET_BYTES = 256 * 1024  # that may come at once
BUDGET_BYTES_PER_S = 128 * 1024
LINE_BYTES = 256  # what a line costs of it besides its length: about 30 us of the worker's time
SAY_DROPPED_EVERY_S = 1.0

_MARKS = re.compile(re.escape(NUMBER_MARK) + rb"(\d{1,20})\n")
_MARK_AT_END = re.compile(re.escape(NUMBER_MARK) + rb"(\d{1,20})\Z")

Whose = Callable[[int], str | None]
"""The id of the activation that runs, given the number the output says it is from; 0: it does not say."""


def nobody(number: int) -> str | None:
    return None


class Budget:
    """How much of one child's output is logged."""

    def __init__(self) -> None:
        self._left = float(BUDGET_BYTES)
        self._at = 0.0
        self.dropped_bytes = 0
        self._said_at = float("-inf")

    def refill(self, now: float) -> None:
        self._left = min(self._left + (now - self._at) * BUDGET_BYTES_PER_S, BUDGET_BYTES)
        self._at = now

    @property
    def spent(self) -> bool:
        return self._left <= 0

    def spend(self, size: int) -> None:
        self._left -= size + LINE_BYTES

    def say_dropped(self, id_: str | None, now: float, *, last: bool = False) -> None:
        """Say what was dropped, now and then, and at the end."""
        if self.dropped_bytes and (last or now - self._said_at >= SAY_DROPPED_EVERY_S):
            log.warning("output dropped, there was too much", id=id_, dropped_bytes=self.dropped_bytes)
            self.dropped_bytes, self._said_at = 0, now


class Stream:
    """One of the two pipes. `fd` is not blocking, and closed by whoever made it."""

    def __init__(self, fd: int, name: str, level: int, budget: Budget) -> None:
        self.fd = fd
        self.ended = False  # nobody can write to it any more
        self._name = name
        self._level = level
        self._budget = budget
        self._number = 0
        self._rest = b""  # a line that is not complete
        self._rest_id: str | None = None  # whose that is
        self._skipping = False  # ... to the end of a line that is too long

    def drain(self, whose: Whose, now: float) -> bool:
        """Log what there is. Whether there was anything."""
        self._budget.refill(now)
        if self._rest and whose(self._number) != self._rest_id:
            self.finish()
        found = False
        for _ in range(READS_AT_ONCE):
            try:
                data = os.read(self.fd, READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                self.ended = True
                self.finish()
                break
            found = True
            self._take(data, whose)
        return found

    def finish(self) -> None:
        """Log what is left, though its line is not complete."""
        if self._rest:
            self._text(self._rest, self._rest_id)
            self._rest = b""

    def _take(self, data: bytes, whose: Whose) -> None:
        if self._budget.spent:
            self._drop(data)
            return
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._skipping:
                self._budget.dropped_bytes += len(line)
                self._skipping = False
            else:
                self._line(line, whose)
        if self._skipping:
            self._budget.dropped_bytes += len(rest)
        elif len(rest) > MAX_LINE_BYTES:
            self._line(rest, whose)
            self._skipping = True
        self._rest = b"" if self._skipping else rest
        if self._rest:
            self._rest_id = whose(self._number)

    def _drop(self, data: bytes) -> None:
        self._budget.dropped_bytes += len(self._rest) + len(data)
        self._rest, self._skipping = b"", not data.endswith(b"\n")
        for mark in _MARKS.finditer(data):
            self._number = int(mark[1])

    def _line(self, line: bytes, whose: Whose) -> None:
        mark = _MARK_AT_END.search(line)  # tasks may print this character for a purpose of their own
        text = line if mark is None else line[: mark.start()]
        if text:
            self._text(text, whose(self._number))
        if mark is not None:
            self._number = int(mark[1])

    def _text(self, text: bytes, id_: str | None) -> None:
        size = min(len(text), MAX_LINE_BYTES)
        self._budget.dropped_bytes += len(text) - size
        if self._budget.spent:
            self._budget.dropped_bytes += size
        else:
            self._budget.spend(size)
            self._log(text[:size], id_)

    def _log(self, line: bytes, id_: str | None) -> None:
        level, details = self._level, {"stream": self._name}
        if line.startswith(LOG_MARK):
            head, mark, text = line[1:].partition(LOG_MARK)
            number, _, name = head.decode("utf-8", "backslashreplace").partition(" ")
            if mark and number.isascii() and number.isdigit() and len(number) <= 2:
                level, details, line = int(number), {"source": name}, text
        text_ = line.replace(LINE_BREAK, b"\n").decode("utf-8", "backslashreplace")
        log.log(_known_level(level), "task output", id=id_, text=text_, **details)


def _known_level(level: int) -> int:
    """Rounded down to one that has a name."""
    return max(min(level // 10 * 10, logging.CRITICAL), logging.DEBUG)
