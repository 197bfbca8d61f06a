"""What operators' switches ask of upkeep: rows that wait are looked through, copies are sent, time ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from taskd.activation.lifecycle import Event, Status
from taskd.activation.switches import Board, SwitchKind
from taskd.clock import Clock
from taskd.inflight.base import Leaving, Ref, Settlement
from taskd.inflight.sqlite import Changes
from taskd.inflight.writer import Inflight
from taskd.log.base import Outgoing, Publish
from taskd.telemetry import audit, metrics
from taskd.upkeep.answers import settle
from taskd.upkeep.duties import Duty
from taskd.upkeep.forbidden import ForbiddenRows
from taskd.wire.envelope import with_received_at

LOOK_AGAIN_MS = 30_000  # rows that came back since the last look are looked at so often
_CAME_BACK = (Event.LEASE_ENDED, Event.HANDED_BACK, Event.CLAIM_ENDED)

log = structlog.get_logger("taskd.upkeep")


StopLeases = Callable[[Sequence[tuple[str, Ref]]], None]  # tells workers, by id, to end these


class RowsUnderSwitches:
    """Looks through all rows after a change of the switches, a bounded number in each round.

    What arrives later or is claimed meets the switches there, so one look is enough; only rows that
    come back from workers without being claimed again need another.
    """

    def __init__(self, inflight: Inflight, clock: Clock, stop_leases: StopLeases, *, limit: int) -> None:
        self._inflight = inflight
        self._clock = clock
        self._stop_leases = stop_leases
        self._limit = limit
        self._board: Board | None = None
        self._next_row: int | None = None  # None: there is nothing to look for
        self._came_back = False
        self._looked_at_ms = 0
        inflight.observers.append(self._observe)

    async def round(self) -> int:
        self._begin()
        if self._next_row is None:
            return 0
        board = self._board
        looked = await self._inflight.apply_switches(self._next_row, self._limit)
        if looked.dropped or looked.forwarded:
            log.info(
                "switches applied",
                dropped=looked.dropped,
                forwarded=looked.forwarded,
                stopped=len(looked.stopped),
            )
        self._stop_leases(looked.stopped)
        self._next_row = looked.last_row
        done = looked.last_row is None and board is self._inflight.board
        return 0 if done else self._limit

    def _begin(self) -> None:
        board, now_ms = self._inflight.board, self._clock.now().mono_ms
        changed = board is not self._board
        late = self._came_back and self._next_row is None and now_ms - self._looked_at_ms >= LOOK_AGAIN_MS
        if changed or late:
            self._board, self._came_back, self._looked_at_ms = board, False, now_ms
            self._next_row = 0 if board.moves_rows else None

    def _observe(self, changes: Changes) -> None:
        if self._board is not None and self._board.moves_rows:
            self._came_back |= any(event in _CAME_BACK for event, _ in changes.events)


class Forwarding:
    """Publishes the rows of demoted namespaces elsewhere; each is gone once its copy is durable there."""

    def __init__(
        self,
        inflight: Inflight,
        publish: Publish,
        forbidden: ForbiddenRows,
        *,
        limit: int,
        strict_order_namespaces: frozenset[str] = frozenset(),
    ) -> None:
        self._forbidden = forbidden
        self._inflight = inflight
        self._publish = publish
        self._limit = limit
        self._strict_order = strict_order_namespaces

    async def round(self) -> int:
        """Raises LogUnavailable when the topic took only some, or none: they stay, and are tried again."""
        rows = await self._inflight.demoted(self._limit)
        if not rows:
            return 0
        topic = self._inflight.demoted_to.topic
        answers = await self._publish([self._outgoing(row, topic) for row in rows])
        answered = await settle(
            self._inflight, self._forbidden, rows, answers, lambda row: Settlement(row.id)
        )
        metrics.demoted.inc(len(answered.settled))
        if answered.unavailable is not None:
            raise answered.unavailable
        return len(rows)

    def _outgoing(self, row: Leaving, topic: str) -> Outgoing:
        key = row.namespace if row.namespace in self._strict_order else row.id
        return Outgoing(topic, with_received_at(row.activation, row.received_at_ms), key.encode())


def switch_duties(
    inflight: Inflight,
    publish: Publish,
    clock: Clock,
    stop_leases: StopLeases,
    forbidden: ForbiddenRows,
    *,
    limit: int,
    every_s: Callable[[], float],
    strict_order_namespaces: frozenset[str] = frozenset(),
) -> Sequence[Duty]:
    """`publish`: where the rows of demoted namespaces go. `stop_leases`: how workers are told to stop."""

    async def end() -> int:
        for switch in await inflight.end_switches():
            audit.switch_ended(switch)
        for kind in SwitchKind:
            count = sum(switch.kind is kind for switch in inflight.board.switches)
            metrics.switches.labels(kind.value).set(count)
        return 0

    looking = RowsUnderSwitches(inflight, clock, stop_leases, limit=limit)
    forwarding = Forwarding(
        inflight, publish, forbidden, limit=limit, strict_order_namespaces=strict_order_namespaces
    )
    return [
        Duty("end_switches", end, limit, every_s, inflight.watch_switches()),
        Duty("apply_switches", looking.round, limit, every_s, inflight.watch_switches()),
        Duty("forward", forwarding.round, limit, every_s, inflight.watch(Status.FORWARDED), publishes=True),
    ]
