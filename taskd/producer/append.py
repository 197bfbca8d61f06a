"""Sends records to the log: in batches of what gathered meanwhile, again and again while that may help.

Appending twice is harmless, because brokers know an activation by its id; so whatever may have
failed is sent again until its time is over.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from taskd import aio
from taskd.errors import DeliveryError, LogUnavailable
from taskd.log.base import Outgoing, Position, Writer
from taskd.log.scope import open_background
from taskd.producer.destination import Destination
from taskd.tasks.outbox import Call

MAX_BATCH_RECORDS = 1_024
MAX_BATCH_BYTES = 4_000_000  # a request stays below the broker's 10 MiB; a larger record goes alone
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0

log = logging.getLogger("taskd.producer")


@dataclass(eq=False, slots=True)
class Parcel:
    """A record on its way. `on_settled` is called once, in the Trio thread; `error` then says how it went."""

    call: Call
    record: Outgoing
    on_settled: Callable[[Parcel], None]
    deadline: float = float("inf")  # on Trio's clock
    settled: bool = False
    error: DeliveryError | None = None


class Sender:
    """Takes parcels and settles every one. Opened by `open_sender`; used from its Trio thread only."""

    def __init__(self, destination: Destination, timeout_s: float, jitter: random.Random) -> None:
        self._destination = destination
        self._timeout_s = timeout_s
        self._jitter = jitter
        self._queue: deque[Parcel] = deque()
        self._arrived = trio.Event()
        self._opened = trio.Event()
        self._writer: Writer | None = None
        self._loop = aio.current_loop()  # what the writer needs
        self._busy = False  # somebody sees to what is in the queue
        self._failures = 0  # appends in a row of which something must be sent again
        self._ended = False
        self._unsettled = 0
        self._drained = trio.Event()
        self._drained.set()
        self.last_error: Exception | None = None

    def offer(self, parcel: Parcel) -> None:
        """Send this parcel; it is settled within about twice the time-out."""
        self._take(parcel)
        self._arrived.set()

    async def send(self, parcels: Sequence[Parcel]) -> None:
        """As `offer`. While nothing else is sent, this task appends them itself: to wake another takes time.
        A task that is older than the producer, and so has another loop or none, leaves it to that other.

        Not all need be settled when this returns. Cancelling leaves open which arrived.
        """
        free = bool(parcels) and not (self._busy or self._queue or self._writer is None)
        free = free and aio.current_loop() is self._loop
        for parcel in parcels:
            self._take(parcel)
        try:
            if free:
                self._busy = True
                try:
                    await self._round()
                finally:
                    self._busy = False
        finally:
            if self._queue:  # what is left, and what came meanwhile
                self._arrived.set()
            if self._ended:
                self._give_up_all()

    def _take(self, parcel: Parcel) -> None:
        parcel.deadline = trio.current_time() + self._timeout_s
        if self._unsettled == 0:
            self._drained = trio.Event()
        self._unsettled += 1
        self._queue.append(parcel)

    def give_up(self, parcel: Parcel) -> None:
        """Settle a parcel whose time is over. It may still arrive when an append is under way."""
        if not parcel.settled:
            self._settle(parcel, self.overdue(parcel.call))

    async def drained(self) -> None:
        """Wait until every parcel is settled."""
        await self._drained.wait()

    def overdue(self, call: Call) -> DeliveryError:
        """What to tell the caller when the time is over."""
        found = f"last answer: {self.last_error}" if self.last_error else "no answer came"
        return DeliveryError(
            f"{_subject(call)} was not scheduled: expected {self._destination.name} to store it within "
            f"{self._timeout_s:g} s; {found}. If only the answer was lost, it runs all the same. "
            f"{self._destination.advice}"
        )

    async def run(self) -> None:
        """Work until cancelled; whatever is left then is settled as failed."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_open)
                nursery.start_soon(self._send)
        finally:
            self._ended = True
            self._give_up_all()

    def _give_up_all(self) -> None:
        for parcel in self._queue:
            self.give_up(parcel)

    async def _keep_open(self) -> None:
        failures = 0
        while True:
            try:
                async with self._destination.open_writer() as self._writer:
                    self._opened.set()
                    await trio.sleep_forever()
            except Exception as error:  # of the log's client: told to whoever waits, and tried again
                self.last_error = error
                self._writer = None
                if self._opened.is_set():
                    self._opened = trio.Event()
                await self._back_off(failures)
                failures += 1

    async def _send(self) -> None:
        while True:
            while self._busy or not self._queue:
                self._arrived = trio.Event()
                await self._arrived.wait()
            self._busy = True
            while self._queue:
                if self._failures:
                    await self._back_off(self._failures - 1)
                await self._round()
            self._busy = False

    async def _round(self) -> None:
        """Append what waits, as much as goes together."""
        batch = self._next_batch()
        try:
            answers = await self._append(batch)
        finally:
            # Unsettled ones lie in the queue whatever happens, for the retry or for `run`'s end.
            self._queue.extendleft(reversed(batch))
        self._failures = self._failures + 1 if self._judge(batch, answers) else 0

    def _next_batch(self) -> list[Parcel]:
        now = trio.current_time()
        batch: list[Parcel] = []
        size_bytes = 0
        while self._queue and len(batch) < MAX_BATCH_RECORDS:
            parcel = self._queue[0]
            if parcel.deadline <= now:
                self.give_up(parcel)
            if not parcel.settled:
                size_bytes += len(parcel.record.value)
                if batch and size_bytes > MAX_BATCH_BYTES:
                    break
                batch.append(parcel)
            self._queue.popleft()
        return batch

    async def _append(self, batch: list[Parcel]) -> list[Position | Exception]:
        answers: list[Position | Exception] = []
        try:
            with trio.move_on_after(self._timeout_s):
                while self._writer is None:
                    await self._opened.wait()
                answers = await self._writer.append([parcel.record for parcel in batch])
        except Exception as error:  # a fault of the log's client: told, and tried again
            log.exception("appending failed")
            answers = [LogUnavailable(repr(error))] * len(batch)
        return answers or [LogUnavailable(f"no answer within {self._timeout_s:g} s")] * len(batch)

    def _judge(self, batch: list[Parcel], answers: list[Position | Exception]) -> bool:
        """Settle what is decided; True when something must be sent again."""
        again = []
        for parcel, answer in zip(batch, answers, strict=True):
            self._queue.popleft()
            if isinstance(answer, LogUnavailable):
                self.last_error = answer
                again.append(parcel)
            elif isinstance(answer, Exception):
                self._settle(parcel, self._refused(parcel.call, answer))
            else:
                self._settle(parcel, None)
        if not again:
            self.last_error = None
        self._queue.extendleft(reversed(again))
        return bool(again)

    def _refused(self, call: Call, error: Exception) -> DeliveryError:
        return DeliveryError(
            f"{_subject(call)} was not scheduled: {self._destination.name} refused it: {error}"
        )

    def _settle(self, parcel: Parcel, error: DeliveryError | None) -> None:
        if parcel.settled:
            return
        parcel.settled, parcel.error = True, error
        self._unsettled -= 1
        if self._unsettled == 0:
            self._drained.set()
        parcel.on_settled(parcel)

    async def _back_off(self, failures: int) -> None:
        longest_s = min(BACKOFF_FIRST_S * 2 ** min(failures, 10), BACKOFF_MAX_S)
        await trio.sleep(longest_s * self._jitter.uniform(0.5, 1.0))


def _subject(call: Call) -> str:
    return f"{call.namespace}:{call.taskname} (activation {call.id})"


@asynccontextmanager
async def open_sender(
    destination: Destination, timeout_s: float, jitter: random.Random
) -> AsyncIterator[Sender]:
    """A sender that works while the block lasts; on leaving, what is not settled fails (see `drained`)."""
    sender = Sender(destination, timeout_s, jitter)
    async with open_background() as nursery:
        nursery.start_soon(sender.run)
        yield sender
