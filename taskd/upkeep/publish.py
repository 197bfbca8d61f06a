"""Retries and dead letters: published first, finished after. A crash in between repeats, it never loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import Status
from taskd.clock import Clock, Now
from taskd.inflight.base import Leaving, Settlement
from taskd.inflight.writer import Inflight
from taskd.log.base import Headers, Outgoing, Publish
from taskd.telemetry import metrics
from taskd.upkeep.answers import settle
from taskd.upkeep.forbidden import ForbiddenRows
from taskd.wire.envelope import next_attempt, with_received_at

log = structlog.get_logger("taskd.upkeep")


@dataclass(frozen=True, slots=True)
class Topics:
    """Where retries and dead letters go. `retry` None: back to the topic the activation came from."""

    deadletter: str
    retry: str | None = None
    raw: frozenset[str] = frozenset()  # what comes from these is an activation only here

    def again(self, topic: str) -> str:
        """Where an activation that came from `topic` is published to be read once more, unchanged."""
        return self.retry if topic in self.raw and self.retry is not None else topic


class Publisher:
    def __init__(
        self,
        inflight: Inflight,
        publish: Publish,
        clock: Clock,
        topics: Topics,
        *,
        limit: int,
        strict_order_namespaces: frozenset[str] = frozenset(),
    ) -> None:
        self.forbidden = ForbiddenRows(inflight, limit=limit)
        self._inflight = inflight
        self._publish = publish
        self._clock = clock
        self._topics = topics
        self._limit = limit
        self._strict_order = strict_order_namespaces

    async def round(self) -> int:
        """Publish what is leaving. Raises LogUnavailable when the log took only some, or none."""
        rows = await self._inflight.leaving(self._limit)
        if not rows:
            return 0
        now = self._clock.now()
        answers = await self._publish([self._outgoing(row, now) for row in rows])
        answered = await settle(self._inflight, self.forbidden, rows, answers, _settlement)
        _count(rows, answered.settled)
        if answered.unavailable is not None:
            raise answered.unavailable
        return len(rows)

    def _outgoing(self, row: Leaving, now: Now) -> Outgoing:
        if row.status is Status.FORWARDED:
            key = row.namespace if row.namespace in self._strict_order else row.id
            activation = with_received_at(row.activation, row.received_at_ms)
            return Outgoing(row.forward_topic or self._topics.again(row.topic), activation, key.encode())
        if row.status is not Status.RETRY:
            headers = _reasons(row, now)
            return Outgoing(self._topics.deadletter, row.activation, row.record_key, headers)
        new_id = retry_id(row.id, row.retry_attempts + 1)
        activation = next_attempt(
            row.activation,
            new_id=new_id,
            received_at_ms=now.wall_ms,
            max_attempts=row.max_attempts,
            delay_on_retry_s=row.delay_on_retry_s,
        )
        # Keyed by id, two copies of one retry meet in one partition, hence in one store.
        key = row.namespace if row.namespace in self._strict_order else new_id
        return Outgoing(self._topics.retry or row.topic, activation, key.encode())


def _settlement(row: Leaving) -> Settlement:
    if row.status is Status.RETRY:
        return Settlement(row.id, continued_as=retry_id(row.id, row.retry_attempts + 1))
    if row.status is Status.FORWARDED:
        return Settlement(row.id)
    return Settlement(row.id, dead_lettered=True)


def _reasons(row: Leaving, now: Now) -> Headers:
    """Why, when, where and how often: for whoever looks at the dead letter later."""
    texts = {
        "taskd-reason": row.reason,
        "taskd-error": row.error,
        "taskd-id": row.id,
        "taskd-dead-lettered-at-ms": str(now.wall_ms),
        "taskd-topic": row.topic,
        "taskd-partition": str(row.partition),
        "taskd-offset": str(row.offset),
        "taskd-processing-attempts": str(row.attempts),
        "taskd-retry-attempts": str(row.retry_attempts),
    }
    return tuple((name, text.encode()) for name, text in texts.items() if text)


def _count(rows: Sequence[Leaving], settled: Mapping[str, Settlement]) -> None:
    for row in rows:
        settlement = settled.get(row.id)
        if settlement is None:
            continue
        if settlement.dead_lettered:
            metrics.dead_letters.labels(row.reason).inc()
            log.info("dead-lettered", id=row.id, reason=row.reason, error=row.error)
        elif settlement.continued_as is not None:
            metrics.retries_published.inc()
