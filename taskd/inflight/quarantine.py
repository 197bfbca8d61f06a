"""A damaged store is set aside under another name, and a fresh one begins; nothing is ever deleted."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import structlog

from taskd.clock import Now
from taskd.database import damage
from taskd.errors import StartupError

MARK = ".damaged-"
SIDE_FILES = ("-wal", "-shm", "")  # the file itself last: a new one must never meet an old log of changes

log = structlog.get_logger("taskd.inflight")


def set_aside_if_damaged(path: Path, check: Literal["quick", "full", "off"], now: Now) -> Path | None:
    """Look for damage before the store at `path` is opened; returns where a damaged one lies now.

    Raises StartupError (exit 73) when it cannot be checked or renamed.
    """
    if check == "off":
        return None
    found = damage(path, full=check == "full")
    if not found:
        return None
    aside = set_aside(path, MARK, now)
    log.critical(
        "the store is damaged and was set aside; the broker begins with an empty one. What was in flight is "
        "not lost yet: stop the broker and run `taskd recover`, which takes what can be read from that file "
        "and reads the log again from where you say",
        file=str(aside),
        damage=found,
        next="taskd recover --config FILE --from-time 2h",
    )
    return aside


def set_aside(path: Path, mark: str, now: Now) -> Path:
    """Rename a store and its side files; the time is part of the name. Returns the new name."""
    stamp = datetime.fromtimestamp(now.wall_ms / 1000, UTC).strftime("%Y%m%dT%H%M%S")
    aside = path.with_name(f"{path.name}{mark}{stamp}.{now.wall_ms % 1000:03d}")
    try:
        for side in SIDE_FILES:
            if os.path.exists(f"{path}{side}"):
                os.rename(f"{path}{side}", f"{aside}{side}")
    except OSError as error:
        raise StartupError(
            f"cannot rename {path} to {aside}: {error.strerror}. "
            f"Give a folder that user {os.getuid()} may write.",
            exit_code=73,
        ) from error
    return aside


def found_aside(path: Path) -> list[Path]:
    """Damaged files of this store that were set aside, newest first."""
    names = path.parent.glob(f"{path.name}{MARK}*")
    return sorted((name for name in names if not name.name.endswith(("-wal", "-shm"))), reverse=True)
