"""The part of a pool that runs async tasks: its slots, from when the pool turns out to have such tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import structlog
import trio

from taskd.config.schema import PoolSection
from taskd.wire.frames import TaskName
from taskd.worker.async_crowd import Limits
from taskd.worker.async_slot import AsyncSlot, AsyncSpawner
from taskd.worker.backlog import Backlog
from taskd.worker.credit import Room
from taskd.worker.entry_pipe import KnownTask
from taskd.worker.ladder import Graces
from taskd.worker.results import Job
from taskd.worker.routing import AsyncTasks

PROGRAM = "taskd.worker.entry_async"

log = structlog.get_logger("taskd.worker")


class AsyncPart:
    """Run it with `run`; it does nothing as long as the pool's tasks are plain functions.

    `on_change` as for slots.
    """

    def __init__(
        self,
        config: PoolSection,
        spawner: AsyncSpawner,
        backlog: Backlog,
        *,
        max_rss_bytes: int | None,
        graces: Graces,
        on_change: Callable[[], None],
        rng: random.Random,
    ) -> None:
        children = min(config.async_children, config.async_slots)
        limits = Limits(config.max_tasks_per_child, max_rss_bytes, config.async_stall_s, graces)
        self.slots = [
            AsyncSlot(
                number,
                spawner,
                backlog,
                capacity=config.async_slots // children + (number < config.async_slots % children),
                limits=limits,
                on_change=on_change,
                rng=rng,
                fair=self._fair if children > 1 else None,
            )
            for number in range(children)
        ]
        self._backlog = backlog
        self._on_change = on_change
        self._needed = trio.Event()

    def learn(self, tasks: Iterable[KnownTask]) -> None:
        """What the pool's children know now: async ones are routed here from now on."""
        names = AsyncTasks(TaskName(*task[:3]) for task in tasks if task.is_async and self.slots)
        if names != self._backlog.async_tasks:
            self._backlog.async_tasks = names
            log.info("async tasks", tasks=sorted(f"{task.namespace}:{task.taskname}" for task in names))
        if names and not self._needed.is_set():
            self._needed.set()
            self._on_change()

    @property
    def is_needed(self) -> bool:
        return self._needed.is_set()

    @property
    def is_warm(self) -> bool:
        """Whether it can do what it is needed for."""
        return not self.is_needed or all(slot.health == "warm" for slot in self.slots)

    def _fair(self, slot: AsyncSlot) -> int:
        """How many more a slot may take, so that the children get equally many."""
        others = [other for other in self.slots if other is not slot and other.takes_work]
        share = -(-self._backlog.async_count // (1 + len(others)))
        fewest = min((other.jobs_count for other in (slot, *others)), default=0)
        return fewest + share - slot.jobs_count

    @property
    def held(self) -> int:
        """Async activations that are here and not finished."""
        return self._backlog.async_count + self.running

    @property
    def running(self) -> int:
        return sum(slot.jobs_count for slot in self.slots)

    def room(self, takes_work: bool) -> Room:
        """For credit: all that is free here is idle."""
        capacity = sum(slot.capacity for slot in self.slots if slot.health == "warm") if takes_work else 0
        return Room(capacity, self.held, max(capacity - self.held, 0))

    @property
    def free(self) -> int:
        """How many more can be taken now."""
        if not self.is_needed:
            return 0
        return max(sum(slot.free for slot in self.slots) - self._backlog.async_count, 0)

    @property
    def jobs(self) -> list[Job]:
        return [job for slot in self.slots for job in slot.jobs]

    def remaining_s(self, now: float) -> float:
        """When the work in here must have ended, counted from now."""
        return max((slot.remaining_s(now) for slot in self.slots), default=0.0)

    def wake(self) -> None:
        for slot in self.slots:
            slot.wake()

    def recall(self) -> None:
        for slot in self.slots:
            slot.recall()

    def end_stopped(self) -> None:
        for slot in self.slots:
            slot.end_stopped()

    async def run(self) -> None:
        """Keep the slots' children from when they are needed, until cancelled."""
        await self._needed.wait()
        async with trio.open_nursery() as nursery:
            for slot in self.slots:
                nursery.start_soon(slot.run)
