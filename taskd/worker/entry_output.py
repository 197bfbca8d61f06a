"""Standard output and error inside a child: pipes to its worker, marked with the task that prints.

Marks are for what Python prints and logs. What a library or another program writes to the descriptors
has none; the worker then goes by what runs at that moment.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from taskd.worker.entry_pipe import LINE_BREAK, LOG_MARK, NUMBER_MARK, WHERE_SIGNAL

Number = Callable[[], int]
_LOG_MARK, _LINE_BREAK = LOG_MARK.decode(), LINE_BREAK.decode()


def install(number: Number) -> None:
    """Mark what is printed with `number()`, that of the running task, and log to standard error.

    A plugin that wants its logs otherwise configures logging when it is imported.
    """
    sys.stdout, sys.stderr = _open(1, number), _open(2, number)
    faulthandler.enable(sys.stderr)  # a crash says where it was
    faulthandler.register(WHERE_SIGNAL, sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _open(fd: int, number: Number) -> io.TextIOWrapper:
    # By the line, so that it is not lost when the child crashes.
    raw = io.BufferedWriter(_Marking(fd, number))
    return io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)


class _Marking(io.FileIO):
    def __init__(self, fd: int, number: Number) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._number = number
        self._marked = 0

    def write(self, data: Any, /) -> int:
        number = self._number()
        if number != self._marked:
            os.write(self.fileno(), b"%b%d\n" % (NUMBER_MARK, number))
            self._marked = number
        return super().write(data)


class _OneLine(logging.Formatter):
    """The whole record in one line, with its level and logger in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", _LINE_BREAK)
        return f"{_LOG_MARK}{record.levelno} {record.name}{_LOG_MARK}{text}"
