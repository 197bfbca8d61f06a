"""Signals that ask a daemon to stop before it can: they are kept until it runs, and then it stops.

Python's own answer would be an exit code of failure, for a daemon that was asked to stop while it
imported its libraries. This module imports nothing that is slow.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

DAEMONS = ("broker", "worker", "dev")
ENOUGH = 3  # as in taskd.signals: the third ends what holds up the first two

_kept: list[int] = []


def keep_signals() -> None:
    """From now on SIGINT and SIGTERM are kept, until `taskd.signals.stop_on_signals` takes them over.

    And children can be waited for, whatever was inherited.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _keep)
    # Who started us may ignore this one, which is inherited: then the system tells nobody how children end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def kept_signals() -> tuple[int, ...]:
    """Those that came so far, oldest first."""
    return tuple(_kept)


def _keep(number: int, _: FrameType | None) -> None:
    _kept.append(number)
    if len(_kept) >= ENOUGH:
        os._exit(128 + number)
