"""Listening on a Unix socket: for callers of this machine that the file's mode lets in, and nobody else."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from taskd.errors import StartupError

PREFIX = "unix:"  # of such an address
MODE = 0o600
MAX_PATH_BYTES = 103  # what every system takes
BACKLOG = 16
EX_CANTCREAT, EX_TEMPFAIL = 73, 75


@contextmanager
def open_unix_listener(path: Path) -> Iterator[trio.SocketListener]:
    """Listen at `path`, which only its owner may open; removed when the block ends.

    A socket that nobody listens on any more is replaced; anything else in its place is left alone.
    Raises StartupError.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise StartupError(
            f"the path of the socket {path} is too long: at most {MAX_PATH_BYTES} bytes; set admin.socket",
            exit_code=EX_CANTCREAT,
        )
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            listening.bind(str(path))
            mine = path.lstat()
            # Nobody can connect before it listens, so nobody slips in before the mode holds.
            path.chmod(MODE)
            listening.listen(BACKLOG)
        except OSError as error:
            raise _cannot_listen(path, error) from error
        try:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        finally:
            with suppress(OSError):
                if _same_file(path.lstat(), mine):
                    path.unlink()


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except OSError:
        return  # nothing there; whatever else is wrong, listening tells
    if not stat.S_ISSOCK(found.st_mode):
        raise StartupError(
            f"{path} is to be a socket and is something else; move it away, or set admin.socket",
            exit_code=EX_CANTCREAT,
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # somebody listens, and is busy
        except OSError as error:
            raise _cannot_listen(path, error) from error
    raise StartupError(
        f"another process listens on {path}; stop it, or set admin.socket", exit_code=EX_TEMPFAIL
    )


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _cannot_listen(path: Path, error: OSError) -> StartupError:
    held = error.errno == errno.EADDRINUSE
    return StartupError(
        f"cannot listen on {path}: {error.strerror}; admin.socket must be in a folder that "
        f"user {os.getuid()} may write",
        exit_code=EX_TEMPFAIL if held else EX_CANTCREAT,
    )
