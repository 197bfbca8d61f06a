"""The outbox behind `.delay()`: synchronous outside, a thread of its own with Trio inside.

Callers in any thread build their activation, hand it over and wait; the thread sends what has gathered
in one append. The thread is a daemon: a program that ends is flushed by `close`, and not held up.
"""

from __future__ import annotations

import atexit
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import trio

from taskd import aio
from taskd.clock import Clock, SystemClock
from taskd.config.loader import load_producer_config
from taskd.errors import DeliveryError
from taskd.producer.append import Parcel, Sender, open_sender
from taskd.producer.build import outgoing
from taskd.producer.destination import Destination, destination
from taskd.tasks import outbox
from taskd.tasks.outbox import Call

MAX_WAITING = 10_000
MAX_WAITING_BYTES = 64_000_000
STOP_S = 2.0  # for closing connections, after the flush

log = logging.getLogger("taskd.producer")  # the host program's logging, whatever it uses


@dataclass(frozen=True, slots=True)
class Statistics:
    """Since the outbox was opened. `failed`: with and without somebody waiting for it."""

    sent: int
    failed: int
    waiting: int
    waiting_bytes: int


@dataclass(eq=False, slots=True)
class _Ticket:
    """One call between the caller's thread and the sending one."""

    parcel: Parcel
    waited_for: bool
    done: threading.Event = field(default_factory=threading.Event)
    error: DeliveryError | None = None


