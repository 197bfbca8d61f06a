"""The processes that a child process started, and those started in turn, wherever they went.

Two ways lead to them. While the child lives, the system names the children of every process. And each
child process carries a mark in its environment that is inherited: so those are found as well whose
parents are gone, or that left the child's process group to live on. What cleans its environment and also
leaves its parent is out of reach.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress

MARK = "TASKD_CHILD"  # the variable of the environment
ROUNDS = 5  # who forks faster than it can be killed is looked for again, so many times
MAX_ENVIRON_BYTES = 262_144


def of(pid: int) -> list[int]:
    """The processes that live below this one, by who started whom."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for child in _children(waiting.pop()):
            found.append(child)
            waiting.append(child)
    return found


def marked(mark: str) -> list[int]:
    """The processes that carry this mark. Takes some 20 us for each process of the machine."""
    return living(_all(), mark)


def living(pids: Iterable[int], mark: str) -> list[int]:
    """Those of them that still carry this mark: the others ended."""
    wanted = f"{MARK}={mark}\0".encode()
    return [pid for pid in pids if wanted in _environ(pid)]


def kill(mark: str) -> int:
    """Send SIGKILL to all that carry this mark, until there are none. Returns how many were met."""
    met: set[int] = set()
    for _ in range(ROUNDS):
        living = [pid for pid in marked(mark) if _kill(pid, mark)]
        if not living:
            break
        met.update(living)
    return len(met)


def _kill(pid: int, mark: str) -> bool:
    """Kill the process if it still is who it was: its number may have been given away meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if f"{MARK}={mark}\0".encode() not in _environ(pid):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(pidfd)


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environ(pid: int) -> bytes:
    """As it was when the program began; nothing for a process that is gone, or not ours."""
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            return file.read(MAX_ENVIRON_BYTES) + b"\0"
    except OSError:
        return b""


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                found += map(int, file.read().split())
    return found
