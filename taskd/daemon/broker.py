"""The broker: opens its parts from the outside in, introduces them to each other, drains and closes them.

asyncio loop > lock > store > log > serving (RPC, HTTP, upkeep) > feeding (ingest). Feeding starts when
the log can be reached; until then the broker serves what it has and `/readyz` says what it waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import structlog
import trio

from taskd import aio
from taskd.activation.lifecycle import HELD
from taskd.admin.inspect import Inspect
from taskd.clock import Clock, SystemClock
from taskd.config import live
from taskd.config.schema import BrokerConfig
from taskd.daemon import measure, notify, reload, settings, status
from taskd.daemon.certificates import BROKER, Certificates, ReadOnce
from taskd.daemon.feeding import Feeding
from taskd.daemon.health import BrokerHealth
from taskd.daemon.locks import hold_data
from taskd.daemon.logs import open_logs
from taskd.daemon.operators import Operators
from taskd.daemon.pushing import parking_duty, push_dispatch
from taskd.daemon.store_check import StoreCheck
from taskd.dispatch.roster import Roster
from taskd.dispatch.stream import StreamDispatch
from taskd.dispatch.unary import UnaryDispatch
from taskd.inflight.presence import Presence
from taskd.inflight.quarantine import set_aside_if_damaged
from taskd.inflight.writer import Inflight, open_inflight
from taskd.log.base import Log
from taskd.producer.service import LogService
from taskd.rpc.access import revealed, server_guard
from taskd.rpc.base import Services
from taskd.rpc.health import health_services
from taskd.rpc.limits import Keepalive
from taskd.rpc.server import serve
from taskd.telemetry import metrics
from taskd.telemetry.logs import setup_logging
from taskd.upkeep.duties import Upkeep
from taskd.upkeep.evacuation import evacuation_duty
from taskd.upkeep.publish import Publisher, Topics
from taskd.upkeep.table import broker_duties
from taskd.web.server import serve_http
from taskd.wire import consumer

FLUSH_WITHIN_S = 3.0  # for the batch in hand when feeding stops
NAMED_AT_MOST = 20  # ids named when a drain leaves some

log = structlog.get_logger("taskd.broker")


class BrokerAddresses(NamedTuple):
    rpc_port: int
    http_port: int


async def run_broker(
    config: BrokerConfig,
    *,
    stop: trio.Event,
    reloads: reload.Reloads[BrokerConfig] | None = None,
    task_status: trio.TaskStatus[BrokerAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a broker until `stop`, then drain. Started once everything listens.

    `reloads` says when the configuration is to be read again.
    Raises StartupError when the data folder or a port cannot be had, StoreDamaged when the store is.
    """
    clock = SystemClock()
    metrics.asyncio_errors_from(lambda: aio.unhandled_errors)
    notify.tell("STATUS=opening the store")
    with hold_data(config):
        async with aio.open_loop():
            await _run_locked(config, clock, stop, reloads, task_status)


async def _run_locked(
    config: BrokerConfig,
    clock: Clock,
    stop: trio.Event,
    reloads: reload.Reloads[BrokerConfig] | None,
    task_status: trio.TaskStatus[BrokerAddresses],
) -> None:
    path, how = settings.store_path(config), config.store.integrity_check
    checked = set_aside_if_damaged(path, how, clock.now(), within_s=config.store.integrity_check_within_s)
    async with (
        open_logs(config, clock) as activation_logs,
        open_inflight(path, clock, settings.policy(config), on_batch=measure.committed) as inflight,
    ):
        if checked.aside is not None:
            inflight.notice = f"began anew, the damaged file is {checked.aside}: run `taskd recover`"
        check = StoreCheck(path, how, checked, inflight)
        broker = Broker(config, clock, activation_logs, inflight, check=check)
        await broker.run(stop, reloads, task_status)


