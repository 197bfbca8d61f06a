"""Tasks that must be ended, or that end their child; imported by children in tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

from taskd import Retry, TaskNamespace
from taskd.activation.retry import ProcessingDeadlineExceeded, TaskCancelled

tests = TaskNamespace("tests", application="app")


def note(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(f"{text}\n")


@tests.register("sleeps", retry=Retry(times=3, on=(ProcessingDeadlineExceeded,), delay=7))
def sleeps(path: str) -> None:
    try:
        note(path, "begins")
        time.sleep(600)
    except ProcessingDeadlineExceeded:
        note(path, f"overdue in {os.getpid()}")
        raise
    except TaskCancelled:
        note(path, f"cancelled in {os.getpid()}")
        raise


@tests.register("cleans_up_badly")
def cleans_up_badly() -> None:
    try:
        time.sleep(600)
    finally:
        raise ValueError("from the clean-up")


@tests.register("catches_errors")
def catches_errors() -> None:
    while True:
        try:
            time.sleep(600)
        except Exception:
            continue


@tests.register("backtracks")
def backtracks() -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")


@tests.register("counts_in_c")
def counts_in_c() -> None:
    sum(range(10**12))


@tests.register("ignores_signals")
def ignores_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(600)


@tests.register("swallows_everything")
def swallows_everything() -> None:
    while True:
        try:
            time.sleep(600)
        except BaseException:
            continue


@tests.register("takes_the_signals_and_ends")
def takes_the_signals_and_ends() -> None:
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


@tests.register("leaves_a_process")
def leaves_a_process(path: str, detached: bool, how: str) -> None:
    """It holds what it inherits: the pipes to the worker's log."""
    program = "import time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=detached)
    note(path, str(process.pid))
    if how == "exit":
        os._exit(0)
    if how == "overdue":
        time.sleep(600)
    if how == "swallows":
        swallows_everything()


@tests.register("starts_a_careful_process")
def starts_a_careful_process(path: str) -> None:
    """It cleans up when it gets SIGTERM, and takes a moment for it."""
    program = (
        "import os, signal, sys, time\n"
        "def clean_up(*_):\n"
        "    time.sleep(0.3)\n"
        "    open(sys.argv[1], 'a').write('cleaned up')\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, clean_up)\n"
        "open(sys.argv[1], 'a').write(f'{os.getpid()} ')\n"
        "time.sleep(600)\n"
    )
    subprocess.Popen([sys.executable, "-c", program, path])
    swallows_everything()


@tests.register("forks_a_session")
def forks_a_session(path: str) -> None:
    """As a daemon does: its parent is gone, and it has a session of its own."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            note(path, str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    os.wait()
    swallows_everything()


@tests.register("allocates")
def allocates() -> None:
    blocks = []
    while True:
        blocks.append(bytearray(8 * 2**20))


@tests.register("is_killed_from_elsewhere")
def is_killed_from_elsewhere() -> None:
    blocks = bytearray(64 * 2**20)
    blocks[::4096] = b"x" * len(blocks[::4096])
    time.sleep(1.5)  # long enough to be looked at
    os.kill(os.getpid(), signal.SIGKILL)


@tests.register("leaves_as_if_well")
def leaves_as_if_well() -> None:
    os._exit(0)


@tests.register("prints_much")
def prints_much(megabytes: int) -> None:
    line = b"x" * 99 + b"\n"
    for _ in range(megabytes):
        data = memoryview(line * (2**20 // len(line)))
        while data:
            data = data[os.write(1, data) :]


@tests.register("closes_all_and_goes_on")
def closes_all_and_goes_on() -> None:
    os.closerange(0, 4096)
    while True:
        time.sleep(600)


@tests.register("whoami")
def whoami(path: str) -> None:
    note(path, str(os.getpid()))


@tests.register("meets")
def meets(path: str, count: int) -> None:
    """Waits until so many are in here at once."""
    note(path, "")
    while os.path.getsize(path) < count:
        time.sleep(0.01)
