"""The table of duties of a broker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from taskd.activation.lifecycle import Status
from taskd.clock import Clock
from taskd.errors import StoreError
from taskd.inflight.presence import Presence
from taskd.inflight.writer import Inflight
from taskd.upkeep.duties import Duty
from taskd.upkeep.publish import Publisher

VACUUM_PAGES = 256  # given back to the disk in one go: a millisecond or two that others wait
WAL_WARNING_BYTES = 256 * 1024 * 1024  # four times of where it is cut back when nobody reads

log = structlog.get_logger("taskd.upkeep")


@dataclass(frozen=True, slots=True)
class UpkeepSettings:
    """Times in milliseconds unless named otherwise."""

    interval_s: float
    startup_quiet_ms: int
    max_rows: int
    lease_ms: int
    tombstone_ttl_ms: int
    tombstone_max_count: int
    vacuum_interval_s: float = 10.0


def broker_duties(
    inflight: Inflight,
    publisher: Publisher,
    presence: Presence,
    clock: Clock,
    settings: Callable[[], UpkeepSettings],
) -> list[Duty]:
    """Every duty of a broker. A new one is a function that returns how many rows it handled, and a line.

    `settings` is asked in every round, because they may change; `max_rows` counts from the beginning.
    """
    limit = settings().max_rows
    quiet_until_mono_ms = clock.now().mono_ms + settings().startup_quiet_ms

    async def become_due() -> int:
        return await inflight.become_due(limit)

    may_expire = True

    async def expire() -> int:
        nonlocal may_expire
        was, may_expire = may_expire, clock.now().may_expire
        if was != may_expire:
            log.warning(
                "expiry goes on" if may_expire else "the wall clock was set: expiry pauses for 5 minutes"
            )
        return await inflight.expire(limit)

    async def end_overdue() -> int:
        if clock.now().mono_ms < quiet_until_mono_ms:
            return 0  # workers that outlived the broker may still report
        return await inflight.end_overdue(limit)

    async def end_overdue_claims() -> int:
        if clock.now().mono_ms < quiet_until_mono_ms:
            return 0  # a worker that was pushed to before the broker died may still report
        return await inflight.end_overdue_claims(limit)

    async def end_silent() -> int:
        if clock.now().mono_ms < quiet_until_mono_ms:
            return 0
        ended, lease_ms = 0, settings().lease_ms
        for worker in presence.silent(await inflight.holders(), lease_ms):
            if not presence.is_silent(worker, lease_ms):
                continue  # it came back while the leases of others ended
            leases = await inflight.reconcile(worker, ())
            log.warning("worker is silent, its leases end", worker=worker, leases=leases)
            ended += leases
        return min(ended, limit - 1)

    async def forget() -> int:
        now = settings()
        return await inflight.forget(now.tombstone_ttl_ms, now.tombstone_max_count, limit)

    async def vacuum() -> int:
        if inflight.wal_bytes > WAL_WARNING_BYTES:
            log.warning(
                "the write-ahead log cannot be cut back: end the process that keeps a read transaction open",
                bytes=inflight.wal_bytes,
            )
        return await inflight.shrink(VACUUM_PAGES)

    told = ""

    async def resume() -> int:
        nonlocal told
        try:
            await inflight.probe()
        except StoreError as error:
            if told != inflight.trouble:
                log.error("the store takes nothing, looking again every round", reason=str(error))
        told = inflight.trouble
        return 0

    def every_s() -> float:
        return settings().interval_s

    leaving = inflight.watch(Status.RETRY, Status.FAILURE, Status.EXPIRED, Status.FORWARDED)
    return [
        Duty("publish", publisher.round, limit, every_s, leaving, publishes=True),
        publisher.forbidden.duty,
        Duty("become_due", become_due, limit, every_s),
        Duty("expire", expire, limit, every_s),
        Duty("end_overdue", end_overdue, limit, every_s),
        Duty("end_overdue_claims", end_overdue_claims, limit, every_s),
        Duty("end_silent", end_silent, limit, every_s),
        Duty("forget", forget, limit, every_s),
        Duty("relane", lambda: inflight.relane(limit), limit, every_s, inflight.limits_changed),
        Duty("bring_tokens", inflight.bring_tokens, 1, inflight.tokens_in_s, inflight.short_of_tokens),
        Duty("vacuum", vacuum, VACUUM_PAGES, lambda: settings().vacuum_interval_s),
        Duty("resume", resume, 1, every_s),
    ]
