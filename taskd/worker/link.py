"""The connection to one broker: hello, then work in one direction and results in the other, until it breaks.

A link reconnects for ever, so one unreachable broker costs nothing but its own work. What it sends is
kept in accounts (results.py), by store id: an address where another store answers gets nothing
that belongs to the old one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import structlog
import trio

from taskd.errors import PeerError, PeerTimeout, PeerUnavailable, Undecodable
from taskd.rpc.base import ClientStream
from taskd.wire.frames import (
    VERSION,
    Assignments,
    Draining,
    Heartbeat,
    Hello,
    Results,
    Stop,
    Taken,
    TaskName,
    Welcome,
    WorkerFrame,
)
from taskd.wire.frames_codec import decode_broker_frame, encode_worker_frame
from taskd.worker.backlog import Backlog
from taskd.worker.credit import Offer, StreamCredit
from taskd.worker.gather import MANY, Gathering
from taskd.worker.results import Account

log = structlog.get_logger("taskd.worker")

WELCOME_WITHIN_S = 10.0
SEND_WITHIN_S = 30.0
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.1, 10.0
BACKOFF_STOPPING_S = 0.5
CALM_AFTER_S = 5.0  # a connection that lasted this long starts the back-off anew
STAND_BY_S = 300.0  # then the address may lead elsewhere, and is tried again
MAX_LEASE_S, MIN_LEASE_S = 86_400.0, 0.1

State = Literal["connecting", "working", "draining", "down"]


class Connector(Protocol):
    def __call__(self, address: str) -> AbstractAsyncContextManager[ClientStream]:
        """A fresh stream of `DispatchService/Work` to the broker there. Raises PeerError, also later on."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """What a pool says of itself to every broker. `tasks`: what it can run when it connects."""

    worker_id: str
    pool: str
    application: str | None
    namespaces: tuple[str, ...]
    slots: int
    tasks: Callable[[], Iterable[TaskName]]


class Link:
    """Run it with `run`. `offer(link)`: the credit it should give its broker now, None to leave it.

    `on_change`: called when the connection came or went, so that others share the work anew.
    """

    def __init__(
        self,
        address: str,
        identity: Identity,
        backlog: Backlog,
        *,
        connect: Connector,
        offer: Callable[[Link], Offer | None],
        on_change: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self.address = address
        self.state: State = "connecting"
        self.account: Account | None = None  # of the store that last welcomed us here
        self.credit = StreamCredit()
        self._identity = identity
        self._backlog = backlog
        self._connect = connect
        self._offer = offer
        self._on_change = on_change
        self._rng = rng
        self._wake = trio.Event()
        self._lease_s = MAX_LEASE_S
        self._sent_at = 0.0
        self._closing = False
        self._gathering = Gathering()

    @property
    def connected(self) -> bool:
        return self.state in ("working", "draining")

    @property
    def may_get_more(self) -> bool:
        """Whether assignments may still come, under credit that the broker has not seen recalled."""
        return self.state == "working" and self.credit.outstanding > 0

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def close(self) -> None:
        """Send what there is, then end the stream in an orderly way, so that all of it arrives."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        """Keep the connection until `close` or cancelled."""
        failures = 0
        while True:
            await self._stand_by()
            if self._closing:
                break
            since = trio.current_time()
            try:
                async with self._connect(self.address) as stream:
                    await self._converse(stream)
                why = "the broker ended the stream"
            except* (PeerError, Undecodable) as group:
                why = _reasons(group)
            calm = self.connected and trio.current_time() - since >= CALM_AFTER_S
            failures = 1 if calm else failures + 1
            self._disconnected(why, failures)
            if not self._closing:
                await self._back_off(self._backoff_s(failures))

    async def _stand_by(self) -> None:
        """While another address leads to the same store: a broker has one stream with each worker."""
        account = self.account
        if account is None or account.address in ("", self.address):
            return
        log.warning(
            "two addresses lead to one broker, this one is not used: name it once",
            address=self.address,
            used=account.address,
            store_id=account.store_id,
        )
        with trio.move_on_after(STAND_BY_S):
            while account.address and not self._closing:
                self._wake = trio.Event()
                await self._wake.wait()

    async def _back_off(self, seconds: float) -> None:
        """Less when the worker stops meanwhile: it has results, and little time to deliver them."""
        until = trio.current_time() + seconds
        while not self._backlog.closed:
            self._wake = trio.Event()
            with trio.move_on_at(until) as waiting:
                await self._wake.wait()
            if waiting.cancelled_caught:
                return
        await trio.sleep(min(max(until - trio.current_time(), 0.0), BACKOFF_STOPPING_S))

    def _backoff_s(self, failures: int) -> float:
        longest_s = min(BACKOFF_FIRST_S * 2 ** min(failures - 1, 10), BACKOFF_MOST_S)
        return self._rng.uniform(longest_s / 2, longest_s)

    def _disconnected(self, why: str, failures: int) -> None:
        if self._closing:
            log.info("broker left", address=self.address)
        elif self.connected or failures == 1:
            log.warning("broker lost", address=self.address, error=why)
        else:
            log.info("broker not reached", address=self.address, error=why, failures=failures)
        if self.connected and self.account is not None:
            self.account.connection_lost()
        if self.account is not None and self.account.address == self.address:
            self.account.address = ""
        self.state = "down"
        self.credit = StreamCredit()
        self._on_change()

    # ---- one connection

    async def _converse(self, stream: ClientStream) -> None:
        """Until the stream ends, or raises PeerError or Undecodable, maybe in groups."""
        account = await self._introduce(stream)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_news, stream, account)
            await self._receive(stream, account)
            nursery.cancel_scope.cancel()

    async def _introduce(self, stream: ClientStream) -> Account:
        before = self.account
        if before is not None:
            before.address = self.address
        me = self._identity
        hello = Hello(
            me.worker_id,
            me.pool,
            me.application,
            me.namespaces,
            before.store_id if before else "",
            before.holding if before else (),
            tasks=tuple(me.tasks()),
            slots=me.slots,
            async_tasks=tuple(self._backlog.async_tasks),
        )
        with trio.move_on_after(WELCOME_WITHIN_S) as waiting:
            await stream.send(encode_worker_frame(hello))
            welcome = await _welcome(stream)
        if waiting.cancelled_caught:
            raise PeerTimeout(f"no welcome from {self.address} within {WELCOME_WITHIN_S:g} s")
        self._enter(welcome.store_id)
        return self._welcomed(welcome)

    def _enter(self, store_id: str) -> None:
        """It is about this store from now on. Raises PeerUnavailable for one that must be told more first."""
        before = self.account
        if before is not None and before.store_id != store_id:
            log.warning(
                "another store answers at this address",
                address=self.address,
                before=before.store_id,
                now=store_id,
                kept_results=len(before.untaken),
            )
            before.address = ""
        is_known = store_id in self._backlog.accounts
        self.account = self._backlog.account(store_id)
        if is_known and self.account is not before:
            # The hello said nothing of what there is from it, and somebody else may be at it.
            raise PeerUnavailable(f"{self.address} leads to a store that was met elsewhere: connecting anew")
        self.account.address = self.address

    def _welcomed(self, welcome: Welcome) -> Account:
        assert self.account is not None
        self._lease_s = min(max(welcome.lease_ms / 1000, MIN_LEASE_S), MAX_LEASE_S)
        self.account.connection_lost()  # tell everything anew: nobody knows what arrived before
        self._sent_at = trio.current_time()
        if self._sent_at > self.account.lease_until:
            self._backlog.lapse(self.account)
        self.account.lease_until = self._sent_at + self._lease_s
        self.account.max_deadline_s = welcome.max_deadline_ms / 1000 or None
        self.state, self.credit, self._gathering = "working", StreamCredit(), Gathering()
        log.info("broker connected", address=self.address, store_id=welcome.store_id)
        self._on_change()
        return self.account

    async def _receive(self, stream: ClientStream, account: Account) -> None:
        while (body := await stream.receive()) is not None:
            self._check_lease(account)
            match decode_broker_frame(body):
                case Assignments(assignments, credit):
                    now = trio.current_time()
                    self.credit.assigned(len(assignments), credit, now)
                    self._backlog.accept(account, assignments, now)
                    if not assignments:
                        self._on_change()  # what it gave back is free for others
                case Taken(leases):
                    account.taken(leases)
                    self._gathering.answered()
                    self._on_change()
                case Draining():
                    self.state = "draining"
                case Stop(leases, reason):
                    log.warning("stopped by the broker", why=reason.name.lower(), ids=[x.id for x in leases])
                    self._backlog.stop(account, leases)
                case Welcome():
                    raise Undecodable(f"{self.address} sent a second welcome")

    async def _send_news(self, stream: ClientStream, account: Account) -> None:
        """Send what there is, and a heartbeat every quarter of a lease without."""
        while True:
            self._check_lease(account)
            self._wake = trio.Event()
            frames = self._frames(account)
            if self._closing and not frames:
                await stream.finish()
                return
            if not frames:
                beat_at = self._sent_at + self._lease_s / 4
                with trio.move_on_at(min(self._news_at(account, trio.current_time()), beat_at)):
                    await self._wake.wait()
                    continue
                if trio.current_time() < beat_at:
                    continue
                frames = [Heartbeat()]
            for frame in frames:
                await self._send(stream, account, frame)
            if self._backlog.closed:
                self._on_change()  # a drain waits for what was just sent

    def _frames(self, account: Account) -> list[WorkerFrame]:
        frames: list[WorkerFrame] = []
        now = trio.current_time()
        if self._news_at(account, now) <= now:
            hurry, gathering, count = self._hurries, self._gathering, account.unsent_results
            frames = account.news(
                starts=hurry or (count < MANY and gathering.starts_until(now) <= now),
                results=hurry or gathering.until(count, now, more=bool(account.jobs)) <= now,
            )
            for frame in frames:
                if isinstance(frame, Results):
                    gathering.sent(len(frame.results), now)
        if self.state == "working" and (offer := self._offer(self)) is not None:
            frames.append(self.credit.offer(offer.more, offer.idle, offer.kind))
        return frames

    @property
    def _hurries(self) -> bool:
        """On its way out: nothing waits for other news."""
        return self._closing or self._backlog.closed

    def _news_at(self, account: Account, now: float) -> float:
        """When what there is to tell is to be told; inf: there is nothing."""
        if account.urgent or (self._hurries and account.has_news):
            return now
        at = float("inf")
        if count := account.unsent_results:
            at = self._gathering.until(count, now, more=bool(account.jobs))
        if account.unsent_starts and count < MANY:
            at = min(at, self._gathering.starts_until(now))
        return at

    def _check_lease(self, account: Account) -> None:
        """End a connection on which this worker was silent for a whole lease, such as when it was frozen.

        What waits on it to be read is as old, and a sign of life now would make old leases look alive.
        """
        now = trio.current_time()
        if now > account.lease_until:
            raise PeerTimeout(
                f"this worker said nothing for {now - self._sent_at:.1f} s, and a lease ends after "
                f"{self._lease_s:g} s: connecting anew"
            )

    async def _send(self, stream: ClientStream, account: Account, frame: WorkerFrame) -> None:
        began_at = trio.current_time()
        with trio.move_on_after(SEND_WITHIN_S) as sending:
            await stream.send(encode_worker_frame(frame))
        if sending.cancelled_caught:
            raise PeerTimeout(f"{self.address} took no frame for {SEND_WITHIN_S:g} s")
        self._sent_at = began_at  # the broker may have had it ever since
        account.lease_until = began_at + self._lease_s


def _reasons(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_reasons, error.exceptions))
    return str(error)


async def _welcome(stream: ClientStream) -> Welcome:
    body = await stream.receive()
    if body is None:
        raise PeerUnavailable("the broker ended the stream before its welcome")
    frame = decode_broker_frame(body)
    if not isinstance(frame, Welcome):
        raise Undecodable(f"the broker began with {type(frame).__name__}, expected Welcome")
    if frame.version != VERSION:
        raise Undecodable(
            f"the broker chose version {frame.version} of the stream; this worker speaks {VERSION}"
        )
    if not frame.store_id:
        raise Undecodable("the broker's welcome names no store")
    return frame
