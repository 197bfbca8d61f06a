"""The table of duties of a broker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from taskd.activation.lifecycle import Status
from taskd.clock import Clock
from taskd.inflight.presence import Presence
from taskd.inflight.writer import Inflight
from taskd.upkeep.duties import Duty
from taskd.upkeep.overdue import Overdue
from taskd.upkeep.publish import Publisher
from taskd.upkeep.storage import VACUUM_PAGES, Disk, Expiry, Tombstones


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
    log_away: Callable[[], bool] = lambda: False,
) -> list[Duty]:
    """Every duty of a broker. A new one is a method that returns how many rows it handled, and a line.

    `settings` is asked in every round, because they may change; `max_rows` counts from the beginning.
    `log_away`: whether the log that activations come from cannot be reached now.
    """
    limit = settings().max_rows
    overdue = Overdue(
        inflight,
        presence,
        clock,
        quiet_ms=settings().startup_quiet_ms,
        lease_ms=lambda: settings().lease_ms,
        limit=limit,
    )
    tombstones = Tombstones(
        inflight,
        clock,
        ttl_ms=lambda: settings().tombstone_ttl_ms,
        max_count=lambda: settings().tombstone_max_count,
        limit=limit,
        log_away=log_away,
    )
    expiry, disk = Expiry(inflight, clock, limit=limit), Disk(inflight)

    def every_s() -> float:
        return settings().interval_s

    leaving = inflight.watch(Status.RETRY, Status.FAILURE, Status.EXPIRED, Status.FORWARDED)
    return [
        Duty("publish", publisher.round, limit, every_s, leaving, publishes=True),
        publisher.forbidden.duty,
        Duty("become_due", lambda: inflight.become_due(limit), limit, every_s),
        Duty("expire", expiry.round, limit, every_s),
        Duty("end_overdue", overdue.end_leases, limit, every_s),
        Duty("end_overdue_claims", overdue.end_claims, limit, every_s),
        Duty("end_silent", overdue.end_silent, limit, every_s),
        Duty("forget", tombstones.round, limit, every_s),
        Duty("relane", lambda: inflight.relane(limit), limit, every_s, inflight.limits_changed),
        Duty("bring_tokens", inflight.bring_tokens, 1, inflight.tokens_in_s, inflight.short_of_tokens),
        Duty("vacuum", disk.vacuum, VACUUM_PAGES, lambda: settings().vacuum_interval_s),
        Duty("resume", disk.resume, 1, every_s),
    ]
