"""Feeding: the broker's way to the log. It begins once the log is reached and ends first when draining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import structlog
import trio

from taskd.clock import Clock
from taskd.config.schema import BrokerConfig
from taskd.daemon import logs, settings
from taskd.errors import LogUnavailable
from taskd.inflight.writer import Inflight
from taskd.ingest.loop import Ingest
from taskd.ingest.overflow import Overflow
from taskd.ingest.raw import decoder
from taskd.log.base import Log, Outgoing, Position, Reader, Writer
from taskd.log.several import SeveralReaders, SeveralWriters

LOG_RETRY_S = (0.5, 30.0)  # first and longest pause before the log is tried again

log = structlog.get_logger("taskd.broker")


class Feeding:
    """Opens the logs' readers and writers, runs ingest between them, and is the outlet for what is published.

    `reader` and `ingest` are None until it began, and `reader` again at its end; `ended` is set when
    nothing is read any more.
    """

    def __init__(
        self,
        config: BrokerConfig,
        clock: Clock,
        activation_logs: Mapping[str, Log],
        inflight: Inflight,
        *,
        reads: bool = True,
    ) -> None:
        self._reads = reads
        self.reader: Reader | None = None
        self.ingest: Ingest | None = None
        self.ended = trio.Event()
        self._config = config
        self._clock = clock
        self._logs = activation_logs
        self._inflight = inflight
        self._writer: Writer | None = None

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        """Where retries and dead letters go; until the log is there, every answer says that it is not."""
        if self._writer is None:
            return [LogUnavailable("the log is not connected yet") for _ in records]
        return await self._writer.append(records)

    def away(self) -> bool:
        """Whether the log cannot be reached, or not yet."""
        return self.reader is None or not self.reader.healthy

    async def run(self) -> None:
        """Feed until `stop`, then stay for what is still to be published, until cancelled."""
        try:
            async with AsyncExitStack() as stack:
                writers = {
                    place: await stack.enter_async_context(log.open_writer())
                    for place, log in self._logs.items()
                }
                self._writer = SeveralWriters(writers, logs.place_of(self._config))
                if self._reads:
                    await self._ingest()
                await trio.sleep_forever()
        finally:
            self._writer = None
            self.ended.set()

    async def _ingest(self) -> None:
        """Read until `stop`. The groups are left at its end: what waits here is no business of theirs."""
        sources = logs.sources(self._config)
        reader = SeveralReaders([str(source) for source in sources])
        ingest = Ingest(
            reader,
            self._inflight,
            self._clock,
            limits=settings.limits(self._config),
            batch_max_records=self._config.ingest.batch_max_records,
            decode=decoder(settings.raw_tasks(self._config)),
            overflow=self._overflow(),
        )
        wanted = logs.wanted_topics(self._config)
        async with trio.open_nursery() as nursery:
            for place in self._logs:
                ready = trio.Event()
                nursery.start_soon(self._ensure_topics, place, wanted.get(place, {}), ready)
                for source in sources:
                    if source.place == place:
                        nursery.start_soon(self._follow, source, reader, ready)
            self.reader, self.ingest = reader, ingest
            await ingest.run()
            self.reader = None
            self.ended.set()
            nursery.cancel_scope.cancel()

    async def _follow(self, source: logs.Source, reader: SeveralReaders, ready: trio.Event) -> None:
        await ready.wait()
        async with source.open(self._logs[source.place]) as opened:
            await reader.follow(str(source), source.topics, opened)

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

    async def _ensure_topics(self, place: str, topics: Mapping[str, int], ready: trio.Event) -> None:
        """Create what is missing, once the log can be reached; without it, nothing is known to read."""
        pause_s, longest_s = LOG_RETRY_S
        while self._config.log.create_missing_topics:
            try:
                await self._logs[place].ensure_topics(topics)
            except LogUnavailable as error:
                log.warning("the log cannot be reached, trying again", error=str(error), pause_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)
            else:
                break
        ready.set()
