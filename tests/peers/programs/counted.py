"""What every Python contender's task does: add one to a number in memory that the benchmark reads.

Each thread of each process has a number of its own, in a file of eight bytes that is mapped into memory, so
counting costs all contenders the same and takes no lock and no system call.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading


class _Cell(threading.local):
    def __init__(self) -> None:
        descriptor, _ = tempfile.mkstemp(dir=os.environ["PEERS_COUNTERS"])
        os.ftruncate(descriptor, 8)
        self.number = memoryview(mmap.mmap(descriptor, 8)).cast("Q")
        os.close(descriptor)


_cell: _Cell | None = None


def _forget() -> None:
    """A forked child would go on with the number of its parent."""
    global _cell
    _cell = None


os.register_at_fork(after_in_child=_forget)


def count() -> None:
    global _cell
    if _cell is None:
        _cell = _Cell()
    _cell.number[0] += 1
