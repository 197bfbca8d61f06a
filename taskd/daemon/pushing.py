"""Push delivery, put together: whom it calls, signed and encrypted as configured."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from taskd.clock import Clock
from taskd.config.schema import BrokerConfig
from taskd.dispatch.parking import PushParking, UnknownTasks
from taskd.dispatch.push import Connect, PushClient, PushDispatch, PushSettings
from taskd.dispatch.roster import Roster
from taskd.inflight.writer import Inflight
from taskd.rpc.access import Access
from taskd.rpc.client import connect
from taskd.upkeep.duties import Duty
from taskd.wire.signing import Secrets


def push_dispatch(
    config: BrokerConfig,
    clock: Clock,
    inflight: Inflight,
    draining: trio.Event,
    secrets: Secrets,
    context: ssl.SSLContext | None,
) -> PushDispatch | None:
    """None when delivery is pull. `context`: of calls to URLs that begin with https."""
    if config.dispatch.mode == "pull":
        return None
    push = config.push
    settings = PushSettings(push.timeout_s, push.max_in_flight_per_worker)
    return PushDispatch(inflight, _connect(context, clock, secrets), draining, push.worker_map, settings)


def parking_duty(
    inflight: Inflight,
    push: PushDispatch | None,
    roster: Roster,
    *,
    limit: int,
    every_s: Callable[[], float],
    parks_unknown: bool = True,
) -> Duty:
    """Push parks applications, workers that fetch have tasks parked that none of them knows."""
    parking: PushParking | UnknownTasks
    if push is not None:
        parking = PushParking(inflight, push.served, limit=limit)
    else:
        parking = UnknownTasks(inflight, roster, limit=limit, parks=parks_unknown)
    return Duty("park", parking.round, limit, every_s)


def _connect(context: ssl.SSLContext | None, clock: Clock, secrets: Secrets) -> Connect:
    def connect_to(url: str) -> AbstractAsyncContextManager[PushClient]:
        scheme, _, address = url.partition("://")
        access = Access(secrets, context if scheme == "https" else None)
        return connect(address, access, clock=clock)

    return connect_to
