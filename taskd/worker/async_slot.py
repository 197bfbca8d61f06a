"""The place for async tasks in a pool: one async child after the other, each with many tasks at once.

A child that has run its share of tasks gets no more and leaves when the last one ended; its successor
starts at once, so that recycling keeps nobody waiting. Both together run no more than the slot has room for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import structlog
import trio

from taskd.errors import StartupError
from taskd.worker.async_blame import Tally
from taskd.worker.async_crowd import Crowd, Limits
from taskd.worker.async_watch import AsyncChild
from taskd.worker.backlog import Backlog
from taskd.worker.results import Job
from taskd.worker.slot import BACKOFF_FIRST_S, BACKOFF_MOST_S, Health

log = structlog.get_logger("taskd.worker")


class AsyncSpawner(Protocol):
    def open(self) -> AbstractAsyncContextManager[AsyncChild]:
        """As `Spawner.open`."""
        ...


class AsyncSlot:
    """Run it with `run`; everything else may be called from other tasks at any time.

    `capacity`: how many activations run at once. `fair`: how many more this slot may take for its share, when
    there are several. `on_change`: called when a task ended or the slot's health
    changed.
    """

    def __init__(
        self,
        number: int,
        spawner: AsyncSpawner,
        backlog: Backlog,
        *,
        capacity: int,
        limits: Limits,
        on_change: Callable[[], None],
        rng: random.Random,
        fair: Callable[[AsyncSlot], int] | None = None,
    ) -> None:
        self.number = number
        self.capacity = capacity
        self.health: Health = "starting"
        self.tally = Tally()
        self.failed_starts_count = 0
        self._spawner = spawner
        self._backlog = backlog
        self._limits = limits
        self._fair = fair
        self._on_change = on_change
        self._rng = rng
        self._crowds: list[Crowd] = []

    # ---- what the pool asks

    @property
    def jobs(self) -> list[Job]:
        return [job for crowd in self._crowds for job in crowd.jobs]

    @property
    def pids(self) -> list[int]:
        """Of its children, the one that gets work last."""
        return [crowd.pid for crowd in self._crowds]

    @property
    def jobs_count(self) -> int:
        return sum(crowd.count for crowd in self._crowds)

    @property
    def takes_work(self) -> bool:
        """Whether one of its children takes more, as far as there is room."""
        return any(crowd.takes_work for crowd in self._crowds)

    def _room(self) -> int:
        room = self.capacity - self.jobs_count
        return room if self._fair is None else min(room, self._fair(self))

    @property
    def free(self) -> int:
        """How many more activations may run in here now."""
        return max(self.capacity - self.jobs_count, 0) if self.health == "warm" else 0

    def remaining_s(self, now: float) -> float:
        """When the work in here must have ended, counted from now."""
        return max((crowd.remaining_s(now) for crowd in self._crowds), default=0.0)

    def wake(self) -> None:
        """There may be work."""
        for crowd in self._crowds:
            crowd.wake()

    def recall(self) -> None:
        """Give back to the backlog what was not begun."""
        for crowd in self._crowds:
            crowd.recall()

    def end_stopped(self) -> None:
        """Cancel what was stopped."""
        for crowd in self._crowds:
            crowd.end_stopped()

    # ---- one child after the other

    async def run(self) -> None:
        """Keep a child in this slot until cancelled; then end it, whatever it does."""
        failures = 0
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    crowd: Crowd = await nursery.start(self._house)
                except StartupError as error:
                    failures += 1
                    self.failed_starts_count += 1
                    log.error(
                        "async child did not start", slot=self.number, error=str(error), failures=failures
                    )
                else:
                    await crowd.over.wait()
                    failures = 0 if crowd.is_useful else failures + 1
                if failures:
                    self._set_health("failing")
                    await trio.sleep(self._backoff_s(failures))

    async def _house(self, task_status: trio.TaskStatus[Crowd]) -> None:
        """One child, from its start to its end."""
        async with self._spawner.open() as child:
            crowd = Crowd(
                child,
                self._backlog,
                self._limits,
                self.tally,
                room=self._room,
                on_change=self._on_change,
            )
            self._crowds.append(crowd)
            task_status.started(crowd)
            self._set_health("warm")
            try:
                await crowd.serve()
            finally:
                self._crowds.remove(crowd)
                self.wake()  # the room it took is free for its successor

    def _backoff_s(self, failures: int) -> float:
        longest_s = min(BACKOFF_FIRST_S * 2 ** min(failures - 1, 10), BACKOFF_MOST_S)
        return self._rng.uniform(longest_s / 2, longest_s)

    def _set_health(self, health: Health) -> None:
        self.health = health
        self._on_change()
