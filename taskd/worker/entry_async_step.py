"""Inside an async child: which activation the loop is at, known to the worker though nothing runs here.

A loop is blocked by one task, and everything else in it waits. The number of the activation whose code runs
is kept in memory that the worker shares, with a count of all steps: when that stands still, the number says
who is to blame, also when that one holds the interpreter's lock or the process is dead.

Orders are read here too, because a blocked loop cannot: then the signal that comes with an order interrupts
the task that blocks it, if it is Python that runs, and the other tasks go on.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Protocol

import trio

import taskd.worker.entry_pipe as pipe

BLOCKED_AFTER_S = 0.5  # a step that takes longer can be interrupted by an order, others are left to the loop
ORDERS_AT_ONCE = 64
EXIT_ORDERED = 143  # as if SIGTERM had ended it, which in a way it did

activation_number: ContextVar[int] = ContextVar("taskd.activation_number", default=0)
_monotonic = time.monotonic


class LoopBlocked(BaseException):
    """The task kept the loop from all other tasks for too long: it called something that is not async.

    Not an Exception, so that an `except Exception` of the task does not swallow the order to stop.
    """


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Stepping(trio.abc.Instrument):
    """`memory`: a descriptor of shared memory. `orders`: one of the pipe of orders."""

    def __init__(self, memory: int, orders: int) -> None:
        self._step = memoryview(mmap.mmap(memory, pipe.STEP_BYTES)).cast("Q")
        os.close(memory)
        os.set_inheritable(orders, False)
        os.set_blocking(orders, False)
        self._orders = orders
        self._since = 0.0
        self._running: Mapping[int, Cancellable] = {}
        self._is_fork = False
        # Handlers rather than SIG_IGN: programs that a task starts would inherit the latter.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    # ---- Trio calls these around every step of every task

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        step = self._step
        step[1] += 1
        number = task.context.get(activation_number, 0)
        if number:
            self._since = _monotonic()
            step[0] = number

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._step[0] = 0
        if self._is_fork:
            os._exit(0)  # a copy of the child that a task forked has come to its first checkpoint

    # ---- orders

    def attend(self, running: Mapping[int, Cancellable]) -> None:
        """From now on watch the loop that calls this. `running`: by number, whom orders can be meant for."""
        self._running = running
        self._token = trio.lowlevel.current_trio_token()
        trio.lowlevel.add_instrument(self)

    async def obey(self) -> None:
        """Cancel what is to be cancelled, for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._orders)
            for number in self._ordered():
                self._cancel(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two instructions of whatever it is at."""
        blocking = self._step[0]
        if not blocking or _monotonic() - self._since < BLOCKED_AFTER_S:
            return  # the loop lives, and reads its orders itself
        ordered = self._ordered()
        for other in ordered - {blocking}:
            self._token.run_sync_soon(self._cancel, other)
        if blocking in ordered and not trio.lowlevel.currently_ki_protected():
            raise LoopBlocked("the task blocked the loop that it shares with others: is all it calls async?")

    def _ordered(self) -> set[int]:
        """The numbers of those to cancel. An order to end is obeyed here: the worker gave up this child."""
        try:
            orders = pipe.decode_orders(os.read(self._orders, ORDERS_AT_ONCE * pipe.ORDER_BYTES))
        except (OSError, pipe.ProtocolViolation):
            return set()  # none there: somebody else's signal; or a task closed the pipe
        if any(order.kind is pipe.OrderKind.END for order in orders):
            os._exit(EXIT_ORDERED)
        return {order.number for order in orders}

    def _cancel(self, number: int) -> None:
        if number in self._running:
            self._running[number].cancel()

    # ---- forks

    def forget(self) -> None:
        """This process is a copy that a task forked: signals end it, and it does not go on with the loop."""
        self._is_fork = True
        os.close(self._orders)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
