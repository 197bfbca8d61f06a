"""How many assignments each broker may send: shares of what is free here, and what was promised already.

Credit is absolute: so many assignments are welcome in all, counted from the stream's beginning. A broker
may use the largest total it was ever told until it says which credit it has seen, so a recall frees
nothing before that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from taskd.wire.frames import Credit, CreditKind

MIXED_AHEAD = 32  # async activations asked for together with others: at most so many of those may wait then
ACTIVE_S = 1.0  # a broker that sent something so recently shares in all that is free


@dataclass(slots=True)
class StreamCredit:
    """What one broker was told on one stream."""

    received: int = 0
    received_at: float = float("-inf")
    kind: CreditKind = CreditKind.ANY
    _number: int = 0
    _idle_total: int = 0
    _open: deque[tuple[int, int]] = field(default_factory=lambda: deque([(0, 0)]))  # (number, total)

    @property
    def outstanding(self) -> int:
        """Assignments that may still come."""
        return max(max(total for _, total in self._open) - self.received, 0)

    @property
    def promised(self) -> int:
        """... once the broker has seen the newest credit."""
        return max(self._open[-1][1] - self.received, 0)

    @property
    def idle(self) -> int:
        """Of those, how many may be at_most_once."""
        return max(self._idle_total - self.received, 0)

    def assigned(self, count: int, credit: int, now: float) -> None:
        """So many assignments came, or none, from a broker that has seen this credit."""
        self.received += count
        if count:
            self.received_at = now
        while len(self._open) > 1 and self._open[1][0] <= credit:
            self._open.popleft()

    def offer(self, more: int, idle: int, kind: CreditKind = CreditKind.ANY) -> Credit:
        """From now on `more` further assignments are welcome, `idle` of them at once, all of this kind."""
        self._number += 1
        self.kind = kind
        self._idle_total = self.received + idle
        total = self.received + more
        self._open.append((self._number, total))
        return Credit(self._number, total, self._idle_total, kind)


@dataclass(frozen=True, slots=True)
class Offer:
    more: int
    idle: int
    kind: CreditKind = CreditKind.ANY


@dataclass(frozen=True, slots=True)
class Room:
    """What a pool can take of one kind, and what it has; `idle`: slots that have nothing to do."""

    capacity: int
    held: int
    idle: int

    @property
    def free(self) -> int:
        return max(self.capacity - self.held, 0)


def welcome(plain: Room, of_loop: Room | None, async_share: float) -> tuple[CreditKind, Room]:
    """What to ask brokers for: of both kinds while there is room for both, else of the one that has room.

    Of what comes when anything may come, `async_share` was async so far, 0 to 1. So a pool with little but
    async tasks asks for many of them at once, and the more they are mixed, the nearer it keeps to the room
    for the others. `of_loop` None: the pool has no async tasks.
    """
    if of_loop is None:
        return CreditKind.ANY, plain
    if not of_loop.free:
        return CreditKind.PLAIN, plain
    if not plain.free:
        return CreditKind.ASYNC, of_loop
    ahead = int(min(of_loop.free, MIXED_AHEAD) * async_share**2)
    return CreditKind.ANY, Room(plain.capacity + ahead, plain.held, min(plain.idle, of_loop.idle))


def share(
    mine: StreamCredit,
    others: Iterable[StreamCredit],
    *,
    capacity: int,
    held: int,
    idle: int,
    now: float,
    kind: CreditKind = CreditKind.ANY,
) -> Offer | None:
    """What to offer one broker now, of `capacity` less what is `held` already; None: leave it as it is.

    One assignment each is welcome beyond that, so that work reaches an idle slot from any broker at once.
    The rest goes in equal shares to the brokers that send something, or to all when none does. Small
    change is kept for later, in both directions.
    """
    others = list(others)
    everyone = [mine, *others]
    free = max(capacity - held, 0)
    active = [credit for credit in everyone if now - credit.received_at < ACTIVE_S] or everyone
    fair = 0 if not free else 1
    if mine in active:
        fair = max(fair, -(-free // len(active)))
    room = free + (len(everyone) if free else 0) - sum(credit.outstanding for credit in others)
    more = max(min(fair, room), 0)
    small = max(1, capacity // len(everyone) // 4)
    changed = abs(more - mine.promised) >= small or kind is not mine.kind
    awaited = idle > 0 and mine.idle == 0 and more > 0  # it waits with what is at_most_once
    return Offer(more, min(idle, more), kind) if changed or awaited else None
