"""One child process, seen from the worker: feed it, hear from it, end it.

`Spawner` and `Child` are the seam that flow tests put a scripted child behind; process.py has the real
thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from taskd.errors import TaskdError
from taskd.worker import entry_pipe as pipe
from taskd.worker.output import Whose


class ChildGone(TaskdError):
    """The child process ended."""


class Piece(NamedTuple):
    """A piece of work. `start_within_s`: from now, or not at all. The rest as in `entry_pipe.Work`."""

    activation: bytes
    start_within_s: float | None = None
    fence: int = 0
    deadline_s: float = 10.0
    max_deadline_s: float | None = None


class Child(Protocol):
    """One child that said it is ready. Use it from one Trio run; `flush` and `receive` from two tasks."""

    pid: int
    ready: pipe.Ready
    rss_bytes: int  # the memory it had when it was last looked at; 0: not known
    whose: Whose  # set it to have what tasks print logged with the ids of their activations

    def give(self, work: Sequence[Piece]) -> bool:
        """Write pieces of work. False: not all was taken at once; `flush` it before giving more.

        They are numbered from 1 in the order given. A child that ended takes them silently: `receive`
        is who tells.
        """
        ...

    async def flush(self) -> None:
        """Write what is left of what was given. Cancelled, it leaves the child unusable."""
        ...

    async def receive(self) -> list[pipe.Report]:
        """Whatever was reported, at least one. Meanwhile what tasks print is logged.

        The start of a task that is over soon may be left out: its end says enough. Of any other it is told
        within some milliseconds, and before anything else that its task reports.
        Raises ChildGone once the process ended and all it wrote was returned, ProtocolViolation
        when something else than reports was written. Cancelling loses nothing.
        """
        ...

    def take_back(self) -> int:
        """Take back what the child has not begun to look at: that many of the pieces sent last."""
        ...

    def dismiss(self, *, alone: bool = False) -> None:
        """No more work will come: the child exits when it has done what it has.

        `alone`: nothing that it started may stay, also what left its process group to live on.
        """
        ...

    def look(self) -> None:
        """See how much memory it has now. Receiving reports does so too."""
        ...

    def has_started(self) -> bool:
        """Whether processes live that the child started."""
        ...

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        """Have the child see to the task with this number; without effect when it is at another one."""
        ...

    def terminate(self, number: int) -> None:
        """Have the child leave if it is at this task, and whatever it started end as by SIGTERM.

        For a child that has nothing else to begin: those processes get the signal in any case. It prints
        where it was.
        """
        ...

    def kill(self) -> None:
        """End the child and its process group at once; whatever else it started, when it is closed."""
        ...


class Spawner(Protocol):
    def open(self) -> AbstractAsyncContextManager[Child]:
        """A child, ready. Leaving the block ends it.

        Raises StartupError: it could not start, or did not say that it is ready.
        """
        ...
