"""What a figure was measured on: without it a figure says nothing."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from taskd import __version__
from taskd.clock import monotonic_s
from taskd.database import SQLITE_VERSION

FSYNC_ROUNDS = 50
PAGE_BYTES = 4_096


def describe(folder: Path) -> dict[str, Any]:
    """This machine, what runs on it, and how long its disk takes to make a page durable in `folder`."""
    return {
        "taskd": __version__,
        "python": platform.python_version(),
        "sqlite": SQLITE_VERSION,
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "fsync_ms": round(fsync_ms(folder), 2),
        "executable": Path(sys.executable).name,
    }


def sentence(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpus']} CPUs ({machine['processor']}), {machine['system']}, Python {machine['python']}, "
        f"SQLite {machine['sqlite']}, fsync {machine['fsync_ms']} ms, load {machine['load']} at the start"
    )


def fsync_ms(folder: Path) -> float:
    """The median time of appending one page to a file and making it durable."""
    times: list[float] = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(FSYNC_ROUNDS):
            file.write(b"x" * PAGE_BYTES)
            file.flush()
            began_s = monotonic_s()
            os.fdatasync(file.fileno())
            times.append(monotonic_s() - began_s)
    return statistics.median(times) * 1000


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
