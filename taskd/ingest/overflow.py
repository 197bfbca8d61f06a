"""No application fills the store alone: what is beyond its share goes to the overflow topic, or waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import structlog
import trio

from taskd.activation.lifecycle import WAITING
from taskd.inflight.base import Arrival
from taskd.inflight.writer import Inflight
from taskd.log.base import Forbidden, Outgoing, Publish, Rejected
from taskd.telemetry import metrics

RETRY_S = (0.2, 10.0)  # first and longest pause after the overflow topic took no record

log = structlog.get_logger("taskd.ingest")


class Overflow:
    """Holds every application to `max_rows` waiting rows.

    `topic` None: there is no overflow topic, so reading waits until the application has room again.
    Records keep their key and bytes on the way; whoever reads the topic gets them as they came.
    """

    def __init__(self, inflight: Inflight, publish: Publish, *, max_rows: int, topic: str | None) -> None:
        self._inflight = inflight
        self._publish = publish
        self._max_rows = max_rows
        self._topic = topic

    async def divert(
        self,
        arrivals: Sequence[Arrival],
        show: Callable[[dict[str, str]], None],
        progress: Callable[[], None],
    ) -> list[Arrival]:
        """Those of `arrivals` that may be stored; the others are durable elsewhere when this returns.

        `show` is told why it waits, `progress` that waiting is not being stuck.
        """
        kept, beyond = self._divided(arrivals)
        if not beyond:
            return kept
        if self._topic is not None:
            return kept + await self._forward(beyond, show, progress)
        while beyond and not self._fits(arrivals):
            applications = sorted({arrival.application for arrival in beyond})
            names = ", ".join(repr(name) for name in applications)
            show({"application": f"{names}: its share of {self._max_rows} waiting rows is full"})
            progress()
            await trio.sleep(0.2)
        show({})
        return list(arrivals)

    def _waiting(self) -> Counter[str]:
        waiting: Counter[str] = Counter()
        for depth in self._inflight.depths():
            if depth.status in WAITING:
                waiting[depth.application] += depth.count
        return waiting

    def _divided(self, arrivals: Sequence[Arrival]) -> tuple[list[Arrival], list[Arrival]]:
        waiting = self._waiting()
        kept: list[Arrival] = []
        beyond: list[Arrival] = []
        for arrival in arrivals:
            if arrival.undecodable:
                kept.append(arrival)
                continue
            waiting[arrival.application] += 1
            (kept if waiting[arrival.application] <= self._max_rows else beyond).append(arrival)
        return kept, beyond

    def _fits(self, arrivals: Sequence[Arrival]) -> bool:
        """Whether the whole batch fits, or its applications have nothing else in the store."""
        waiting = self._waiting()
        arriving = Counter(arrival.application for arrival in arrivals if not arrival.undecodable)
        return all(
            not waiting[application] or waiting[application] + count <= self._max_rows
            for application, count in arriving.items()
        )

    async def _forward(
        self,
        beyond: Sequence[Arrival],
        show: Callable[[dict[str, str]], None],
        progress: Callable[[], None],
    ) -> list[Arrival]:
        """Publish them; returns those that the log will never take, which are stored after all."""
        assert self._topic is not None
        left, refused = list(beyond), []
        pause_s, longest_s = RETRY_S
        while left:
            records = [Outgoing(self._topic, arrival.activation, arrival.record_key) for arrival in left]
            answers = await self._publish(records)
            progress()
            again = []
            for arrival, answer in zip(left, answers, strict=True):
                if isinstance(answer, (Rejected, Forbidden)):
                    log.error(
                        "overflow topic refuses a record; stored instead", id=arrival.id, why=str(answer)
                    )
                    refused.append(arrival)
                elif isinstance(answer, Exception):
                    again.append(arrival)
                    show({"overflow": f"{self._topic} takes no records: {answer}"})
            metrics.ingest_overflowed.inc(len(left) - len(again))
            left = again
            if left:
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)
        show({})
        log.info("overflow", topic=self._topic, records=len(beyond) - len(refused))
        return refused