class Broker:
    def __init__(
        self,
        config: BrokerConfig,
        clock: Clock,
        activation_logs: Mapping[str, Log],
        inflight: Inflight,
        *,
        check: StoreCheck | None = None,
        evacuates: bool = False,
    ) -> None:
        self._check = check
        self._config = config
        self._clock = clock
        self._inflight = inflight
        self._draining = trio.Event()
        self._secrets = revealed(config.rpc.secrets)
        self._certificates = Certificates(config, BROKER)
        self._read_once = ReadOnce(config)
        self._feeding = Feeding(config, clock, activation_logs, inflight, reads=not evacuates)
        presence = Presence(clock)
        publisher = _publisher(config, clock, inflight, self._feeding)
        duties = broker_duties(
            inflight,
            publisher,
            presence,
            clock,
            lambda: settings.upkeep_settings(self._config),
            self._feeding.away,
        )
        calls = self._certificates.contexts.get("push.tls")
        self._push = push_dispatch(config, clock, inflight, self._draining, self._secrets, calls)
        roster = Roster(clock)
        parks_unknown = config.dispatch.unknown_tasks == "park"
        duties.append(
            parking_duty(
                inflight,
                self._push,
                roster,
                limit=config.upkeep.max_rows_per_round,
                every_s=lambda: self._config.upkeep.interval_s,
                parks_unknown=parks_unknown,
            )
        )
        self._stream = StreamDispatch(
            inflight,
            presence,
            roster,
            self._draining,
            lease_ms=settings.milliseconds(config.dispatch.lease_s),
            max_assignments_per_frame=config.dispatch.max_assignments_per_frame,
            hands_out=self._push is None,
            parks_unknown=parks_unknown,
        )
        self._operators = Operators(
            config,
            clock,
            inflight,
            activation_logs,
            self._feeding.append,
            self._stream.stop_leases,
            publisher.forbidden,
        )
        duties += self._operators.duties
        if evacuates:
            self._draining.set()
            duties.append(evacuation_duty(inflight, config.upkeep.max_rows_per_round))
        self._upkeep = Upkeep(duties, clock)
        self._health = BrokerHealth(clock, self._upkeep, self._feeding, inflight, self._draining, self._push)
        self._unary = UnaryDispatch(inflight, roster, self._draining, hands_out=self._push is None)
        self._status = status.BrokerStatus(
            inflight.counts, lambda: self._stream.connected_workers, self._draining
        )
        inflight.observers += [measure.count, self._status.observe]
        inflight.trace(config.log_level == "debug")

    async def run(
        self,
        stop: trio.Event,
        reloads: reload.Reloads[BrokerConfig] | None,
        task_status: trio.TaskStatus[BrokerAddresses],
    ) -> None:
        rpc, http, contexts = self._config.rpc, self._config.http, self._certificates.contexts
        async with (
            serve(
                self._services(),
                rpc.host,
                rpc.port,
                max_request_bytes=self._config.max_request_bytes,
                guard=server_guard(self._secrets, self._clock, self._operators.rpc_secrets),
                tls=contexts.get("rpc.tls"),
                keepalive=Keepalive(time_s=rpc.keepalive_s),
                max_connections=rpc.max_connections,
            ) as rpc_port,
            trio.open_nursery() as serving,
        ):
            http_port = await serving.start(
                partial(serve_http, tls=contexts.get("http.tls")), http.host, http.port, self._health
            )
            await serving.start(self._operators.run)
            serving.start_soon(self._upkeep.run)
            if self._check is not None:
                serving.start_soon(self._check.run)
            serving.start_soon(measure.watch_loop)
            serving.start_soon(measure.keep_gauges, self._inflight, lambda: self._feeding.reader)
            serving.start_soon(self._feeding.run)
            if self._push is not None:
                serving.start_soon(self._push.run)
            serving.start_soon(notify.keep_watchdog, self._health.stuck)
            serving.start_soon(status.keep_status, self._status)
            if reloads is not None:
                serving.start_soon(reload.follow, reloads, lambda: self._config, self._apply, live.BROKER)
            log.info(
                "broker listens",
                rpc=f"{rpc.host}:{rpc_port}",
                http=f"{http.host}:{http_port}",
                log=self._config.log.kind,
                store=self._inflight.store_id,
            )
            task_status.started(BrokerAddresses(rpc_port, http_port))
            notify.tell("READY=1")
            await stop.wait()
            notify.tell("STOPPING=1")
            await self._drain()
            serving.cancel_scope.cancel()

    def _apply(self, config: BrokerConfig) -> None:
        """Let this configuration hold from now on, in what can change while running."""
        was, self._config = self._config, config
        self._inflight.set_policy(settings.policy(config))
        self._operators.reload(config)
        self._feeding.set_config(config)
        self._secrets.replace(revealed(config.rpc.secrets))
        self._certificates.renew(config)
        self._read_once.tell()
        if self._push is not None:
            self._push.settings.timeout_s = config.push.timeout_s
            self._push.remap(config.push.worker_map)
        self._stream.max_assignments_per_frame = config.dispatch.max_assignments_per_frame
        if (was.log_level, was.log_format) != (config.log_level, config.log_format):
            setup_logging(config.log_level, config.log_format)
        self._inflight.trace(config.log_level == "debug")

    def _services(self) -> Services:
        known = {"": self._health.serving, consumer.SERVICE: self._health.serving}
        services = {
            **self._unary.services,
            **self._stream.services,
            **Inspect(self._inflight).services,
            **self._operators.rpc_services,
            **health_services(lambda name: known[name]() if name in known else None),
        }
        if self._config.log.kind == "embedded":
            services.update(LogService(self._feeding, frozenset(self._config.log.consumed)).services)
        return services

    # ---- draining

    async def _drain(self) -> None:
        """Stop reading and handing out; keep taking results until nothing is held or the grace is over."""
        log.info("draining", grace_s=self._config.drain_grace_s)
        wake = self._inflight.watch_all()
        self._draining.set()
        with trio.move_on_after(max(FLUSH_WITHIN_S, self._config.drain_grace_s)):
            await self._feeding.stop()
            with trio.move_on_after(self._config.drain_grace_s):
                while self._held():
                    await wake.wait()
        if self._held():
            left = await self._inflight.held_ids(NAMED_AT_MOST)
            log.warning("stopping while workers still hold activations", count=self._held(), ids=left)
        log.info("drained")

    def _held(self) -> int:
        return sum(count for status, count in self._inflight.counts().items() if status in HELD)


def _publisher(config: BrokerConfig, clock: Clock, inflight: Inflight, feeding: Feeding) -> Publisher:
    topics = Topics(config.log.deadletter_topic, config.log.retries_to, frozenset(settings.raw_tasks(config)))
    return Publisher(
        inflight,
        feeding.append,
        clock,
        topics,
        limit=config.upkeep.max_rows_per_round,
        strict_order_namespaces=frozenset(config.dispatch.strict_order_namespaces),
    )
