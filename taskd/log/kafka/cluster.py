"""One Kafka cluster as a log.

Each reader and each writer keeps one aiokafka client alive in a task of its own: it connects with
back-off for as long as Kafka cannot be reached, and builds a new client when one has failed for good.
Opening therefore neither waits for Kafka nor fails because of it; `healthy` tells.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import structlog

from taskd import aio  # noqa: F401 # isort: skip  # before aiokafka: it replaces functions of asyncio

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from taskd.log.kafka import noise
from taskd.log.kafka.connection import REQUEST_WITHIN_MS, Security, started, stop
from taskd.log.kafka.errors import FOREIGN, NO_IDEMPOTENCE
from taskd.log.kafka.reader import KafkaReader
from taskd.log.kafka.topics import ensure_topics
from taskd.log.kafka.writer import KafkaWriter
from taskd.log.kept import Kept
from taskd.log.limits import MAX_RECORD_BYTES, READ_MAX_BYTES
from taskd.log.scope import open_background

ASSIGNORS = {"range": RangePartitionAssignor, "roundrobin": RoundRobinPartitionAssignor}
REBALANCE_SESSIONS = 5  # a member may take so many session time-outs to give up its partitions
BATCH_BYTES = 262_144  # a record above it travels alone, so that its refusal is its own
RECORD_OVERHEAD_BYTES = 4_096
# aiokafka's fetcher looks up this often though nothing happened; what happens wakes it anyway.
FETCHER_WAKES_EVERY_MS = 5_000

log = structlog.get_logger("taskd.log.kafka")


class KafkaLog:
    """A `Log` on a Kafka cluster. Use it inside `aio.open_loop()`.

    `bootstrap`: host:port, comma separated. `session_timeout_ms`: a member silent this long loses its
    partitions. `assignor`: `roundrobin` or `range`, how a group's leader shares partitions out; both
    are eager, and brokers already in the group offer both. `idempotent`: ask the broker to drop copies
    made by repeated sends; where the broker has no such thing a warning is logged and it goes without.
    `fetch_max_wait_ms`: how long a request for records may wait at the broker when there are none.
    Raises ConfigError when a file that `security` names cannot be used.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        security: Security | None = None,
        session_timeout_ms: int = 6_000,
        assignor: str = "roundrobin",
        max_message_bytes: int = MAX_RECORD_BYTES,
        fetch_max_wait_ms: int = 500,
        client_id: str = "taskd",
        idempotent: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        self._client = {
            "bootstrap_servers": [server.strip() for server in bootstrap.split(",")],
            "client_id": client_id,
            "request_timeout_ms": REQUEST_WITHIN_MS,
            **(security or Security()).settings(),
        }
        self._session_timeout_ms = session_timeout_ms
        self._assignor = ASSIGNORS[assignor]
        self._max_message_bytes = max_message_bytes
        self._fetch_max_wait_ms = fetch_max_wait_ms
        self._idempotent = idempotent
        self._rng = rng or random.Random()
        noise.reduce()

    def open_reader(
        self,
        topics: Collection[str],
        group: str,
        *,
        offset_reset: str = "earliest",
        session_timeout_ms: int | None = None,
        group_instance_id: str | None = None,
    ) -> AbstractAsyncContextManager[KafkaReader]:
        """As `Log.open_reader`. With `group_instance_id`, unique in the group, the member is static:
        it does not leave the group with the block, and finds its partitions again when it comes back
        within the session time-out."""
        timeout_ms = session_timeout_ms or self._session_timeout_ms
        return self._open_reader(sorted(topics), group, offset_reset, timeout_ms, group_instance_id)

    @asynccontextmanager
    async def _open_reader(
        self,
        topics: list[str],
        group: str,
        offset_reset: str,
        session_timeout_ms: int,
        group_instance_id: str | None,
    ) -> AsyncIterator[KafkaReader]:
        rebalance_timeout_ms = session_timeout_ms * REBALANCE_SESSIONS

        async def make() -> AIOKafkaConsumer:
            return AIOKafkaConsumer(
                **{
                    **self._client,
                    # Joining a group is one request that lasts as long as the slowest member takes.
                    "request_timeout_ms": rebalance_timeout_ms + REQUEST_WITHIN_MS,
                },
                group_id=group,
                group_instance_id=group_instance_id,
                enable_auto_commit=False,
                auto_offset_reset=offset_reset,
                session_timeout_ms=session_timeout_ms,
                heartbeat_interval_ms=max(100, session_timeout_ms // 6),
                rebalance_timeout_ms=rebalance_timeout_ms,
                # Waiting for room is not being dead: a paused reader keeps its partitions.
                max_poll_interval_ms=2**31 - 1,
                metadata_max_age_ms=60_000,
                consumer_timeout_ms=FETCHER_WAKES_EVERY_MS,
                # Only one: aiokafka joins once for each it offers, and a group would rebalance as often.
                partition_assignment_strategy=(self._assignor,),
                fetch_max_bytes=READ_MAX_BYTES,
                fetch_max_wait_ms=self._fetch_max_wait_ms,
                max_partition_fetch_bytes=max(1 << 20, self._max_message_bytes + RECORD_OVERHEAD_BYTES),
            )

        async with open_background() as nursery:
            reader = KafkaReader(
                lambda: started(make), topics, group, self._rng, rebalance_timeout_ms / 2_000, nursery
            )
            try:
                yield reader
            finally:
                reader.leave()

    @asynccontextmanager
    async def open_writer(self) -> AsyncIterator[KafkaWriter]:
        async with open_background() as nursery:
            kept = Kept("writer", self._open_producer, stop, FOREIGN, self._rng)
            nursery.start_soon(kept.run)
            yield KafkaWriter(kept, self._max_message_bytes)

    async def _open_producer(self) -> AIOKafkaProducer:
        async def make(idempotent: bool) -> AIOKafkaProducer:
            return AIOKafkaProducer(
                **self._client,
                acks="all",
                enable_idempotence=idempotent,
                max_batch_size=BATCH_BYTES,
                max_request_size=self._max_message_bytes + RECORD_OVERHEAD_BYTES,
            )

        if self._idempotent:
            try:
                return await started(partial(make, True))
            except NO_IDEMPOTENCE as error:
                log.warning("the broker takes no idempotent producer; copies are possible", error=repr(error))
                self._idempotent = False
        return await started(partial(make, False))

    async def ensure_topics(self, topics: Mapping[str, int]) -> None:
        """Create what is missing, with the cluster's default replication; waits while Kafka is away.

        Raises ConfigError for an impossible name, StartupError when the cluster refuses.
        """
        await ensure_topics(self._client, topics, self._rng)
