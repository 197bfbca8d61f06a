"""Feeding: the broker's way to the log. It begins once the log is reached and ends first when draining."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import structlog
import trio

from taskd.clock import Clock
from taskd.config.schema import BrokerConfig
from taskd.daemon import settings
from taskd.errors import LogUnavailable
from taskd.inflight.writer import Inflight
from taskd.ingest.loop import Ingest
from taskd.ingest.overflow import Overflow
from taskd.log.base import Log, Outgoing, Position, Reader, Writer
from taskd.log.embedded import open_embedded
from taskd.log.kafka import KafkaLog

LOG_RETRY_S = (0.5, 30.0)  # first and longest pause before the log is tried again

log = structlog.get_logger("taskd.broker")


class Feeding:
    """Opens the log's reader and writer, runs ingest between them, and is the outlet for what is published.

    `reader` and `ingest` are None until the log was reached; `ended` is set when nothing is read any more.
    """

    def __init__(self, config: BrokerConfig, clock: Clock, activation_log: Log, inflight: Inflight) -> None:
        self.reader: Reader | None = None
        self.ingest: Ingest | None = None
        self.ended = trio.Event()
        self._config = config
        self._clock = clock
        self._log = activation_log
        self._inflight = inflight
        self._writer: Writer | None = None

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        """Where retries and dead letters go; until the log is there, every answer says that it is not."""
        if self._writer is None:
            return [LogUnavailable("the log is not connected yet") for _ in records]
        return await self._writer.append(records)

    async def run(self) -> None:
        """Feed until `stop`, then stay for what is still to be published, until cancelled."""
        wanted = self._config.log
        topic = next(iter(wanted.consumed.values()))
        try:
            await self._ensure_topics()
            async with (
                self._log.open_writer() as writer,
                self._log.open_reader(
                    list(wanted.consumed), topic.consumer_group, offset_reset=topic.offset_reset
                ) as reader,
            ):
                self._writer, self.reader = writer, reader
                self.ingest = Ingest(
                    reader,
                    self._inflight,
                    self._clock,
                    limits=settings.limits(self._config),
                    batch_max_records=self._config.ingest.batch_max_records,
                    overflow=self._overflow(),
                )
                await self.ingest.run()
                self.ended.set()
                await trio.sleep_forever()
        finally:
            self._writer = None
            self.ended.set()

    def _overflow(self) -> Overflow | None:
        share = self._config.ingest.max_application_share
        if share == 1:
            return None
        return Overflow(
            self._inflight,
            self.append,
            max_rows=max(int(self._config.store.max_pending_count * share), 1),
            topic=self._config.ingest.overflow_topic,
        )

    def set_config(self, config: BrokerConfig) -> None:
        """What ingest reads anew holds from the next batch on."""
        self._config = config
        if self.ingest is not None:
            self.ingest.set_limits(settings.limits(config))

    async def stop(self) -> None:
        """Read nothing more, and wait until what was read is stored and committed."""
        if self.ingest is not None:
            self.ingest.stop()
            await self.ended.wait()

    async def _ensure_topics(self) -> None:
        if not self._config.log.create_missing_topics:
            return
        pause_s, longest_s = LOG_RETRY_S
        while True:
            try:
                await self._log.ensure_topics(settings.topics(self._config))
            except LogUnavailable as error:
                log.warning("the log cannot be reached, trying again", error=str(error), pause_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)
            else:
                return


@asynccontextmanager
async def open_log(config: BrokerConfig, clock: Clock) -> AsyncIterator[Log]:
    wanted = config.log
    if wanted.kind == "embedded":
        async with open_embedded(
            config.data_dir,
            partitions=wanted.default_partitions,
            retention_s=wanted.embedded.retention_s,
            max_record_bytes=wanted.max_record_bytes,
            clock=clock,
            lock=False,  # the broker holds it for its store already
        ) as opened:
            yield opened
    else:
        yield KafkaLog(
            wanted.clusters[wanted.cluster_of(wanted.deadletter_topic)].address,
            max_message_bytes=wanted.max_record_bytes,
        )
