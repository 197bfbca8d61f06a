"""Opening SQLite files the one way taskd opens them. The only place that sets pragmas."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw
import outcome

from taskd.errors import StartupError, StoreError
from taskd.groupcommit import Write

BUSY_TIMEOUT_MS = 5_000  # readers outside (an operator's sqlite3) may hold the file for a moment


def open_database(path: Path) -> apsw.Connection:
    """Open or create `path` in WAL mode with `synchronous=FULL`: what is committed survives a power cut.

    Raises StartupError (exit 73) when the folder or file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = apsw.Connection(str(path))
        db.set_busy_timeout(BUSY_TIMEOUT_MS)
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only takes effect on a new file
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA cache_size = -65536")  # KiB, negative by SQLite's convention
        db.execute("PRAGMA temp_store = MEMORY")
    except (OSError, apsw.Error) as error:
        raise StartupError(
            f"cannot open the database {path}: {error}. "
            f"Give a folder that user {os.getuid()} may write, or stop the process that holds the file.",
            exit_code=73,
        ) from error
    return db


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` while the block lasts; the file names the holder's pid.

    Raises StartupError: exit 75 when another process holds it, 73 when the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StartupError(
            f"cannot write in {path.parent}: {error.strerror}. Give a folder that user {os.getuid()} may write.",
            exit_code=73,
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StartupError(
                f"{path.parent} belongs to another running broker (process {holder}). "
                "Stop it, or give this one a data_dir of its own.",
                exit_code=75,
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def apply_in_one_transaction(db: apsw.Connection, writes: Sequence[Write]) -> list[outcome.Outcome[object]]:
    """Run `writes` in one transaction, each in a savepoint: one that raises undoes only itself.

    Raises StoreError when the transaction as a whole could not commit; then nothing was applied.
    """
    results: list[outcome.Outcome[object]] = []
    try:
        db.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                results.append(_in_savepoint(db, write))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
    except apsw.Error as error:
        raise StoreError(f"{type(error).__name__}: {error}") from error
    return results


def _in_savepoint(db: apsw.Connection, write: Write) -> outcome.Outcome[object]:
    db.execute("SAVEPOINT write")
    try:
        result = write()
    except Exception as error:
        if not db.in_transaction:  # a full disk or an I/O error rolls everything back by itself
            raise
        db.execute("ROLLBACK TO write")
        db.execute("RELEASE write")
        return outcome.Error(error)
    db.execute("RELEASE write")
    return outcome.Value(result)
