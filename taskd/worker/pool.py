"""A processing pool: slots that run tasks, links that fetch them, and the order in which both stop."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import trio

from taskd.config.schema import PoolSection
from taskd.rpc.access import Access, pool_access
from taskd.rpc.base import ClientStream
from taskd.rpc.client import connect as open_client
from taskd.wire.frames import TaskName
from taskd.worker import async_part
from taskd.worker.async_part import AsyncPart
from taskd.worker.async_slot import AsyncSpawner
from taskd.worker.backlog import Backlog
from taskd.worker.child import Spawner
from taskd.worker.credit import Offer, Room, share, welcome
from taskd.worker.ladder import Graces
from taskd.worker.link import Connector, Identity, Link
from taskd.worker.pace import Pace
from taskd.worker.plain import CALL_WITHIN_S, PURPOSES, BrokerLink, CallConnector
from taskd.worker.process import ProcessSpawner
from taskd.worker.pull import PullLink, Turns
from taskd.worker.push import Listen, PushLink, listener
from taskd.worker.slot import Slot
from taskd.worker.spares import Spares

log = structlog.get_logger("taskd.worker")

WORK_PATH = "/taskd.v1.DispatchService/Work"
DELIVERY_GRACE_S = 5.0  # for results, when running tasks have used up the grace
GOODBYE_WITHIN_S = 2.0
KILL_WITHIN_S = 2.0  # for the end of processes that were killed
TIMEOUT_MARGIN_S = 1.0  # a task at its deadline is ended, and reported within the grace
LATE_ROUND_S = 0.5
SPARES_AFTER_S = 2.0  # whatever waited for this worker is more urgent than the start of another process
STUCK_AFTER_S = 60.0  # longer than a slot may take to end what must end
MB = 2**20


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """One moment of a pool. Counts; `waiting` and `in_children` are activations not finished."""

    slots: int
    warm_slots: int
    async_slots: int
    async_running: int
    failing_slots: int
    connected_brokers: int
    waiting: int
    in_children: int
    untaken_results: int
    ended: int
    crashes: int
    timeouts: int
    failed_starts: int
    average_s: float | None
    prefetch: int


class Pool:
    """Made by `run_pool`, which hands it out once the children are warm."""

    def __init__(
        self,
        config: PoolSection,
        name: str,
        *,
        spawner: Spawner,
        async_spawner: AsyncSpawner,
        connect: Connector,
        call: CallConnector,
        rng: random.Random,
    ) -> None:
        self.name = name
        self.was_warm = False
        self._config = config
        self._spares = Spares(spawner, config.spare_children)
        self._graces = Graces(config.exception_grace_s, config.terminate_grace_s)
        self._pace = Pace()
        self._backlog = Backlog(
            self._wake_slots,
            self._changed,
            self._stop_in_slots,
            hands_back=config.protocol == "stream",
        )
        self._change = trio.Event()
        self.slots = [
            Slot(
                number,
                self._spares,
                self._backlog,
                self._pace,
                slots=config.slots,
                max_tasks_per_child=config.max_tasks_per_child,
                max_rss_bytes=_most_rss_bytes(config),
                graces=self._graces,
                on_change=self._changed,
                rng=rng,
            )
            for number in range(config.slots)
        ]
        self.async_part = AsyncPart(
            config,
            async_spawner,
            self._backlog,
            max_rss_bytes=_most_rss_bytes(config),
            graces=self._graces,
            on_change=self._changed,
            rng=rng,
        )
        self.links: Sequence[BrokerLink] = (
            self._streams(connect, rng) if config.protocol == "stream" else self._plain_links(call, rng)
        )

    def _streams(self, connect: Connector, rng: random.Random) -> list[Link]:
        config = self._config
        identity = Identity(
            uuid.uuid4().hex, self.name, config.application, config.namespaces, config.slots, self._tasks
        )
        return [
            Link(
                address,
                identity,
                self._backlog,
                connect=connect,
                offer=self._offer,
                on_change=self._changed,
                rng=rng,
            )
            for address in dict.fromkeys(config.brokers)
        ]

    def _plain_links(self, call: CallConnector, rng: random.Random) -> list[PullLink] | list[PushLink]:
        config, backlog, changed = self._config, self._backlog, self._changed
        if config.protocol == "push":
            link = PushLink(
                config.brokers[0],
                config,
                backlog,
                free_slots=self._free_slots,
                is_ready=self._is_ready,
                connect=call,
                on_change=changed,
                rng=rng,
            )
            return [link]
        turns = Turns(self._free_slots)
        return [
            PullLink(address, config, backlog, turns, connect=call, on_change=changed, rng=rng)
            for address in dict.fromkeys(config.brokers)
        ]

    # ---- what systemd is told

    @property
    def capacity(self) -> tuple[int, int]:
        """Slots, and places for async tasks."""
        part = self.async_part
        return len(self.slots), sum(slot.capacity for slot in part.slots) if part.is_needed else 0

    @property
    def running(self) -> int:
        return len(self._backlog.running)

    @property
    def waiting(self) -> int:
        return self._backlog.jobs_count - self.running

    @property
    def ended(self) -> int:
        return self.statistics().ended

    @property
    def brokers(self) -> tuple[int, int]:
        """Connected, and all."""
        return sum(link.connected for link in self.links), len(self.links)

    def stuck(self) -> str:
        """What a restart may mend, in words: no slot ends what should have ended long ago."""
        now = trio.current_time()
        overdue_s = min(slot.overdue_s(now) for slot in self.slots)
        return f"every slot is overdue, for {overdue_s:.0f} s at least" if overdue_s > STUCK_AFTER_S else ""

    def statistics(self) -> PoolStatistics:
        async_slots = self.async_part.slots
        tallies = [slot.tally for slot in async_slots]
        return PoolStatistics(
            slots=len(self.slots),
            warm_slots=sum(slot.health == "warm" for slot in self.slots),
            failing_slots=sum(slot.health == "failing" for slot in self.slots),
            connected_brokers=sum(link.connected for link in self.links),
            waiting=len(self._backlog),
            async_slots=sum(slot.capacity for slot in async_slots if slot.health == "warm"),
            async_running=self.async_part.running,
            in_children=sum(len(slot.jobs) for slot in self.slots) + self.async_part.running,
            untaken_results=self._backlog.untaken_count,
            ended=sum(slot.ended_count for slot in self.slots) + sum(tally.ended for tally in tallies),
            crashes=sum(slot.crashes_count for slot in self.slots) + sum(tally.crashes for tally in tallies),
            timeouts=sum(slot.timeouts_count for slot in self.slots)
            + sum(tally.timeouts for tally in tallies),
            failed_starts=sum(slot.failed_starts_count for slot in self.slots)
            + sum(slot.failed_starts_count for slot in async_slots),
            average_s=self._pace.average_s,
            prefetch=self._prefetch(),
        )

    def _tasks(self) -> set[TaskName]:
        """What any slot's child can run. Different ones are there for a moment, while a plugin is renewed."""
        runs_async = self._config.async_slots > 0
        return {
            TaskName(*task[:3])
            for slot in self.slots
            for task in slot.tasks
            if runs_async or not task.is_async
        }

    # ---- how much work to ask for

    def _prefetch(self) -> int:
        now = trio.current_time()
        return self._pace.prefetch((slot.running_s(now) for slot in self.slots), self._config.max_prefetch)

    def _offer(self, link: Link) -> Offer | None:
        """The credit for one link's broker. What comes too much all the same is handed back when it waits."""
        takes_work = not self._backlog.closed and not (link.account and link.account.is_full)
        usable = sum(slot.health == "warm" for slot in self.slots) if takes_work else 0
        held = self._backlog.jobs_count - self.async_part.held
        plain = Room(usable + self._prefetch() if usable else 0, held, max(usable - held, 0))
        of_loop = self.async_part.room(takes_work) if self.async_part.is_needed else None
        kind, room = welcome(plain, of_loop, self._backlog.async_share)
        return share(
            link.credit,
            [other.credit for other in self._others(link) if other.state == "working"],
            capacity=room.capacity,
            held=room.held,
            idle=room.idle,
            now=trio.current_time(),
            kind=kind,
        )

    def _others(self, link: Link) -> list[Link]:
        return [other for other in self.links if isinstance(other, Link) and other is not link]

    def _free_slots(self, is_async: bool | None = None) -> int:
        """For protocols that take nothing back: nothing is to come that cannot start at once.

        `is_async`: for tasks of this kind; None: nobody knows the kind of the next one before it is here.
        """
        if self._backlog.closed:
            return 0
        held = self._backlog.jobs_count - self.async_part.held
        plain = sum(slot.health == "warm" for slot in self.slots) - held
        for_async = self.async_part.free - self._backlog.reserved
        if is_async is None and self.async_part.is_needed:
            return max(min(plain, for_async), 0)
        return max(for_async if is_async else plain, 0)

    def _is_ready(self) -> bool:
        return self.was_warm and any(slot.health == "warm" for slot in self.slots)

    # ---- events

    def _wake_slots(self) -> None:
        self.async_part.wake()
        by_load = sorted(self.slots, key=lambda slot: slot.load)  # idle ones first
        for sharing, slot in zip(range(len(by_load), 0, -1), by_load, strict=True):
            slot.wake(sharing)

    def _stop_in_slots(self) -> None:
        self.async_part.end_stopped()
        for slot in self.slots:
            slot.end_stopped()

    def _changed(self) -> None:
        self._change.set()
        for link in self.links:
            link.wake()

    async def _until_change(self) -> None:
        self._change = trio.Event()
        await self._change.wait()

    # ---- life

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._spares.run)
            for slot in self.slots:
                nursery.start_soon(slot.run)
            nursery.start_soon(self.async_part.run)
            async with trio.open_nursery() as watching:
                # Stopping is possible while children do not start.
                watching.start_soon(_cancel_when, stop, watching.cancel_scope)
                await self._until_warm()
                watching.start_soon(self._begin_spares)
                self.was_warm = True
                self._changed()
                task_status.started(self)
                for link in self.links:
                    nursery.start_soon(link.run)
                await self._hand_back_late()
            if not self.was_warm:
                task_status.started(self)
            await self._drain()
            nursery.cancel_scope.cancel()

    async def _until_warm(self) -> None:
        while any(slot.health != "warm" for slot in self.slots) or not self.async_part.is_warm:
            await self._until_change()
            self._learn_tasks()
        log.info("pool ready", pool=self.name, slots=len(self.slots))

    async def _begin_spares(self) -> None:
        await trio.sleep(SPARES_AFTER_S)
        self._spares.begin()

    def _learn_tasks(self) -> None:
        self.async_part.learn({task for slot in self.slots for task in slot.tasks})

    async def _hand_back_late(self) -> None:
        while True:
            await trio.sleep(LATE_ROUND_S)
            self._learn_tasks()
            self._backlog.hand_back_late(trio.current_time())

    async def _drain(self) -> None:
        """Nothing new; hand back what waits, let run what runs, deliver what ended, as far as time allows."""
        begin = trio.current_time()
        self._backlog.close()
        for slot in self.slots:
            slot.recall()
        self.async_part.recall()
        await self._until_fetched()
        grace_s = self._grace_s(begin)
        log.info("draining", pool=self.name, running=self._backlog.jobs_count, grace_s=round(grace_s, 1))
        with trio.move_on_at(begin + grace_s):
            while self._backlog.jobs_count:
                await self._until_change()
        if self._backlog.jobs_count:
            await self._break_off(f"it still ran {grace_s:g} s after its worker was told to stop")
        with trio.move_on_at(max(begin + grace_s, trio.current_time() + DELIVERY_GRACE_S)):
            while self._owes_or_expects():
                await self._until_change()
        self._report_who_was_left()
        for link in self.links:
            link.close()
        with trio.move_on_after(GOODBYE_WITHIN_S):
            while any(link.connected for link in self.links):
                await self._until_change()

    def _owes_or_expects(self) -> bool:
        """Whether something is to be told, or may come that then is to be handed back."""
        if any(isinstance(link, Link) and link.may_get_more for link in self.links):
            return True
        return not self._backlog.settled and any(link.account for link in self.links)

    async def _break_off(self, why: str) -> None:
        """End what still runs, so that others may have it at once and not when its lease is over."""
        running = self._backlog.running
        log.warning("the grace is over, ending what still runs", pool=self.name, running=running)
        self._backlog.break_off(why)
        with trio.move_on_after(self._graces.total_s + KILL_WITHIN_S):
            while self._backlog.jobs_count:
                await self._until_change()

    async def _until_fetched(self) -> None:
        """Calls under way may bring work, and where it cannot be handed back it must run."""
        with trio.move_on_after(CALL_WITHIN_S):
            while self._backlog.reserved:
                await self._until_change()

    def _grace_s(self, now: float) -> float:
        if self._config.drain_grace_s is not None:
            return self._config.drain_grace_s
        longest_s = max(self._backlog.longest_s, self.async_part.remaining_s(now))
        longest_s = max((longest_s, *(slot.remaining_s(now) for slot in self.slots)))
        return longest_s + self._graces.total_s + TIMEOUT_MARGIN_S if longest_s else 0.0

    def _report_who_was_left(self) -> None:
        running = [job.lease.id for slot in self.slots for job in slot.jobs]
        running += [job.lease.id for job in self.async_part.jobs]
        untaken = [lease.id for account in self._backlog.accounts.values() for lease in account.untaken]
        if running or untaken:
            log.warning("left behind", pool=self.name, killed=running, results_not_taken=untaken)
        else:
            log.info("drained", pool=self.name)


