"""One run of one contender: its tasks wait, its workers start, and their counters are read from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from contenders import Contender, Place

PROGRAMS = Path(__file__).with_name("programs")
LOOK_EVERY_S = 0.01
STANDSTILL_S = 60.0
STOP_WITHIN_S = 10.0
END_OF_LOG = 15  # lines shown when something failed


class Failed(Exception):
    """A run came to no result; the message says why."""


@dataclass(frozen=True)
class Run:
    """`count` tasks ran; between the looks that saw the first and the last, `counted` ran in `seconds`."""

    count: int
    counted: int
    seconds: float

    @property
    def per_s(self) -> float:
        return self.counted / max(self.seconds, LOOK_EVERY_S)


def run(contender: Contender, place: Place, count: int, say: Callable[[str], None]) -> Run:
    """Everything that it starts is ended, however it ends. Raises Failed."""
    environ = environment(contender, place)
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        if contender.server is not None:
            server = stack.enter_context(started(place.fill(contender.server), place, environ, "server"))
            _until_ready(place, server)
            processes.append(server)
        say("enqueueing")
        with started([*place.fill(contender.enqueue), str(count)], place, environ, "enqueue") as process:
            if process.wait():
                raise Failed(f"{contender.name} could not enqueue:\n{_end_of_log(place.folder, 'enqueue')}")
        say("running")
        for number, command in enumerate(contender.workers):
            worker = stack.enter_context(started(place.fill(command), place, environ, f"worker-{number}"))
            processes.append(worker)
        result = watch(place, count, processes)
    total = counted(place.counters)
    if total != count:
        raise Failed(f"{contender.name} ran {total} tasks; {count} were enqueued")
    return result


def environment(contender: Contender, place: Place) -> dict[str, str]:
    """Ours, without what configures taskd or Python, and with what the contender needs."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TASKD_", "PYTHON"))}
    return kept | {"PYTHONPATH": str(PROGRAMS), "NO_PROXY": "*"} | place.environment | contender.variables


def watch(place: Place, count: int, processes: list[subprocess.Popen[bytes]]) -> Run:
    """Look every 10 ms until all have run. Raises Failed at a standstill, or when a process ended."""
    first = last = 0
    first_s = 0.0
    moved_s = time.monotonic()
    while True:
        now, now_s = counted(place.counters), time.monotonic()
        if now != last:
            if not last:
                first, first_s = now, now_s
            last, moved_s = now, now_s
        if last >= count:
            return Run(count, last - first, moved_s - first_s)
        if any(process.poll() is not None for process in processes):
            raise Failed(f"a process ended when {last} of {count} had run:\n{_end_of_log(place.folder)}")
        if now_s - moved_s > STANDSTILL_S:
            said = _end_of_log(place.folder)
            raise Failed(f"{last} of {count} ran, and none more for {STANDSTILL_S:.0f} s:\n{said}")
        time.sleep(LOOK_EVERY_S)


def counted(folder: Path) -> int:
    """The sum of all counters; one that was only just created is still empty."""
    return sum(int.from_bytes(path.read_bytes(), sys.byteorder) for path in folder.iterdir())


@contextmanager
def started(
    command: list[str], place: Place, environ: Mapping[str, str], name: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, as do those that it has started."""
    with (place.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=place.folder,
            env=dict(environ),
            start_new_session=True,  # Ctrl-C is for the benchmark, which then stops them in their order
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_WITHIN_S)
    # Its own children may tidy up after it, such as the one that removes its semaphores.
    give_up_s = time.monotonic() + STOP_WITHIN_S
    with suppress(ProcessLookupError):
        while time.monotonic() < give_up_s:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(LOOK_EVERY_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _until_ready(place: Place, server: subprocess.Popen[bytes]) -> None:
    """Until it listens for HTTP, which taskd does when everything else listens."""
    give_up_s = time.monotonic() + STANDSTILL_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", place.http_port), timeout=1).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > give_up_s:
                raise Failed(f"the server did not come up:\n{_end_of_log(place.folder, 'server')}") from None
            time.sleep(0.02)
        else:
            return


def _end_of_log(folder: Path, name: str = "*") -> str:
    lines: list[str] = []
    for path in sorted(folder.glob(f"{name}.log")):
        lines += [
            f"  {path.stem}: {line}" for line in path.read_text(errors="replace").splitlines()[-END_OF_LOG:]
        ]
    return "\n".join(lines) or "  (it said nothing)"
