"""Keeps the store's file in order: what is over goes, room is given back, a disk that failed is looked at."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from taskd.clock import Clock
from taskd.errors import StoreError
from taskd.inflight.writer import Inflight

VACUUM_PAGES = 256  # given back to the disk in one go: a millisecond or two that others wait
WAL_WARNING_BYTES = 256 * 1024 * 1024  # four times of where it is cut back when nobody reads

log = structlog.get_logger("taskd.upkeep")


class Expiry:
    """What expired is ended, unless the wall clock was set a short while ago."""

    def __init__(self, inflight: Inflight, clock: Clock, *, limit: int) -> None:
        self._inflight = inflight
        self._clock = clock
        self._limit = limit
        self._may_expire = True

    async def round(self) -> int:
        was, self._may_expire = self._may_expire, self._clock.now().may_expire
        if was != self._may_expire:
            log.warning(
                "expiry goes on"
                if self._may_expire
                else "the wall clock was set: expiry pauses for 5 minutes"
            )
        return await self._inflight.expire(self._limit)


class Tombstones:
    """Ids that finished are forgotten after a time, but not while their records may be read again.

    While the log is away, so is the offset that says that they were stored: when it is back, they come
    again. So from then on they are remembered for their time once more.
    """

    def __init__(
        self,
        inflight: Inflight,
        clock: Clock,
        *,
        ttl_ms: Callable[[], int],
        max_count: Callable[[], int],
        limit: int,
        log_away: Callable[[], bool],
    ) -> None:
        self._inflight = inflight
        self._clock = clock
        self._ttl_ms = ttl_ms
        self._max_count = max_count
        self._limit = limit
        self._log_away = log_away
        self._keep_until_mono_ms = 0

    async def round(self) -> int:
        now, ttl_ms = self._clock.now(), self._ttl_ms()
        if self._log_away():
            self._keep_until_mono_ms = now.mono_ms + ttl_ms
        if now.mono_ms < self._keep_until_mono_ms:
            ttl_ms = now.wall_ms  # none is so old
        return await self._inflight.forget(ttl_ms, self._max_count(), self._limit)


class Disk:
    """Room that is given back, and a disk that takes nothing until it does again."""

    def __init__(self, inflight: Inflight) -> None:
        self._inflight = inflight
        self._told = ""

    async def vacuum(self) -> int:
        if self._inflight.wal_bytes > WAL_WARNING_BYTES:
            log.warning(
                "the write-ahead log cannot be cut back: end the process that keeps a read transaction open",
                bytes=self._inflight.wal_bytes,
            )
        return await self._inflight.shrink(VACUUM_PAGES)

    async def resume(self) -> int:
        try:
            await self._inflight.probe()
        except StoreError as error:
            if self._told != self._inflight.trouble:
                log.error("the store takes nothing, looking again every round", reason=str(error))
        self._told = self._inflight.trouble
        return 0
