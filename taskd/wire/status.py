"""How a run ended, as results say it. Of the stream children need to know no more, so they load no more."""

from __future__ import annotations

from enum import IntEnum


class ResultStatus(IntEnum):
    UNSPECIFIED = 0
    COMPLETE = 1
    FAILURE = 2
    RETRY = 3
    CRASHED = 4
    INTERRUPTED = 5  # by no fault of its own: the attempt does not count
