"""Opening SQLite files the one way taskd opens them. The only place that sets pragmas."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw
import outcome

from taskd.errors import StartupError, StoreError
from taskd.groupcommit import Write

BUSY_TIMEOUT_MS = 5_000  # readers outside (an operator's sqlite3) may hold the file for a moment
PROGRESS_STEPS = 1_000  # pages or rows between two questions whether to go on
MAX_IDLE_WAL_BYTES = 64 * 1024 * 1024  # a write-ahead log that grew beyond is cut back at its checkpoint
# What is beyond is in the system's cache of files. A commit that has rebalanced a tree walks through all of
# it: with 64 MB a drain took a tenth more CPU, and inserts beside 600,000 rows no less.
CACHE_KIB = 16 * 1024
SQLITE_VERSION = apsw.sqlite_lib_version()


def open_database(path: Path) -> apsw.Connection:
    """Open or create `path` in WAL mode with `synchronous=FULL`: what is committed survives a power cut.

    Raises StartupError (exit 73) when the folder or file cannot be written.
    """
    db: apsw.Connection | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = apsw.Connection(str(path))
        db.set_busy_timeout(BUSY_TIMEOUT_MS)
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only takes effect on a new file
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {MAX_IDLE_WAL_BYTES}")
        db.execute(f"PRAGMA cache_size = {-CACHE_KIB}")  # negative: not a number of pages
        db.execute("PRAGMA temp_store = MEMORY")
    except (OSError, apsw.Error) as error:
        if db is not None:
            db.close()
        raise StartupError(
            f"cannot open the database {path}: {error}. "
            f"Give a folder that user {os.getuid()} may write, or stop the process that holds the file.",
            exit_code=73,
        ) from error
    return db


@contextmanager
def open_for_reading(path: Path) -> Iterator[apsw.Connection]:
    """A second connection to a database in use, for one look that must not hold up its writer.

    Raises StoreError when the file cannot be read.
    """
    try:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            db.set_busy_timeout(BUSY_TIMEOUT_MS)
            yield db
        finally:
            db.close()
    except apsw.Error as error:
        raise StoreError(f"{type(error).__name__}: {error}") from error


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
            f"cannot write in {path.parent}: {error.strerror}. "
            f"Give a folder that user {os.getuid()} may write.",
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


def apply_in_one_transaction(
    db: apsw.Connection, writes: Sequence[Write], *, before_commit: Callable[[], object] = lambda: None
) -> list[outcome.Outcome[object]]:
    """Run `writes` in one transaction: one that raises undoes only itself.

    `before_commit` runs behind the last of them, unless the only one failed; if it raises, so does this, and
    nothing was applied. Raises StoreError when the transaction as a whole could not commit; then nothing was
    applied. A single write's SQLite error is its outcome, as a StoreError.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        try:
            if len(writes) == 1:  # alone, it is undone with the transaction: it needs no savepoint
                results = [_caught(db, writes[0])]
                if isinstance(results[0], outcome.Error):
                    db.execute("ROLLBACK")
                    return results
            else:
                results = [_in_savepoint(db, write) for write in writes]
            before_commit()
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
    except apsw.Error as error:
        raise _own(error) from error
    return results


def _in_savepoint(db: apsw.Connection, write: Write) -> outcome.Outcome[object]:
    db.execute("SAVEPOINT write")
    result = _caught(db, write)
    if isinstance(result, outcome.Error):
        db.execute("ROLLBACK TO write")
    db.execute("RELEASE write")
    return result


def _caught(db: apsw.Connection, write: Write) -> outcome.Outcome[object]:
    try:
        return outcome.Value(write())
    except Exception as error:
        if not db.in_transaction:  # a full disk or an I/O error rolls everything back by itself
            raise
        if isinstance(error, apsw.Error):
            own = _own(error)
            own.__cause__ = error
            return outcome.Error(own)
        return outcome.Error(error)


def copy_database(source: Path, target: Path) -> None:
    """Copy a database, also one in use, as it is at one moment; its writer is not held up.

    `target` is one file without side files, on the disk when this returns. Raises StartupError (exit 73).
    """
    try:
        with open_for_reading(source) as reading:
            writing = apsw.Connection(str(target))
            try:
                with writing.backup("main", reading, "main") as copying:
                    while not copying.done:
                        copying.step(-1)  # all at once: in slices a busy writer would restart it for ever
                writing.execute("PRAGMA journal_mode = DELETE").fetchall()
            finally:
                writing.close()
        _to_disk(target)
        _to_disk(target.parent)
    except (OSError, apsw.Error) as error:
        raise StartupError(
            f"cannot copy {source} to {target}: {error}. Give a folder with enough room that user "
            f"{os.getuid()} may write, and a source that is sound.",
            exit_code=73,
        ) from error


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(path: Path, *, full: bool, give_up: Callable[[], bool] = lambda: False) -> str | None:
    """What is wrong with the database at `path`, in a few words; empty when it is sound, or not there.

    `full` compares indexes with their tables too; either way it reads the whole file, which may be in use.
    None: `give_up`, which is asked all the time, ended it before the end. Raises StartupError when the file
    cannot be opened at all.
    """
    if not path.exists() or path.stat().st_size == 0:
        return ""
    try:
        # Read only: closing it must not bring changes into a file that may be damaged.
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            db.set_busy_timeout(BUSY_TIMEOUT_MS)
            db.set_progress_handler(give_up, PROGRESS_STEPS)
            (found,) = db.execute(f"PRAGMA {'integrity_check' if full else 'quick_check'}(1)").fetchall()
        finally:
            db.close()
    except apsw.InterruptError:
        return None
    except (apsw.CorruptError, apsw.NotADBError) as error:
        return str(error)
    except apsw.Error as error:
        raise StartupError(f"cannot check the database {path}: {error}.", exit_code=73) from error
    return "" if found == ("ok",) else str(found[0])


def is_damage(error: StoreError) -> bool:
    """Whether SQLite met something in the file that cannot be right."""
    return isinstance(error.__cause__, (apsw.CorruptError, apsw.NotADBError))


def disk_trouble(error: StoreError) -> str:
    """In words, when it was the disk that failed and not a statement; else nothing."""
    cause = error.__cause__
    if isinstance(cause, apsw.FullError):
        return "the disk is full"
    if isinstance(cause, (apsw.IOError, apsw.CantOpenError, apsw.ReadOnlyError)):
        return f"the disk fails: {cause}"
    if is_damage(error):
        return f"the file is damaged: {cause}"
    return ""


def wal_bytes(path: Path) -> int:
    """Size of the write-ahead log beside `path`; 0 when there is none."""
    try:
        return Path(f"{path}-wal").stat().st_size
    except OSError:
        return 0


def free_bytes(path: Path) -> int:
    """Room on the disk that `path` is on."""
    disk = os.statvfs(path.parent)
    return disk.f_bavail * disk.f_frsize


def cut_wal(db: apsw.Connection) -> bool:
    """Bring the write-ahead log into the file and empty it, unless a reader outside still needs it."""
    db.set_busy_timeout(0)  # it is the writer who asks: all others wait behind it
    try:
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.Error:  # busy, or the disk fails; then the next write tells
        return False
    finally:
        db.set_busy_timeout(BUSY_TIMEOUT_MS)
    return True


def _own(error: apsw.Error) -> StoreError:
    return StoreError(f"{type(error).__name__}: {error}")
