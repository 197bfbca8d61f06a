"""A connection that is kept: opened with back-off for as long as it takes, and opened anew when it failed."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from typing import Generic, TypeVar

import structlog
import trio

RETRY_FIRST_S = 0.2
RETRY_MOST_S = 10.0

log = structlog.get_logger("taskd.log.kafka")
C = TypeVar("C")


class Kept(Generic[C]):
    """One client that is opened again when it fails. `current` is None while there is none."""

    def __init__(
        self,
        what: str,
        open_: Callable[[], Awaitable[C]],
        stop: Callable[[C], Awaitable[None]],
        foreign: tuple[type[BaseException], ...],
        rng: random.Random,
    ) -> None:
        """`foreign`: the errors of opening after which trying again is right. `stop` must not raise."""
        self._what = what
        self._open = open_
        self._stop = stop
        self._foreign = foreign
        self._rng = rng
        self._failed = trio.Event()
        self._opened = trio.Event()
        self.current: C | None = None

    def fail(self) -> None:
        """Give the client up; `run` builds a new one."""
        self._failed.set()

    async def opened(self) -> C:
        while self.current is None:
            await self._opened.wait()
        return self.current

    async def run(self, use: Callable[[C], Awaitable[None]] | None = None) -> None:
        """Keep a client open, and `use` it, until cancelled."""
        waits = delays(self._rng)
        while True:
            self._failed = trio.Event()
            try:
                client = await self._open()
            except self._foreign as error:
                delay_s = next(waits)
                log.warning(
                    "cannot reach Kafka", what=self._what, retry_in_s=round(delay_s, 2), error=repr(error)
                )
                await trio.sleep(delay_s)
                continue
            waits = delays(self._rng)
            await self._use(client, use)
            log.warning("connecting to Kafka anew", what=self._what)
            await trio.sleep(next(waits))

    async def _use(self, client: C, use: Callable[[C], Awaitable[None]] | None) -> None:
        self.current = client
        self._opened.set()
        try:
            async with trio.open_nursery() as nursery:
                if use is not None:
                    nursery.start_soon(use, client)
                await self._failed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.current = None
            self._opened = trio.Event()
            await self._stop(client)


def delay_after(failures: int, rng: random.Random) -> float:
    """Seconds to wait: doubling from 0.2 to 10, of which the random half spreads out many that wait."""
    longest_s = min(RETRY_MOST_S, RETRY_FIRST_S * 2.0 ** min(failures - 1, 10))
    return longest_s * rng.uniform(0.5, 1.0)


def delays(rng: random.Random) -> Iterator[float]:
    return (delay_after(failures, rng) for failures in count(1))
