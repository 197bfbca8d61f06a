"""Push delivery, put together: whom it calls, signed and encrypted as configured."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from taskd.clock import Clock
from taskd.config.schema import BrokerConfig
from taskd.dispatch.parking import Parking
from taskd.dispatch.push import Connect, PushClient, PushDispatch, PushSettings
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


def parking_duty(config: Callable[[], BrokerConfig], inflight: Inflight, push: PushDispatch | None) -> Duty:
    """Pull serves every application: then it only brings back what push had parked."""
    limit = config().upkeep.max_rows_per_round
    parking = Parking(inflight, push.served if push is not None else lambda: None, limit=limit)
    return Duty("park", parking.round, limit, lambda: config().upkeep.interval_s)


def _connect(context: ssl.SSLContext | None, clock: Clock, secrets: Secrets) -> Connect:
    def connect_to(url: str) -> AbstractAsyncContextManager[PushClient]:
        scheme, _, address = url.partition("://")
        access = Access(secrets, context if scheme == "https" else None)
        return connect(address, access, clock=clock)

    return connect_to
