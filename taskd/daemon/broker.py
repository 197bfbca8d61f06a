"""The broker: opens its parts from the outside in, introduces them to each other, drains and closes them.

asyncio loop > lock > store > log > serving (RPC, HTTP, upkeep) > feeding (ingest). Feeding starts when
the log can be reached; until then the broker serves what it has and `/readyz` says what it waits for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import structlog
import trio

from taskd import aio
from taskd.activation.lifecycle import HELD
from taskd.admin.inspect import Inspect
from taskd.clock import Clock, SystemClock
from taskd.config.schema import BrokerConfig
from taskd.daemon import measure
from taskd.daemon.health import BrokerHealth
from taskd.database import hold_lock
from taskd.dispatch.stream import StreamDispatch
from taskd.dispatch.unary import UnaryDispatch
from taskd.errors import LogUnavailable
from taskd.inflight.base import Policy
from taskd.inflight.presence import Presence
from taskd.inflight.writer import Inflight, open_inflight
from taskd.ingest.backpressure import Limits
from taskd.ingest.loop import Ingest
from taskd.log.base import Log, Outgoing, Position, Writer
from taskd.log.embedded import open_embedded
from taskd.log.kafka import KafkaLog
from taskd.producer.service import LogService
from taskd.rpc.base import Services
from taskd.rpc.health import health_services
from taskd.rpc.server import serve
from taskd.telemetry import metrics
from taskd.upkeep.duties import Upkeep
from taskd.upkeep.publish import Publisher, Topics
from taskd.upkeep.table import UpkeepSettings, broker_duties
from taskd.web.server import serve_http
from taskd.wire import consumer

LOCK_FILE = "broker.lock"  # one broker for each data folder
STORE_FILE = "inflight.sqlite"
LOG_RETRY_S = (0.5, 30.0)  # first and longest pause before the log is tried again
FLUSH_WITHIN_S = 3.0  # for the batch in hand when feeding stops
NAMED_AT_MOST = 20  # ids named when a drain leaves some

log = structlog.get_logger("taskd.broker")


class BrokerAddresses(NamedTuple):
    rpc_port: int
    http_port: int


class Outlet:
    """Where retries and dead letters are appended; until the log is there, it answers that it is not."""

    def __init__(self) -> None:
        self.writer: Writer | None = None

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        if self.writer is None:
            return [LogUnavailable("the log is not connected yet") for _ in records]
        return await self.writer.append(records)


async def run_broker(
    config: BrokerConfig,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[BrokerAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a broker until `stop`, then drain. Started once everything listens.

    Raises StartupError when the data folder or a port cannot be had.
    """
    clock = SystemClock()
    metrics.asyncio_errors_from(lambda: aio.unhandled_errors)
    with hold_lock(config.data_dir / LOCK_FILE):
        async with aio.open_loop():
            await _run_locked(config, clock, stop, task_status)


async def _run_locked(
    config: BrokerConfig, clock: Clock, stop: trio.Event, task_status: trio.TaskStatus[BrokerAddresses]
) -> None:
    async with (
        _open_log(config, clock) as activation_log,
        open_inflight(
            config.data_dir / STORE_FILE, clock, _policy(config), on_batch=measure.committed
        ) as inflight,
    ):
        broker = Broker(config, clock, activation_log, inflight)
        await broker.run(stop, task_status)


