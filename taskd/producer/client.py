"""The producer for Trio programs. Code without Trio uses `.delay()`, which sends through `outbox`."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from taskd import aio
from taskd.clock import Clock, SystemClock
from taskd.config.schema import ProducerConfig
from taskd.errors import DeliveryError
from taskd.producer.append import MAX_BATCH_RECORDS, Parcel, Sender, open_sender
from taskd.producer.build import outgoing
from taskd.producer.destination import destination
from taskd.tasks.outbox import Call


class Producer:
    """Sends calls. Opened by `open_producer`; may be shared by many tasks."""

    def __init__(self, sender: Sender, topic: str, timeout_s: float, clock: Clock) -> None:
        self._sender = sender
        self._topic = topic
        self._timeout_s = timeout_s
        self._clock = clock

    async def send(self, call: Call) -> None:
        """Return when the log has the call durably. Raises DeliveryError: it was not scheduled."""
        (error,) = await self.send_many([call])
        if error is not None:
            raise error

    async def send_many(self, calls: Sequence[Call]) -> list[DeliveryError | None]:
        """Send any number of calls; for each, in order, None or why it was not scheduled.

        Takes at most the configured time-out for each thousand. Cancelling leaves open which arrived.
        """
        errors: list[DeliveryError | None] = []
        for start in range(0, len(calls), MAX_BATCH_RECORDS):
            errors += await self._send_some(calls[start : start + MAX_BATCH_RECORDS])
        return errors

    async def _send_some(self, calls: Sequence[Call]) -> list[DeliveryError | None]:
        now_ms = self._clock.now().wall_ms
        errors: list[DeliveryError | None] = [None] * len(calls)
        parcels: dict[int, Parcel] = {}
        settled = _Countdown()
        for index, call in enumerate(calls):
            try:
                parcels[index] = Parcel(call, outgoing(call, now_ms, self._topic), settled.count)
            except DeliveryError as error:
                errors[index] = error
        await self._deliver(list(parcels.values()), settled)
        for index, parcel in parcels.items():
            errors[index] = parcel.error
        return errors

    async def _deliver(self, parcels: Sequence[Parcel], settled: _Countdown) -> None:
        settled.expect(len(parcels))
        try:
            with trio.move_on_after(self._timeout_s):
                await self._sender.send(parcels)
                if not settled.all.is_set():
                    await settled.all.wait()
        finally:
            for parcel in parcels:
                self._sender.give_up(parcel)


class _Countdown:
    """Sets an event when the last of a number of parcels is settled."""

    def __init__(self) -> None:
        self.all = trio.Event()
        self._left = 0

    def expect(self, number: int) -> None:
        self._left = number
        if number == 0:
            self.all.set()

    def count(self, parcel: Parcel) -> None:
        self._left -= 1
        if self._left == 0:
            self.all.set()


@asynccontextmanager
async def open_producer(config: ProducerConfig, clock: Clock | None = None) -> AsyncIterator[Producer]:
    """A producer of the log that `config` names, while the block lasts. Connects when something is sent.

    Runs an asyncio loop of its own, so it may be opened in any Trio program.
    """
    clock = clock or SystemClock()
    jitter = random.Random()  # spreads retries
    async with aio.open_loop(), open_sender(destination(config), config.timeout_s, jitter) as sender:
        yield Producer(sender, config.topic, config.timeout_s, clock)
