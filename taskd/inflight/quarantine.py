"""A damaged store is set aside under another name, and a fresh one begins; nothing is ever deleted."""

from __future__ import annotations

import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import structlog

from taskd.clock import Now, monotonic_s
from taskd.database import damage
from taskd.errors import StartupError

MARK = ".damaged-"
FOUND = ".found-damaged"  # added to the store's name: what was found in it while it was in use
SIDE_FILES = ("-wal", "-shm", "")  # the file itself last: a new one must never meet an old log of changes

log = structlog.get_logger("taskd.inflight")


Check = Literal["quick", "full", "off"]


class Checked(NamedTuple):
    """`aside`: where the damaged store lies now. `complete`: everything was looked at that should be."""

    aside: Path | None = None
    complete: bool = True


def set_aside_if_damaged(path: Path, check: Check, now: Now, *, within_s: float = math.inf) -> Checked:
    """Look for damage before the store at `path` is opened, for so long at most, and set a damaged one aside.

    One that was found damaged while it was in use is set aside at once, also without a check.
    Raises StartupError (exit 73) when it cannot be checked or renamed.
    """
    found: str | None = _found_in_use(path)
    if not found and check != "off" and within_s <= 0:
        return Checked(complete=not path.exists())
    if not found and check != "off":
        until_s = monotonic_s() + within_s
        found = damage(path, full=check == "full", give_up=lambda: monotonic_s() >= until_s)
    if not found:
        return Checked(complete=found is not None)
    aside = set_aside(path, MARK, now)
    Path(f"{path}{FOUND}").unlink(missing_ok=True)
    log.critical(
        "the store is damaged and was set aside; the broker begins with an empty one. What was in flight is "
        "not lost yet: stop the broker and run `taskd recover`, which takes what can be read from that file "
        "and reads the log again from where you say",
        file=str(aside),
        damage=found,
        next="taskd recover --config FILE --from-time 2h",
    )
    return Checked(aside)


def set_aside_at_next_start(path: Path, found: str) -> None:
    """Remember that the store at `path`, which is in use, is damaged. Raises OSError."""
    Path(f"{path}{FOUND}").write_text(f"{path.stat().st_ino} {found}")


def _found_in_use(path: Path) -> str:
    """What was found in this very file, which may have been replaced since; nothing when there is no mark."""
    try:
        number, _, found = Path(f"{path}{FOUND}").read_text().partition(" ")
        return found if number == str(path.stat().st_ino) else ""
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StartupError(f"cannot read {path}{FOUND}: {error.strerror}.", exit_code=73) from error


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
