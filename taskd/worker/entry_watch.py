"""Inside a child that runs one task at a time: what interrupts it - its deadline, and its worker's orders.

Both come as signals, so that they also reach a task that waits in a system call. SIGALRM is the child's
own timer. SIGTERM makes the child look for orders; one that came from somebody else finds none and is
without effect. An interruption is an exception raised in the task, once at most: what a task makes of it
is its own affair, and the worker has harder means for those that make nothing of it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed knows the public module only
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import taskd.worker.entry_pipe as pipe
from taskd.activation.retry import ProcessingDeadlineExceeded, TaskCancelled
from taskd.tasks.heartbeats import Heartbeats

EXIT_ORDERED = 143  # as if SIGTERM had ended it, which in a way it did
ORDERS_AT_ONCE = 64
Tell = Callable[[pipe.Heartbeat], None]

_getsignal: Callable[[int], Any] = _signal.getsignal  # the public one takes ten times as long to name it
_monotonic = time.monotonic
_NEVER = float("inf")


class Supervised:
    """One run of one task: implements `taskd.tasks.current.Supervisor`. Its watch makes it."""

    __slots__ = ("_beats", "_deadline_s", "_most", "_watch", "cancelled", "deadline", "number", "overdue")

    def __init__(
        self, watch: Watch, number: int, begun_s: float, deadline_s: float, max_deadline_s: float | None
    ) -> None:
        self.number = number
        self.overdue = False  # its deadline interrupted it
        self.cancelled = False
        self._most = _NEVER if max_deadline_s is None else begun_s + max(max_deadline_s, deadline_s)
        self.deadline = begun_s + deadline_s
        self._deadline_s = deadline_s
        self._watch = watch
        self._beats: Heartbeats | None = None

    def heartbeat(self, progress: float | None, message: str) -> None:
        if self._watch.is_copy:
            return  # nobody watches a copy, and its pipes' numbers may be those of other files by now
        if self._beats is None:
            self._beats = Heartbeats(self._send)
        self._beats.beat(progress, message)

    def is_cancelled(self) -> bool:
        return self.cancelled

    def remaining_s(self) -> float:
        return self.deadline - _monotonic()

    def close(self) -> None:
        """The task ended: nothing is said in its name any more."""
        if self._beats is not None:
            self._beats.close()

    def _send(self, progress: float | None, message: str) -> None:
        if self.overdue or self.cancelled:
            return  # it is to end, whatever it makes of that
        self.deadline = min(_monotonic() + self._deadline_s, self._most)
        self._watch.tell(pipe.Heartbeat(self.number, progress, message))


class Watch:
    """`orders`: the end of the pipe that orders come through. `tell`: writes a heartbeat at once.

    Between `open` and `shut` one exception at most comes out of any line of the main thread. Whoever
    calls them catches it around both.
    """

    def __init__(self, orders: int, tell: Tell) -> None:
        os.set_blocking(orders, False)
        self._orders = orders
        self._tell = tell
        self._main = threading.get_ident()
        self._number = 0  # of the task that runs; 0: none
        self._task: Supervised | None = None  # ... while it may be interrupted
        self._held = False
        self._cancelled = 0  # the number of the task that is to be cancelled
        self.is_copy = False
        self._pending: BaseException | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], None]] = {
            int(signal.SIGALRM): self._on_alarm,
            int(signal.SIGTERM): self._on_order,
            int(signal.SIGINT): self._on_nothing,  # a terminal's, or a group's: not for a child
        }

    def install(self) -> None:
        # Handlers rather than SIG_IGN: programs that a task starts would inherit the latter.
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def mend(self) -> None:
        """Take back the signals that a task took over, so that the next one can be interrupted again."""
        for number, handler in self._handlers.items():
            if _getsignal(number) is not handler:
                signal.signal(number, handler)

    def forget(self) -> None:
        """This process is a copy that a task forked: signals end it, as they end any process."""
        self._task, self._number = None, 0
        self.is_copy = True
        for number in self._handlers:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # ---- around one task

    def supervise(self, number: int, work: pipe.Work, begun_s: float) -> Supervised:
        """`begun_s`: of the monotonic clock."""
        return Supervised(self, number, begun_s, work.deadline_s, work.max_deadline_s)

    def open(self, task: Supervised) -> None:
        self._number = task.number
        self._pending = None
        self._task = task  # from here on: a timer that goes off before would be lost
        signal.setitimer(signal.ITIMER_REAL, max(task.remaining_s(), 1e-6))
        self._cancel()

    def shut(self) -> None:
        self._task = None
        self._number = 0

    def tell(self, heartbeat: pipe.Heartbeat) -> None:
        """Write it whole: an interruption waits until it is written."""
        if threading.get_ident() != self._main:
            self._tell(heartbeat)  # signals are handled in the main thread only
            return
        self._held = True
        try:
            self._tell(heartbeat)
        finally:
            self._held = False
        if self._pending is not None:
            self._interrupt(self._pending)

    # ---- signals

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        task = self._task
        if task is None:
            return  # the timer of one that ended meanwhile
        left_s = task.remaining_s()
        if left_s > 0:
            signal.setitimer(signal.ITIMER_REAL, left_s)  # a heartbeat moved the deadline
            return
        task.overdue = True
        self._interrupt(ProcessingDeadlineExceeded("the task ran longer than its processing deadline"))

    def _on_order(self, number: int, frame: FrameType | None) -> None:
        try:
            orders = pipe.decode_orders(os.read(self._orders, ORDERS_AT_ONCE * pipe.ORDER_BYTES))
        except (OSError, pipe.ProtocolViolation):
            return  # none there: somebody else's signal; or a task closed the pipe
        for order in orders:
            if order.kind is pipe.OrderKind.CANCEL:
                self._cancelled = order.number  # it may come before its task may be interrupted
            elif order.number == self._number:
                os._exit(EXIT_ORDERED)
        self._cancel()

    def _cancel(self) -> None:
        task = self._task
        if task is not None and task.number == self._cancelled:
            task.cancelled = True
            self._interrupt(TaskCancelled("the task was cancelled"))

    def _on_nothing(self, number: int, frame: FrameType | None) -> None:
        pass

    def _interrupt(self, error: BaseException) -> None:
        if self._held:
            self._pending = error
        elif self._task is not None:
            self._task = None
            raise error
