"""Work fetched by unary calls, from any broker that speaks the published protocol.

A fetch is made only into a slot that is free and is not promised to another fetch. A broker that has
nothing is asked at growing intervals; one that has something is asked by twice as many calls each time,
until the slots are full. Where several have work, each gets the next free slot in turn. One that cannot
be reached is looked for, which keeps no slot from the others.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import structlog
import trio

from taskd.config.schema import PoolSection
from taskd.errors import PeerError, Refused, Undecodable
from taskd.rpc.health import CHECK
from taskd.wire import consumer
from taskd.wire.consumer import Filter
from taskd.wire.envelope import scan
from taskd.wire.frames import Result
from taskd.worker.backlog import Backlog
from taskd.worker.plain import (
    CALL_WITHIN_S,
    CallConnector,
    Caller,
    PlainAccount,
    PlainLink,
    Restraint,
    assignment,
)
from taskd.worker.reporting import MAX_RESULTS_PER_CALL, Reporting

log = structlog.get_logger("taskd.worker")

MAX_WIDTH = 100  # calls at once on one connection, as HTTP/2 servers allow
IDLE_FIRST_S, IDLE_MOST_S = 0.1, 1.0  # between two questions to a broker that has nothing


class Turns:
    """Whose fetch the next free slot is for: the link's that began its last one the longest ago."""

    def __init__(self, free_slots: Callable[[], int]) -> None:
        self.links: list[PullLink] = []
        self._free_slots = free_slots
        self._count = 0

    def is_due(self, link: PullLink) -> bool:
        free = self._free_slots()
        if free <= 0 or not link.wants_more():
            return False
        before = sum(other.turn < link.turn and other.wants_more() for other in self.links)
        return before < free

    def take(self) -> int:
        """The number of the turn that begins now."""
        self._count += 1
        return self._count


class PullLink(PlainLink):
    """Fetches from one broker and reports to it. Its account is named by the address."""

    def __init__(
        self,
        address: str,
        config: PoolSection,
        backlog: Backlog,
        turns: Turns,
        *,
        connect: CallConnector,
        on_change: Callable[[], None],
        rng: random.Random,
    ) -> None:
        account = PlainAccount(address)
        super().__init__(address, account, connect=connect, on_change=on_change)
        backlog.accounts[address] = account
        self.turn = 0
        self._backlog = backlog
        self._turns = turns
        self._reporting = Reporting(address, account, rng)
        self._fetching = Restraint(address, "fetching tasks", rng)
        self._rng = rng
        # One namespace is all that a call can name, and only together with the application.
        self._wanted = deque(Filter(name, config.application) for name in config.namespaces or (None,))
        self._misses = 0  # since something came, or it rested
        self._rests = 0  # since something came
        self._idle_until = float("-inf")
        self._under_way = 0  # calls that may bring a task
        self._width = 1
        self._is_reached = False  # else it is looked for first, which keeps no slot waiting
        self._is_looking = False
        turns.links.append(self)

    def wants_more(self) -> bool:
        """Whether it would fetch if it had a slot."""
        if not self._is_reached or self._backlog.closed or self.account.is_full:
            return False
        if self._under_way >= self._width:
            return False
        return trio.current_time() >= max(self._idle_until, self._fetching.until)

    def _must_look(self) -> bool:
        if self._is_reached or self._is_looking or self._backlog.closed:
            return False
        return trio.current_time() >= self._fetching.until

    def _begin(self, calls: trio.Nursery, client: Caller) -> bool:
        if self._backlog.closed:
            self._reporting.restraint.hurry()
        may_report = self._reporting.due(trio.current_time())
        if self._turns.is_due(self):
            self._under_way += 1
            self._backlog.reserved += 1
            self.turn = self._turns.take()
            result = self._reporting.begin(1)[0] if may_report else None
            calls.start_soon(self._fetch, client, result)
            self._on_change()  # another link may be next for what is left
            return True
        if self._must_look():
            self._is_looking = True
            calls.start_soon(self._look, client)
            return True
        if may_report and not self._reporting.under_way:
            calls.start_soon(self._report, client, self._reporting.begin(MAX_RESULTS_PER_CALL))
            return True
        return False

    def _due(self) -> float:
        now = trio.current_time()
        times = (self._reporting.next_due(), self._idle_until, self._fetching.until)
        return min((time for time in times if time > now), default=float("inf"))

    def _has_ended(self) -> bool:
        return not self._under_way and self._reporting.has_ended

    # ---- calls

    async def _report(self, client: Caller, results: list[Result]) -> None:
        await self._reporting.send(client, results)
        self._note()

    async def _look(self, client: Caller) -> None:
        """Whether anybody answers there; what, does not matter."""
        try:
            await client.call(CHECK, b"", timeout_s=CALL_WITHIN_S)
            self._is_reached = True
        except Refused:
            self._is_reached = True
        except PeerError as error:
            self._fetching.failed(str(error))
        self._is_looking = False
        self._note()

    async def _fetch(self, client: Caller, result: Result | None) -> None:
        """Ask for one task, and give back this result with the same call."""
        wanted = self._wanted[0]
        self._wanted.rotate(-1)
        reply: bytes | None = None
        try:
            try:
                if result is None:
                    reply = await self._get_task(client, wanted)
                else:
                    reply = await self._reporting.send_for_next(client, result, wanted)
            finally:
                self._under_way -= 1
                self._backlog.reserved -= 1
            if reply is not None:
                self._arrived(reply)
        except (PeerError, Undecodable) as error:
            self._fetching.failed(str(error))
            self._width = 1
            self._is_reached = isinstance(error, Refused | Undecodable)
        self._note()

    async def _get_task(self, client: Caller, wanted: Filter) -> bytes:
        """The reply; an empty one when there is nothing. Raises PeerError."""
        try:
            return await client.call(
                consumer.GET_TASK, consumer.encode_filter(wanted), timeout_s=CALL_WITHIN_S
            )
        except Refused as error:
            if error.code == "NOT_FOUND":
                return b""
            raise

    def _arrived(self, reply: bytes) -> None:
        """Raises Undecodable: such a task cannot even be reported, its lease will end."""
        activation = consumer.decode_task(reply)
        if activation is not None:
            envelope = scan(activation)
            self._backlog.accept(self.account, [assignment(activation, envelope)], trio.current_time())
            self._misses = self._rests = 0
            self._width = min(2 * self._width, MAX_WIDTH)
        else:
            self._missed()
        self._fetching.succeeded()

    def _missed(self) -> None:
        """It has nothing now, of the namespace that was asked for; when it has nothing of any, rest."""
        self._misses += 1
        now = trio.current_time()
        if self._misses < len(self._wanted) or now < self._idle_until:
            return  # the latter: calls that were under way when the rest began
        longest_s = min(IDLE_FIRST_S * 2 ** min(self._rests, 10), IDLE_MOST_S)
        self._idle_until = now + self._rng.uniform(longest_s / 2, longest_s)
        self._rests += 1
        self._misses, self._width = 0, 1

    def _note(self) -> None:
        self._answered(not (self._fetching.trouble or self._reporting.restraint.trouble))
        self._on_change()