class SyncOutbox:
    """Sends through one thread, which starts with the first call, and again should it have died."""

    def __init__(
        self,
        to: Destination,
        *,
        topic: str,
        timeout_s: float,
        clock: Clock | None = None,
        max_waiting: int = MAX_WAITING,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._to = to
        self._topic = topic
        self._timeout_s = timeout_s
        self._clock = clock or SystemClock()
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._lock = threading.Lock()  # over everything below
        self._thread: _SendingThread | None = None
        self._tickets: dict[Parcel, _Ticket] = {}
        self._waiting_bytes = 0
        self._sent = 0
        self._failed = 0
        self._closed = False

    def send(self, call: Call, *, wait: bool) -> None:
        """As `Outbox.send`. Raises DeliveryError at once when too many calls wait already."""
        record = outgoing(call, self._clock.now().wall_ms, self._topic)
        parcel = Parcel(call, record, lambda parcel: self._settle(parcel, parcel.error))
        ticket = _Ticket(parcel, wait)
        thread = self._admit(ticket)
        if not thread.take(parcel):
            self._settle(parcel, DeliveryError(f"{call.namespace}:{call.taskname}: the outbox is closing"))
        if not wait:
            return
        if not ticket.done.wait(self._timeout_s):
            self._settle(parcel, thread.overdue(call))
        if ticket.error is not None:
            raise ticket.error

    def close(self) -> None:
        """Send what waits, for at most the configured time-out; what is left then is logged as failed."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None and not thread.stop():
            log.warning("the sending thread did not stop in time")
            self._fail_all("the program ended first")

    def statistics(self) -> Statistics:
        with self._lock:
            return Statistics(self._sent, self._failed, len(self._tickets), self._waiting_bytes)

    def _admit(self, ticket: _Ticket) -> _SendingThread:
        call, size_bytes = ticket.parcel.call, len(ticket.parcel.record.value)
        with self._lock:
            if self._closed:
                raise DeliveryError(
                    f"{call.namespace}:{call.taskname} was not scheduled: the outbox is closed"
                )
            full = len(self._tickets) >= self._max_waiting
            if full or (self._tickets and self._waiting_bytes + size_bytes > self._max_waiting_bytes):
                raise DeliveryError(
                    f"{call.namespace}:{call.taskname} was not scheduled: {len(self._tickets)} calls "
                    f"({self._waiting_bytes:,} bytes) already wait for {self._to.name}. {self._to.advice}"
                )
            if self._thread is None or not self._thread.is_alive():
                self._thread = self._start()
            self._tickets[ticket.parcel] = ticket
            self._waiting_bytes += size_bytes
            return self._thread

    def _start(self) -> _SendingThread:
        try:
            return _SendingThread(self._to, self._timeout_s, self._fail_all)
        except RuntimeError as error:  # Python 3.12 and newer start no thread while they shut down
            raise DeliveryError(f"the call was not scheduled: the program is ending ({error})") from error

    def _settle(self, parcel: Parcel, error: DeliveryError | None) -> None:
        with self._lock:
            ticket = self._tickets.pop(parcel, None)
            if ticket is None:
                return  # its caller was told already that the time is over
            self._waiting_bytes -= len(parcel.record.value)
            if error is None:
                self._sent += 1
            else:
                self._failed += 1
        ticket.error = error
        ticket.done.set()
        if error is not None and not ticket.waited_for:
            log.error("%s", error)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            parcels = list(self._tickets)
        for parcel in parcels:
            call = parcel.call
            subject = f"{call.namespace}:{call.taskname} (activation {call.id})"
            self._settle(parcel, DeliveryError(f"{subject} was not scheduled: {why}"))


class _SendingThread:
    """One life of the thread. Raises RuntimeError when no thread can be started."""

    def __init__(self, to: Destination, timeout_s: float, on_end: Callable[[str], None]) -> None:
        self._to = to
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._incoming: deque[Parcel] = deque()
        self._started = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._sender: Sender | None = None
        self._closing: trio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="taskd-producer", daemon=True)
        self._thread.start()
        self._started.wait()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def take(self, parcel: Parcel) -> bool:
        """Hand over a parcel; False when the thread has ended."""
        self._incoming.append(parcel)
        return self._call_soon(self._take_in)

    def overdue(self, call: Call) -> DeliveryError:
        assert self._sender is not None  # a thread that never opened one has failed all calls
        return self._sender.overdue(call)

    def stop(self) -> bool:
        """Flush and end; False when the thread still runs after the time-out."""
        self._call_soon(self._begin_closing)
        self._thread.join(self._timeout_s + STOP_S)
        return not self._thread.is_alive()

    def _call_soon(self, function: Callable[[], None]) -> bool:
        try:
            if self._token is None:
                return False
            self._token.run_sync_soon(function, idempotent=True)
        except trio.RunFinishedError:
            return False
        return True

    def _begin_closing(self) -> None:
        if self._closing is not None:
            self._closing.set()

    def _take_in(self) -> None:
        while self._sender is not None and self._incoming:
            self._sender.offer(self._incoming.popleft())

    def _run(self) -> None:
        why = "the outbox was closed"
        try:
            trio.run(self._main)
        except BaseException as error:
            log.exception("the sending thread ended; the next call starts another")
            why = f"the sending thread ended: {error!r}"
        finally:
            self._started.set()
            self._on_end(why)

    async def _main(self) -> None:
        jitter = random.Random()  # spreads retries
        async with aio.open_loop(), open_sender(self._to, self._timeout_s, jitter) as self._sender:
            self._closing = trio.Event()
            self._token = trio.lowlevel.current_trio_token()
            self._started.set()
            await self._closing.wait()
            self._take_in()
            with trio.move_on_after(self._timeout_s):
                await self._sender.drained()


_flushes_at_exit = False


def open_outbox(settings: Mapping[str, object]) -> SyncOutbox:
    """The outbox that `settings` and the environment name; connects with the first call.

    Raises ConfigError, with one line for each problem.
    """
    config = load_producer_config(settings)
    _flush_at_exit()
    return SyncOutbox(destination(config), topic=config.topic, timeout_s=config.timeout_s)


def _flush_at_exit() -> None:
    global _flushes_at_exit
    if not _flushes_at_exit:
        _flushes_at_exit = True
        # Before threads are shut down where Python offers that: afterwards 3.12 starts none, and the first
        # connection may need one to look up its host.
        getattr(threading, "_register_atexit", atexit.register)(outbox.unbind)