class Broker:
    def __init__(self, config: BrokerConfig, clock: Clock, activation_log: Log, inflight: Inflight) -> None:
        self._config = config
        self._clock = clock
        self._log = activation_log
        self._inflight = inflight
        self._draining = trio.Event()
        self._outlet = Outlet()
        self._fed = trio.Event()
        presence = Presence(clock)
        publisher = Publisher(
            inflight,
            self._outlet.append,
            clock,
            Topics(config.log.deadletter_topic, config.log.retry_topic),
            limit=config.upkeep.max_rows_per_round,
            strict_order_namespaces=frozenset(config.dispatch.strict_order_namespaces),
        )
        duties = broker_duties(inflight, publisher, presence, clock, _upkeep_settings(config))
        self._upkeep = Upkeep(duties, clock)
        self._health = BrokerHealth(clock, self._upkeep, self._draining)
        self._unary = UnaryDispatch(inflight, self._draining)
        self._stream = StreamDispatch(
            inflight,
            presence,
            self._draining,
            lease_ms=_ms(config.dispatch.lease_s),
            max_assignments_per_frame=config.dispatch.max_assignments_per_frame,
        )
        inflight.observers.append(measure.count)

    async def run(self, stop: trio.Event, task_status: trio.TaskStatus[BrokerAddresses]) -> None:
        rpc, http = self._config.rpc, self._config.http
        async with (
            serve(
                self._services(), rpc.host, rpc.port, max_request_bytes=self._config.max_request_bytes
            ) as rpc_port,
            trio.open_nursery() as serving,
        ):
            http_port = await serving.start(serve_http, http.host, http.port, self._health)
            serving.start_soon(self._upkeep.run)
            serving.start_soon(measure.keep_gauges, self._inflight, lambda: self._health.reader)
            serving.start_soon(self._feed)
            log.info(
                "broker listens",
                rpc=f"{rpc.host}:{rpc_port}",
                http=f"{http.host}:{http_port}",
                log=self._config.log.kind,
                store=self._inflight.store_id,
            )
            task_status.started(BrokerAddresses(rpc_port, http_port))
            await stop.wait()
            await self._drain()
            serving.cancel_scope.cancel()

    def _services(self) -> Services:
        known = {"": self._health.serving, consumer.SERVICE: self._health.serving}
        services = {
            **self._unary.services,
            **self._stream.services,
            **Inspect(self._inflight).services,
            **health_services(lambda name: known[name]() if name in known else None),
        }
        if self._config.log.kind == "embedded":
            consumed = frozenset(
                {self._config.log.topic, self._config.log.retry_topic or self._config.log.topic}
            )
            services.update(LogService(self._outlet, consumed).services)
        return services

    # ---- feeding

    async def _feed(self) -> None:
        settings = self._config.log
        try:
            await self._ensure_topics()
            async with (
                self._log.open_writer() as writer,
                self._log.open_reader(
                    [settings.topic], settings.consumer_group, offset_reset=settings.offset_reset
                ) as reader,
            ):
                self._outlet.writer = writer
                ingest = Ingest(
                    reader,
                    self._inflight,
                    self._clock,
                    limits=_limits(self._config),
                    batch_max_records=self._config.ingest.batch_max_records,
                )
                self._health.reader, self._health.ingest = reader, ingest
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._stop_feeding, ingest)
                    await ingest.run()
                    self._fed.set()
                    await trio.sleep_forever()  # upkeep still publishes
        finally:
            self._outlet.writer = None
            self._fed.set()

    async def _stop_feeding(self, ingest: Ingest) -> None:
        await self._draining.wait()
        ingest.stop()

    async def _ensure_topics(self) -> None:
        if not self._config.log.create_missing_topics:
            return
        pause_s, longest_s = LOG_RETRY_S
        while True:
            try:
                await self._log.ensure_topics(_topics(self._config))
            except LogUnavailable as error:
                log.warning("the log cannot be reached, trying again", error=str(error), pause_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)
            else:
                return

    # ---- draining

    async def _drain(self) -> None:
        """Stop reading and handing out; keep taking results until nothing is held or the grace is over."""
        log.info("draining", grace_s=self._config.drain_grace_s)
        wake = self._inflight.watch_all()
        self._draining.set()
        with trio.move_on_after(max(FLUSH_WITHIN_S, self._config.drain_grace_s)):
            if self._health.ingest is not None:
                await self._fed.wait()
            with trio.move_on_after(self._config.drain_grace_s):
                while self._held():
                    await wake.wait()
        if self._held():
            left = await self._inflight.held_ids(NAMED_AT_MOST)
            log.warning("stopping while workers still hold activations", count=self._held(), ids=left)
        log.info("drained")

    def _held(self) -> int:
        return sum(count for status, count in self._inflight.counts().items() if status in HELD)


@asynccontextmanager
async def _open_log(config: BrokerConfig, clock: Clock) -> AsyncIterator[Log]:
    settings = config.log
    if settings.kind == "embedded":
        embedded = settings.embedded
        async with open_embedded(
            config.data_dir,
            partitions=embedded.partitions,
            retention_s=embedded.retention_s,
            max_record_bytes=embedded.max_record_bytes,
            clock=clock,
            lock=False,  # the broker holds it for its store already
        ) as opened:
            yield opened
    else:
        kafka = settings.kafka
        yield KafkaLog(
            kafka.address,
            session_timeout_ms=kafka.session_timeout_ms,
            max_message_bytes=kafka.max_message_bytes,
        )


def _topics(config: BrokerConfig) -> Mapping[str, int]:
    names = {config.log.topic, config.log.retry_topic or config.log.topic, config.log.deadletter_topic}
    return dict.fromkeys(sorted(names), config.log.embedded.partitions)


def _policy(config: BrokerConfig) -> Policy:
    store, dispatch = config.store, config.dispatch
    return Policy(
        max_processing_attempts=store.max_processing_attempts,
        max_processing_deadline_ms=_ms_or_none(store.max_processing_deadline_s),
        max_delay_ms=_ms_or_none(store.max_delay_s),
        grace_ms=_ms(dispatch.processing_deadline_grace_s),
        strict_order_namespaces=frozenset(dispatch.strict_order_namespaces),
    )


def _limits(config: BrokerConfig) -> Limits:
    store = config.store
    return Limits(
        max_pending_count=store.max_pending_count,
        max_delay_count=store.max_delay_count,
        max_processing_count=store.max_processing_count,
        max_size_bytes=store.max_size_bytes,
    )


def _upkeep_settings(config: BrokerConfig) -> UpkeepSettings:
    return UpkeepSettings(
        interval_s=config.upkeep.interval_s,
        startup_quiet_ms=_ms(config.upkeep.startup_quiet_s),
        max_rows=config.upkeep.max_rows_per_round,
        lease_ms=_ms(config.dispatch.lease_s),
        tombstone_ttl_ms=_ms(config.store.tombstone_ttl_s),
        tombstone_max_count=config.store.tombstone_max_count,
    )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _ms_or_none(seconds: float | None) -> int | None:
    return None if seconds is None else _ms(seconds)
