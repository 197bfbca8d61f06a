"""A member of a consumer group on Kafka."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar

import structlog
import trio

from taskd import aio  # isort: skip  # before aiokafka: it replaces functions of asyncio

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition, errors

from taskd.errors import LogUnavailable
from taskd.log.base import Assigned, Assignment, Partition, Record, Revoked
from taskd.log.kafka.connection import stop
from taskd.log.kafka.errors import FOREIGN
from taskd.log.kept import Kept, delay_after

COMMIT_WITHIN_S = 5.0
LOOK_UP_WITHIN_S = 10.0
PROBE_EVERY_S = 3.0
POLL_ERRORS = 3  # so many in a row, and a new client is built

log = structlog.get_logger("taskd.log.kafka")
T = TypeVar("T")


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
        self._kept = Kept[AIOKafkaConsumer](f"reader of group {group}", open_, stop, FOREIGN, rng)
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
            self._healthy = False  # in silence: who gave the client up said why, and a stop is no outage
            self._forget(frozenset(self._assigned), lambda: None)

    async def _answers(self, consumer: AIOKafkaConsumer) -> bool:
        with trio.move_on_after(PROBE_EVERY_S):
            try:
                return await aio.call(_refresh, consumer)
            except FOREIGN:
                return False
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


async def _refresh(consumer: AIOKafkaConsumer) -> bool:
    """Ask for the topics' metadata: on the coordinator's connection, any question waits behind a join."""
    return bool(await consumer._client.force_metadata_update())


async def _subscribe(consumer: AIOKafkaConsumer, topics: list[str], listener: _Listener) -> None:
    consumer.subscribe(topics, listener=listener)


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _record(partition: Partition, message: Any) -> Record:
    headers = message.headers  # mostly none
    return Record(
        partition,
        message.offset,
        message.timestamp,
        message.key,
        message.value or b"",
        tuple((name, value or b"") for name, value in headers) if headers else (),
    )
