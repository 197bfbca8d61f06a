"""What keeps the store in order, as a table of small duties.

Each duty runs in a loop of its own, so that one that waits or fails holds up no other. A round
handles a bounded number of rows; a full round is followed by the next at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog
import trio

from taskd.clock import Clock
from taskd.inflight.wake import Wake
from taskd.telemetry import metrics

FAILED_PAUSE_S = (0.2, 30.0)  # first and longest pause after a failed round

log = structlog.get_logger("taskd.upkeep")


@dataclass(slots=True)
class Duty:
    """One entry of the table. `round` handles at most `limit` rows and returns how many it handled.

    A round begins every `every_s()` seconds, and at once when `wake` is set. One that `publishes` waits
    for the log, which may be away for long. `trouble`: what an operator has to mend although rounds succeed.
    """

    name: str
    round: Callable[[], Awaitable[int]]
    limit: int
    every_s: Callable[[], float]
    wake: Wake | None = None
    publishes: bool = False
    trouble: Callable[[], str] = lambda: ""
    failing: str = ""
    last_progress_mono_ms: int = 0


class Upkeep:
    def __init__(self, duties: Sequence[Duty], clock: Clock) -> None:
        self.duties = duties
        self._clock = clock
        for duty in duties:
            duty.last_progress_mono_ms = clock.now().mono_ms

    async def run(self) -> None:
        """Do every duty until cancelled."""
        async with trio.open_nursery() as nursery:
            for duty in self.duties:
                nursery.start_soon(self._keep_doing, duty)

    async def _keep_doing(self, duty: Duty) -> None:
        pause_s, longest_s = FAILED_PAUSE_S
        while True:
            began_ms = self._clock.now().mono_ms
            try:
                handled = await duty.round()
            except Exception as error:  # whatever it was, the next round may succeed, and others go on
                duty.failing = f"{type(error).__name__}: {error}"
                metrics.upkeep_errors.labels(duty.name).inc()
                log.error("duty failed, trying again", duty=duty.name, error=duty.failing, pause_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)
                continue
            now_ms = self._clock.now().mono_ms
            metrics.upkeep_seconds.labels(duty.name).observe((now_ms - began_ms) / 1000)
            duty.failing, pause_s, duty.last_progress_mono_ms = "", FAILED_PAUSE_S[0], now_ms
            if handled < duty.limit:
                await _rest(duty)


async def _rest(duty: Duty) -> None:
    with trio.move_on_after(duty.every_s()):
        if duty.wake is None:
            await trio.sleep_forever()
        else:
            await duty.wake.wait()
