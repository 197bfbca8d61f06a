"""The log on Kafka. The only importer of aiokafka; its errors become ours here.

Each reader and each writer keeps one aiokafka client alive in a task of its own: it connects with
back-off for as long as Kafka cannot be reached, and builds a new client when one has failed for good.
Opening therefore neither waits for Kafka nor fails because of it; `healthy` tells.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any, TypeVar

import structlog
import trio

from taskd import aio  # isort: skip  # before aiokafka: it replaces functions of asyncio

import asyncio

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition, errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from taskd.errors import ConfigError, LogUnavailable, StartupError
from taskd.log.base import Assigned, Assignment, Outgoing, Partition, Position, Record, Rejected, Revoked
from taskd.log.kept import Kept, delay_after, delays
from taskd.log.limits import MAX_RECORD_BYTES, READ_MAX_BYTES, is_topic, refusal
from taskd.log.scope import open_background

REBALANCE_SESSIONS = 5  # a member may take so many session time-outs to give up its partitions
COMMIT_WITHIN_S = 5.0
LOOK_UP_WITHIN_S = 10.0
APPEND_WITHIN_S = 15.0
REQUEST_WITHIN_MS = 10_000
STOP_WITHIN_S = 5.0
PROBE_EVERY_S = 3.0
POLL_ERRORS = 3  # so many in a row, and a new client is built
BATCH_BYTES = 262_144  # a record above it travels alone, so that its refusal is its own
RECORD_OVERHEAD_BYTES = 4_096

log = structlog.get_logger("taskd.log.kafka")
C = TypeVar("C")
T = TypeVar("T")

FOREIGN = (
    errors.KafkaError,
    errors.ConsumerStoppedError,
    errors.IllegalOperation,
    OSError,
    asyncio.TimeoutError,
)
HOPELESS = (
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.TopicAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
    errors.InvalidTopicError,
    errors.InvalidTimestampError,
    errors.PolicyViolationError,
    errors.UnsupportedForMessageFormatError,
)
# What brokers answer that have no idempotent producers, or allow none to this user. Tansu says UnknownError.
NO_IDEMPOTENCE = (
    errors.ClusterAuthorizationFailedError,
    errors.UnsupportedVersionError,
    errors.IncompatibleBrokerVersion,
    errors.UnknownError,
)


class KafkaLog:
    """A `Log` on a Kafka cluster. Use it inside `aio.open_loop()`.

    `bootstrap`: host:port, comma separated. `session_timeout_ms`: a member silent this long loses its
    partitions. `idempotent`: ask the broker to drop copies made by repeated sends; where the broker
    has no such thing a warning is logged and it goes without.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        session_timeout_ms: int = 6_000,
        max_message_bytes: int = MAX_RECORD_BYTES,
        client_id: str = "taskd",
        idempotent: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        self._bootstrap = bootstrap
        self._session_timeout_ms = session_timeout_ms
        self._max_message_bytes = max_message_bytes
        self._client_id = client_id
        self._idempotent = idempotent
        self._rng = rng or random.Random()

    def open_reader(
        self, topics: Collection[str], group: str, *, offset_reset: str = "earliest"
    ) -> AbstractAsyncContextManager[KafkaReader]:
        return self._open_reader(sorted(topics), group, offset_reset)

    @asynccontextmanager
    async def _open_reader(
        self, topics: list[str], group: str, offset_reset: str
    ) -> AsyncIterator[KafkaReader]:
        rebalance_timeout_ms = self._session_timeout_ms * REBALANCE_SESSIONS

        async def make() -> AIOKafkaConsumer:
            return AIOKafkaConsumer(
                bootstrap_servers=self._bootstrap,
                client_id=self._client_id,
                group_id=group,
                enable_auto_commit=False,
                auto_offset_reset=offset_reset,
                session_timeout_ms=self._session_timeout_ms,
                heartbeat_interval_ms=max(100, self._session_timeout_ms // 6),
                rebalance_timeout_ms=rebalance_timeout_ms,
                # Joining a group is one request that lasts as long as the slowest member takes.
                request_timeout_ms=rebalance_timeout_ms + REQUEST_WITHIN_MS,
                # Waiting for room is not being dead: a paused reader keeps its partitions.
                max_poll_interval_ms=2**31 - 1,
                metadata_max_age_ms=60_000,
                # The eager assignors that brokers already in the group speak.
                partition_assignment_strategy=(RangePartitionAssignor, RoundRobinPartitionAssignor),
                fetch_max_bytes=READ_MAX_BYTES,
                max_partition_fetch_bytes=max(1 << 20, self._max_message_bytes + RECORD_OVERHEAD_BYTES),
            )

        async with open_background() as nursery:
            reader = KafkaReader(
                lambda: _started(make), topics, group, self._rng, rebalance_timeout_ms / 2_000, nursery
            )
            try:
                yield reader
            finally:
                reader.leave()

    @asynccontextmanager
    async def open_writer(self) -> AsyncIterator[KafkaWriter]:
        async with open_background() as nursery:
            kept = Kept("writer", self._open_producer, _stop, FOREIGN, self._rng)
            nursery.start_soon(kept.run)
            yield KafkaWriter(kept, self._max_message_bytes)

    async def _open_producer(self) -> AIOKafkaProducer:
        async def make(idempotent: bool) -> AIOKafkaProducer:
            return AIOKafkaProducer(
                bootstrap_servers=self._bootstrap,
                client_id=self._client_id,
                acks="all",
                enable_idempotence=idempotent,
                max_batch_size=BATCH_BYTES,
                max_request_size=self._max_message_bytes + RECORD_OVERHEAD_BYTES,
                request_timeout_ms=REQUEST_WITHIN_MS,
            )

        if self._idempotent:
            try:
                return await _started(partial(make, True))
            except NO_IDEMPOTENCE as error:
                log.warning("the broker takes no idempotent producer; copies are possible", error=repr(error))
                self._idempotent = False
        return await _started(partial(make, False))

    async def ensure_topics(self, topics: Mapping[str, int]) -> None:
        """Create what is missing, with the cluster's default replication; waits while Kafka is away.

        Raises ConfigError for an impossible name, StartupError when the cluster refuses.
        """
        for topic in topics:
            if not is_topic(topic):
                raise ConfigError(
                    f"expected a topic name of at most 249 letters, digits, '.', '_' and '-', found {topic!r}"
                )
        for delay_s in delays(self._rng):
            try:
                await self._create_missing(topics)
                break
            except FOREIGN as error:
                log.warning("cannot create topics yet", retry_in_s=round(delay_s, 2), error=repr(error))
            await trio.sleep(delay_s)

    async def _create_missing(self, topics: Mapping[str, int]) -> None:
        async def make() -> AIOKafkaAdminClient:
            return AIOKafkaAdminClient(
                bootstrap_servers=self._bootstrap,
                client_id=self._client_id,
                request_timeout_ms=REQUEST_WITHIN_MS,
            )

        admin = await aio.call(make)
        try:
            await aio.call(admin.start)
            # Asked first, because a user who may not create topics may still use those that exist.
            existing = await aio.call(admin.list_topics)
            missing = [_new_topic(name, topics[name]) for name in topics if name not in existing]
            if missing:
                response = await aio.call(admin.create_topics, missing)
                for name, code, *_ in response.topic_errors:
                    _judge_creation(name, errors.for_code(code))
        finally:
            await aio.finish(admin.close, within_s=STOP_WITHIN_S)


def _new_topic(name: str, partitions: int) -> NewTopic:
    topic = NewTopic(name, partitions, 1)
    topic.replication_factor = -1  # the cluster's default; the constructor would refuse to be told so
    return topic


def _judge_creation(name: str, kind: type[errors.KafkaError]) -> None:
    if kind in (errors.NoError, errors.TopicAlreadyExistsError):
        return
    if kind.retriable:
        raise kind()
    raise StartupError(
        f"Kafka refuses to create topic {name}: {kind.__name__}. "
        "Create it yourself, or allow this user to, or give another name.",
        exit_code=69,
    )


class KafkaReader:
    """A member of a consumer group; a `Reader`. Closed by the block that opened it."""

    def __init__(
        self,
        open_: Callable[[], Awaitable[AIOKafkaConsumer]],
        topics: list[str],
        group: str,
        rng: random.Random,
        revoke_within_s: float,
        nursery: trio.Nursery,
    ) -> None:
        self._events, self.assignments = trio.open_memory_channel[Assignment](math.inf)
        self._kept = Kept[AIOKafkaConsumer](f"reader of group {group}", open_, _stop, FOREIGN, rng)
        self._topics = topics
        self._group = group
        self._rng = rng
        self._revoke_within_s = revoke_within_s
        self._leaving = trio.Event()
        # What is read, each with a number that changes when its position is set from outside.
        self._assigned: dict[Partition, int] = {}
        self._numbers = count()
        self._paused: set[Partition] = set()
        self._changed = trio.Event()
        self._polling: trio.CancelScope | None = None
        self._errors = 0
        self._healthy = False
        nursery.start_soon(self._kept.run, self._serve)

    def leave(self) -> None:
        # A revocation in progress must not hold up the departure: the caller has flushed.
        self._leaving.set()
        self._events.close()

    async def _serve(self, consumer: AIOKafkaConsumer) -> None:
        """Join the group, then watch whether it answers."""
        try:
            await aio.call(_subscribe, consumer, self._topics, _Listener(self))
            self._set_healthy(True)
            while True:
                await trio.sleep(PROBE_EVERY_S)
                self._set_healthy(await self._answers(consumer))
        finally:
            self._set_healthy(False)
            self._forget(frozenset(self._assigned), lambda: None)

    async def _answers(self, consumer: AIOKafkaConsumer) -> bool:
        with trio.move_on_after(PROBE_EVERY_S):
            try:
                await aio.call(consumer.committed, TopicPartition(self._topics[0], 0))
            except FOREIGN:
                return False
            return True
        return False

    def _set_healthy(self, healthy: bool) -> None:
        if healthy != self._healthy and not self._leaving.is_set():
            if healthy:
                log.info("Kafka answers", group=self._group)
            else:
                log.warning("Kafka does not answer", group=self._group)
        self._healthy = healthy

    # Called from the group's task in asyncio.

    def given(self, partitions: Collection[TopicPartition]) -> None:
        coming = frozenset(Partition(tp.topic, tp.partition) for tp in partitions)
        self._assigned.update({partition: next(self._numbers) for partition in coming})
        if coming and not self._leaving.is_set():
            self._events.send_nowait(Assigned(coming))
        self._change()

    async def taken(self, partitions: Collection[TopicPartition]) -> None:
        """aiokafka joins the group again as soon as this returns, so it returns when acknowledged."""
        acknowledged = trio.Event()
        leaving = frozenset(Partition(tp.topic, tp.partition) for tp in partitions) & self._assigned.keys()
        if self._forget(leaving, acknowledged.set):
            await aio.trio_handler(self._wait_for)(leaving, acknowledged)

    async def _wait_for(self, leaving: frozenset[Partition], acknowledged: trio.Event) -> None:
        with trio.move_on_after(self._revoke_within_s):
            async with trio.open_nursery() as nursery:
                for event in (acknowledged, self._leaving):
                    nursery.start_soon(_cancel_after, event, nursery.cancel_scope)
            return
        log.warning(
            "revoked partitions were given up without acknowledgement",
            partitions=sorted(map(str, leaving)),
            within_s=self._revoke_within_s,
        )

    def _forget(self, leaving: frozenset[Partition], acknowledge: Callable[[], None]) -> bool:
        """Stop reading these and say so; False when there is nobody to tell."""
        for partition in leaving:
            del self._assigned[partition]
        self._paused -= leaving
        self._change()
        if not leaving or self._leaving.is_set():
            return False
        self._events.send_nowait(Revoked(leaving, acknowledge))
        return True

    def _change(self) -> None:
        self._changed.set()
        if self._polling is not None:
            self._polling.cancel()

    # The caller's side.

    async def read_batch(self, max_records: int, within_s: float) -> list[Record]:
        deadline = trio.current_time() + within_s
        await trio.lowlevel.checkpoint()
        while True:
            self._changed = trio.Event()
            wanted = self._assigned.keys() - self._paused
            consumer = self._kept.current
            if consumer is not None and wanted:
                left_s = max(0.0, deadline - trio.current_time())
                records = await self._poll(consumer, wanted, max_records, left_s)
                if records or trio.current_time() >= deadline:
                    return records
            else:
                with trio.move_on_at(deadline) as scope:
                    await self._changed.wait()
                if scope.cancelled_caught:
                    return []

    async def _poll(
        self, consumer: AIOKafkaConsumer, wanted: Collection[Partition], max_records: int, within_s: float
    ) -> list[Record]:
        before = dict(self._assigned)
        batches: dict[TopicPartition, list[Any]] = {}
        # The time-out of getmany does not count while the group rebalances; this one does.
        with trio.move_on_after(within_s + 0.1) as self._polling:
            try:
                batches = await aio.call(
                    consumer.getmany,
                    *(TopicPartition(*partition) for partition in wanted),
                    timeout_ms=int(within_s * 1000),
                    max_records=max_records,
                )
                self._errors = 0
            except FOREIGN as error:
                await self._poll_failed(error)
        self._polling = None
        records: list[Record] = []
        for tp, messages in batches.items():
            partition = Partition(tp.topic, tp.partition)
            if self._assigned.get(partition) != before[partition]:
                continue  # revoked, or sent elsewhere by a seek
            if partition in self._paused:
                # A rebalance that has just begun reads from the committed offset anyway.
                with suppress(errors.IllegalStateError):
                    consumer.seek(tp, messages[0].offset)
                continue
            records += [_record(partition, message) for message in messages]
        return records

    async def _poll_failed(self, error: BaseException) -> None:
        self._errors += 1
        self._set_healthy(False)
        delay_s = delay_after(self._errors, self._rng)
        log.warning("cannot read from Kafka", group=self._group, retry_in_s=delay_s, error=repr(error))
        if self._errors >= POLL_ERRORS:
            self._errors = 0
            self._kept.fail()
        await trio.sleep(delay_s)

    async def _ask(self, what: str, within_s: float, fn: Callable[[AIOKafkaConsumer], Awaitable[T]]) -> T:
        consumer = self._kept.current
        if consumer is None:
            raise LogUnavailable(f"cannot {what}: Kafka is not reached yet")
        with (
            aio.mapped(
                {
                    trio.TooSlowError: lambda _: LogUnavailable(
                        f"cannot {what}: Kafka did not answer within {within_s:g} s"
                    ),
                    **dict.fromkeys(FOREIGN, lambda error: LogUnavailable(f"cannot {what}: {error!r}")),
                }
            ),
            trio.fail_after(within_s),
        ):
            return await aio.call(fn, consumer)

    async def commit(self, offsets: Mapping[Partition, int], metadata: str = "") -> None:
        wanted = {TopicPartition(*partition): (offset, metadata) for partition, offset in offsets.items()}
        await self._ask("commit offsets", COMMIT_WITHIN_S, lambda consumer: consumer.commit(wanted))

    async def committed(self, partition: Partition) -> int | None:
        tp = TopicPartition(*partition)
        offset: int | None = await self._ask(
            "read the committed offset", LOOK_UP_WITHIN_S, lambda consumer: consumer.committed(tp)
        )
        return offset

    def pause(self, partitions: Collection[Partition]) -> None:
        self._paused |= self._assigned.keys() & set(partitions)
        self._change()

    def resume(self, partitions: Collection[Partition]) -> None:
        self._paused -= set(partitions)
        self._change()

    async def seek(self, partition: Partition, offset: int) -> None:
        async def seek(consumer: AIOKafkaConsumer) -> None:
            consumer.seek(TopicPartition(*partition), offset)

        await self._ask(f"seek in {partition}", LOOK_UP_WITHIN_S, seek)
        self._moved(partition)

    async def seek_to_time(self, partition: Partition, timestamp_ms: int) -> None:
        tp = TopicPartition(*partition)

        async def seek(consumer: AIOKafkaConsumer) -> None:
            found = (await consumer.offsets_for_times({tp: timestamp_ms}))[tp]
            if found is None:
                await consumer.seek_to_end(tp)
            else:
                consumer.seek(tp, found.offset)

        await self._ask(f"look up a time in {partition}", LOOK_UP_WITHIN_S, seek)
        self._moved(partition)

    def _moved(self, partition: Partition) -> None:
        if partition in self._assigned:
            self._assigned[partition] = next(self._numbers)
        self._change()

    async def lag(self) -> dict[Partition, int]:
        assigned = {partition: TopicPartition(*partition) for partition in self._assigned}

        async def measure(consumer: AIOKafkaConsumer) -> dict[Partition, int]:
            ends = await consumer.end_offsets(list(assigned.values()))
            return {p: max(0, ends[tp] - await consumer.position(tp)) for p, tp in assigned.items()}

        return await self._ask("measure the lag", LOOK_UP_WITHIN_S, measure)

    @property
    def assigned(self) -> frozenset[Partition]:
        return frozenset(self._assigned)

    @property
    def healthy(self) -> bool:
        return self._healthy


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """aiokafka swallows what is raised here, so nothing is decided here: all goes through the channel."""

    def __init__(self, reader: KafkaReader) -> None:
        self._reader = reader

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self._reader.taken(revoked)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        self._reader.given(assigned)


class KafkaWriter:
    """Appends with acks=all; a `Writer`. Closed by the block that opened it."""

    def __init__(self, kept: Kept[AIOKafkaProducer], max_message_bytes: int) -> None:
        self._kept = kept
        self._max_message_bytes = max_message_bytes

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        """Bounded in time: what Kafka did not confirm within 15 s is answered LogUnavailable.

        Such a record may still arrive, and so may one whose caller was cancelled.
        """
        answers: list[Position | Exception | None] = [refusal(r, self._max_message_bytes) for r in records]
        with trio.move_on_after(APPEND_WITHIN_S) as scope:
            producer = await self._kept.opened()
            await aio.call(self._send, producer, records, answers)
        if scope.cancelled_caught:
            self._kept.fail()  # or what waits in this producer would be sent after it was tried again
        late = f"Kafka did not confirm the record within {APPEND_WITHIN_S:g} s"
        return [LogUnavailable(late) if answer is None else answer for answer in answers]

    async def _send(
        self,
        producer: AIOKafkaProducer,
        records: Sequence[Outgoing],
        answers: list[Position | Exception | None],
    ) -> None:
        """Fill in `answers`, also those that came before a deadline in the middle."""
        waiting: list[tuple[int, asyncio.Future[Any]]] = []
        broken: dict[str, BaseException] = {}  # a topic that has failed is not waited for again
        try:
            for number, record in enumerate(records):
                if answers[number] is not None:
                    continue
                if record.topic in broken:
                    answers[number] = self._answer(broken[record.topic])
                    continue
                try:
                    future = await producer.send(
                        record.topic, value=record.value, key=record.key, headers=list(record.headers)
                    )
                    waiting.append((number, future))
                except FOREIGN as error:
                    if not isinstance(error, errors.MessageSizeTooLargeError):
                        broken[record.topic] = error
                    answers[number] = self._answer(error)
            # One after the other: those of one Kafka batch are done together, and a callback each is dear.
            for _, future in waiting:
                with suppress(*FOREIGN):
                    await future
        finally:
            for number, future in waiting:
                if not future.cancel():  # it is done
                    answers[number] = self._outcome(future)

    def _outcome(self, future: asyncio.Future[Any]) -> Position | Exception | None:
        if future.cancelled():
            return None
        error = future.exception()
        if error is not None:
            return self._answer(error)
        done = future.result()
        return Position(Partition(done.topic, done.partition), done.offset)

    def _answer(self, error: BaseException) -> Exception:
        if isinstance(error, HOPELESS):
            return Rejected(f"Kafka will never take the record: {error}")
        if not getattr(error, "retriable", True):
            self._kept.fail()  # fenced, out of sequence, closed: this producer is of no more use
        return LogUnavailable(f"Kafka did not take the record: {error!r}")


async def _started(make: Callable[[], Awaitable[C]]) -> C:
    """Make and start a client; one that fails to start is stopped, or its end would raise an alarm."""
    client = await aio.call(make)
    try:
        await aio.call(client.start)  # type: ignore[attr-defined]  # aiokafka is untyped
    except BaseException:
        await _stop(client)
        raise
    return client


async def _stop(client: Any) -> None:
    if not await aio.finish(client.stop, within_s=STOP_WITHIN_S):
        # An interrupted stop() is not repeated by aiokafka, so its parts are ended one by one.
        await aio.finish(partial(_tear_down, client), within_s=1)


async def _tear_down(client: Any) -> None:
    if isinstance(client, AIOKafkaProducer):
        client._message_accumulator.fail_all(errors.KafkaConnectionError("given up"))
        await client._sender.close()
        await client.client.close()
    else:
        if client._coordinator is not None:
            client._coordinator._coordination_task.cancel()
        if client._fetcher is not None:
            await client._fetcher.close()
        await client._client.close()


async def _subscribe(consumer: AIOKafkaConsumer, topics: list[str], listener: _Listener) -> None:
    consumer.subscribe(topics, listener=listener)


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _record(partition: Partition, message: Any) -> Record:
    headers = tuple((name, value or b"") for name, value in message.headers)
    return Record(partition, message.offset, message.timestamp, message.key, message.value or b"", headers)
