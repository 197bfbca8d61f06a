"""Scale-in: a broker that reads nothing, sends what waits back to the log, and waits for what runs.

Others of the group read it there. Delays and expiry count from when an activation was received, so they stay
what they were. What workers run is waited for: they report here as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from taskd import aio
from taskd.activation.lifecycle import Status
from taskd.clock import SystemClock
from taskd.config.schema import BrokerConfig
from taskd.daemon import logs, settings
from taskd.daemon.broker import Broker
from taskd.daemon.locks import hold_data
from taskd.errors import ConfigError
from taskd.inflight.base import Left
from taskd.inflight.writer import Inflight, open_inflight

NAMED_AT_MOST = 20


async def evacuate(config: BrokerConfig, *, grace_s: float, stop: trio.Event) -> Sequence[Left]:
    """Empty the store, until `grace_s` is over or `stop`; returns some of what is left, nothing when empty.

    Raises ConfigError with the embedded log, which nobody else reads, and StartupError as a broker does.
    """
    if config.log.kind == "embedded":
        raise ConfigError(
            "evacuate sends what waits back to Kafka, for other brokers; an embedded log is read "
            "by its own broker alone. To move it to another machine, use `taskd backup` and `taskd restore`."
        )
    clock = SystemClock()
    quiet = config.upkeep.model_copy(update={"startup_quiet_s": 0.0})
    config = config.model_copy(update={"upkeep": quiet, "drain_grace_s": 0.0})
    with hold_data(config):
        async with (
            aio.open_loop(),
            logs.open_logs(config, clock) as activation_logs,
            open_inflight(settings.store_path(config), clock, settings.policy(config)) as inflight,
        ):
            broker = Broker(config, clock, activation_logs, inflight, evacuates=True)
            async with trio.open_nursery() as nursery:
                empty = trio.Event()
                nursery.start_soon(_end, inflight, grace_s, stop, empty)
                await broker.run(empty, None, trio.TASK_STATUS_IGNORED)
                nursery.cancel_scope.cancel()
            left = await inflight.left(NAMED_AT_MOST)
    return left


async def _end(inflight: Inflight, grace_s: float, stop: trio.Event, end: trio.Event) -> None:
    """Set `end` once the store is empty, the grace is over, or somebody wants to stop."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_empty, inflight, nursery.cancel_scope)
        with trio.move_on_after(grace_s):
            await stop.wait()
        nursery.cancel_scope.cancel()
    end.set()


async def _until_empty(inflight: Inflight, done: trio.CancelScope) -> None:
    wake = inflight.watch_all()
    while any(count for status, count in inflight.counts().items() if status is not Status.GONE):
        await wake.wait()
    done.cancel()
