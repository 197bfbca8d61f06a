"""The line that `systemctl status` shows: how much there is, how fast it goes, and who is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import trio

from taskd.activation.lifecycle import HELD, WAITING, Event, Status
from taskd.daemon import notify
from taskd.inflight.sqlite import Changes

EVERY_S = 5.0  # at most; and only when the line is another one


class WorkerPart(Protocol):
    """What a worker's line is made of; a `Pool`."""

    @property
    def running(self) -> int: ...
    @property
    def ended(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def capacity(self) -> tuple[int, int]:
        """Slots, and places for async tasks."""
        ...

    @property
    def brokers(self) -> tuple[int, int]:
        """Connected, and all."""
        ...


async def keep_status(describe: Callable[[], str], environ: Mapping[str, str] | None = None) -> None:
    """Tell systemd what `describe` says, from now on until cancelled. Returns at once when nobody listens."""
    if not notify.listens(environ):
        return
    told = ""
    while True:
        if (line := describe()) != told:
            notify.tell(f"STATUS={line}", environ)
            told = line
        await trio.sleep(EVERY_S)


class Rate:
    """How fast a count grows, between two looks at it."""

    def __init__(self) -> None:
        self._count = 0
        self._at = trio.current_time()

    def look(self, count: int) -> int:
        """Per second, since the last look."""
        now = trio.current_time()
        grown, passed_s = count - self._count, now - self._at
        self._count, self._at = count, now
        return round(grown / passed_s) if passed_s > 0 else 0


class WorkerStatus:
    def __init__(self, pool: WorkerPart, stop: trio.Event) -> None:
        self._pool = pool
        self._stop = stop
        self._rate = Rate()

    def __call__(self) -> str:
        pool = self._pool
        connected, brokers = pool.brokers
        slots, places = pool.capacity
        return (
            f"{'draining: ' if self._stop.is_set() else ''}"
            f"{slots} slots{f' and {places} async' if places else ''}, "
            f"{pool.running} running, {pool.waiting} waiting, "
            f"{self._rate.look(pool.ended)} tasks/s, {connected} of {brokers} brokers connected"
        )


class BrokerStatus:
    """`observe` is told what the store committed; `counts`: rows by status; `workers`: that are connected."""

    def __init__(
        self, counts: Callable[[], Mapping[Status, int]], workers: Callable[[], int], draining: trio.Event
    ) -> None:
        self._counts = counts
        self._workers = workers
        self._draining = draining
        self._arrived_count = self._ended_count = 0
        self._arrived, self._ended = Rate(), Rate()

    def observe(self, changes: Changes) -> None:
        for (event, _), times in changes.events.items():
            if event is Event.SETTLED:
                self._ended_count += times
            elif event in _ARRIVALS:
                self._arrived_count += times

    def __call__(self) -> str:
        counts = self._counts()
        return (
            f"{'draining: ' if self._draining.is_set() else ''}"
            f"{sum(counts.get(status, 0) for status in WAITING)} waiting, "
            f"{sum(counts.get(status, 0) for status in HELD)} with workers, "
            f"{self._arrived.look(self._arrived_count)}/s come, {self._ended.look(self._ended_count)}/s end, "
            f"{self._workers()} workers connected"
        )


_ARRIVALS = frozenset(event for event in Event if event.value.startswith("arrived"))
