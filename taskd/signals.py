"""Signals become an event: the first asks to stop, the second insists, the third ends the process.

A handler that raised instead would raise inside whatever runs, and inside asyncio code that locks up
for good.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import structlog
import trio

__all__ = ["hangups", "stop_on_signals"]

log = structlog.get_logger("taskd.signals")


@asynccontextmanager
async def stop_on_signals(
    earlier: Callable[[], Sequence[int]] = tuple,
) -> AsyncIterator[trio.Event]:
    """Give an event that SIGINT or SIGTERM sets; outermost in a program, in its main thread.

    `earlier`: signals that came before and count as well; asked once they are received here.

    * first signal: the event is set. The block drains and ends by itself, so the exit code is its own, 0.
    * second signal: the block is cancelled now, and SystemExit(128 + number) is raised: 130 after
      SIGINT, 143 after SIGTERM, as a shell would report a program that the signal ended.
    * third signal: the process exits at once with the same code, nothing is closed. This is for code
      that holds up its cancellation.
    """
    stop = trio.Event()
    insisted: list[int] = []
    try:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
            async with trio.open_nursery() as nursery:
                block = trio.CancelScope()
                obedience = _Obedience(stop, block, insisted)
                for number in earlier():
                    obedience.obey(number)
                nursery.start_soon(obedience.run, received)
                try:
                    with block:
                        yield stop
                finally:
                    nursery.cancel_scope.cancel()
    except Exception:
        if not insisted:
            raise
        log.exception("while stopping now")
    if insisted:
        raise SystemExit(128 + insisted[0])


@contextmanager
def hangups() -> Iterator[AsyncIterator[int]]:
    """Give an iterator with one item for each SIGHUP; several that come at once may be one.

    While the block lasts, SIGHUP ends nothing, also not when the terminal is closed.
    """
    with trio.open_signal_receiver(signal.SIGHUP) as received:
        yield received


@dataclass(slots=True)
class _Obedience:
    stop: trio.Event
    block: trio.CancelScope
    insisted: list[int]

    async def run(self, received: AsyncIterator[int]) -> None:
        async for number in received:
            self.obey(number)

    def obey(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self.stop.is_set():
            log.info("stopping; a second signal stops now", signal=name)
            self.stop.set()
        elif not self.insisted:
            log.warning("stopping now, without draining", signal=name)
            self.insisted.append(number)
            self.block.cancel()
        else:
            os._exit(128 + number)