async def run_pool(
    config: PoolSection,
    name: str,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    spawner: Spawner | None = None,
    async_spawner: AsyncSpawner | None = None,
    connect: Connector | None = None,
    call: CallConnector | None = None,
    listen: Listen | None = None,
    rng: random.Random | None = None,
) -> None:
    """Run one pool until `stop` is set and it has drained; started with its `Pool` once children are warm.

    Cancelling ends it at once: children are killed, and the leases of what they ran end at the
    brokers. `spawner`, `async_spawner`, `connect` (streams), `call` (pull and push) and `listen` (push) are
    for tests; without, real processes and gRPC (inside `aio.open_loop()`). Raises StartupError when a file
    of the pool's TLS cannot be used, or its port.
    """
    access = pool_access(config)
    pool = Pool(
        config,
        name,
        spawner=spawner or _spawner(config),
        async_spawner=async_spawner or _spawner(config, async_part.PROGRAM, shares_step=True),
        connect=connect or partial(open_work_stream, access=access),
        call=call or partial(open_client, access=access),
        rng=rng or random.Random(),
    )
    log.info("pool starts", pool=name, protocol=config.protocol, purpose=PURPOSES[config.protocol])
    async with AsyncExitStack() as around:
        for link in pool.links:
            if isinstance(link, PushLink):
                # Before the children are warm, so that who asks learns that they are not yet.
                await around.enter_async_context((listen or listener(config))(link.services))
        await pool.run(stop, task_status)


def _spawner(
    config: PoolSection, program: str = "taskd.worker.entry", *, shares_step: bool = False
) -> ProcessSpawner:
    return ProcessSpawner(
        modules=config.modules,
        program=program,
        shares_step=shares_step,
        memory_limit_bytes=(config.child_memory_limit_mb or 0) * MB,
    )


def _most_rss_bytes(config: PoolSection) -> int | None:
    """What a child may have after a task; one that is near its limit has no room for the next."""
    limits = []
    if config.max_child_rss_mb is not None:
        limits.append(config.max_child_rss_mb * MB)
    if config.child_memory_limit_mb is not None:
        limits.append(config.child_memory_limit_mb * MB * 4 // 5)
    return min(limits, default=None)


@asynccontextmanager
async def open_work_stream(address: str, access: Access) -> AsyncIterator[ClientStream]:
    """The stream of work from the broker at `address`. Raises PeerError."""
    async with open_client(address, access) as client, client.stream(WORK_PATH) as stream:
        yield stream


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
