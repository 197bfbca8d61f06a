"""The tasks that benchmarks run; a benchmark's worker imports them besides the installed plugins."""

from __future__ import annotations

import socket

from taskd.clock import monotonic_s
from taskd.tasks.namespace import TaskNamespace

bench = TaskNamespace("taskd-bench", processing_deadline_duration=30)


@bench.register(name="noop")
def noop(payload: bytes = b"") -> None:
    """Does nothing."""


@bench.register(name="tell")
def tell(port: int, number: int) -> None:
    """Tells the benchmark, which listens on a port of this machine, when it began."""
    began_s = monotonic_s()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth:
        mouth.sendto(f"{number} {began_s!r}".encode(), ("127.0.0.1", port))
