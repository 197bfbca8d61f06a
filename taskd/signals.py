"""Signals become an event: the first asks to stop, the second insists, the third ends the process.

A handler that raised instead would raise inside whatever runs, and inside asyncio code that locks up
for good.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import structlog
import trio

__all__ = ["hangups", "stop_on_signals"]

log = structlog.get_logger("taskd.signals")


@asynccontextmanager
async def stop_on_signals() -> AsyncIterator[trio.Event]:
    """Give an event that SIGINT or SIGTERM sets; outermost in a program, in its main thread.

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
                nursery.start_soon(_obey, received, stop, block, insisted)
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


async def _obey(
    received: AsyncIterator[int], stop: trio.Event, block: trio.CancelScope, insisted: list[int]
) -> None:
    async for number in received:
        name = signal.Signals(number).name
        if not stop.is_set():
            log.info("stopping; a second signal stops now", signal=name)
            stop.set()
        elif not insisted:
            log.warning("stopping now, without draining", signal=name)
            insisted.append(number)
            block.cancel()
        else:
            os._exit(128 + number)
