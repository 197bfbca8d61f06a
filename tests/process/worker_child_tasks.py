"""Tasks that do to a child process what tasks of the world do; imported by children in tests."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time

from taskd import Retry, TaskNamespace, current_task, retry_task
from taskd.activation.retry import LastAction, ProcessingDeadlineExceeded

tests = TaskNamespace("tests", application="app")


@tests.register("noop")
def noop() -> None:
    pass


@tests.register("naps")
def naps(seconds: float) -> None:
    time.sleep(seconds)


@tests.register("append")
def append(path: str, line: str) -> None:
    with open(path, "a") as file:
        file.write(f"{line}\n")


@tests.register("blocks_in_c")
def blocks_in_c() -> None:
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock: no Python code can interrupt it


@tests.register("retried_on_timeout", retry=Retry(times=3, on=(ProcessingDeadlineExceeded,), delay=7))
def ignores_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(60)


@tests.register("leaves")
def leaves() -> None:
    os._exit(3)


@tests.register("segfaults")
def segfaults() -> None:
    ctypes.string_at(0)


@tests.register("system_exit")
def system_exit() -> None:
    sys.exit("as if this were a script")


@tests.register("interrupted")
def interrupted() -> None:
    raise KeyboardInterrupt


@tests.register(
    "raises", retry=Retry(times=3, on=(ValueError,), times_exceeded=LastAction.Deadletter, delay=2)
)
def raises(message: str) -> None:
    raise ValueError(message)


@tests.register("asks", retry=Retry(times=2))
def asks() -> None:
    retry_task(delay=11)


@tests.register("unprintable")
def unprintable() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    raise Unprintable


@tests.register("prints")
def prints() -> None:
    print("x" * 200_000)
    os.write(1, b"\xff\x00" * 1000)
    print("y", file=sys.stderr)


@tests.register("logs")
def logs() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("plugin.part").exception("it failed")


@tests.register("closes_everything")
def closes_everything() -> None:
    os.closerange(3, 1024)


@tests.register("writes_junk")
def writes_junk() -> None:
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, False)
            os.write(fd, b"\xff" * 512)
        except OSError:
            continue


@tests.register("starts_a_process")
def starts_a_process(path: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(path, "w") as file:
        file.write(str(process.pid))
    time.sleep(600)


@tests.register("beats_in_a_fork")
def beats_in_a_fork(path: str) -> None:
    """A copy of the child has none of its pipes; what it opens gets their numbers."""
    current = current_task()
    assert current is not None
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            files = [open(path, "a") for _ in range(8)]  # noqa: SIM115
            for _ in range(3):
                current.heartbeat(0.5, "from a copy")
                time.sleep(0.3)
            code = len(files) - 8
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    current.heartbeat(1, "from the child itself")


@tests.register("forks")
def forks() -> None:
    if os.fork() == 0:
        return  # the copy comes back from the task as well, and must not report


@tests.register("attempts", pass_headers=True)
def attempts(path: str, headers: dict[str, str]) -> None:
    task = current_task()
    assert task is not None
    with open(path, "w") as file:
        file.write(f"{task.id} {task.attempts} {task.taskname} {headers['who']}")
