"""Appending to Kafka: confirmed by every replica in sync, or answered with the reason why not."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio

from taskd import aio  # isort: skip  # before aiokafka: it replaces functions of asyncio

import asyncio

from aiokafka import AIOKafkaProducer, errors

from taskd.errors import LogUnavailable
from taskd.log.base import Forbidden, Outgoing, Partition, Position, Rejected
from taskd.log.kafka.errors import FORBIDDEN, FOREIGN, HOPELESS
from taskd.log.kept import Kept
from taskd.log.limits import refusal

APPEND_WITHIN_S = 15.0
BATCH_FROM = 16  # records of one partition in one append: fewer share aiokafka's batches with other callers'


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
        # Futures, each with the records of one topic whose offsets follow each other from its own on.
        waiting: list[tuple[Sequence[int], asyncio.Future[Any]]] = []
        try:
            for topic, numbers in _by_topic(records, answers).items():
                try:
                    partitions = sorted(await producer.partitions_for(topic))
                    for partition, its in _by_partition(records, numbers, partitions).items():
                        if partition is None or len(its) < BATCH_FROM:
                            await self._send_each(producer, records, its, partition, waiting, answers)
                        else:
                            await self._send_together(producer, records, its, partition, waiting)
                except (*FOREIGN, AssertionError) as error:  # an assertion: the partition has just gone
                    # A topic that has failed is not waited for again.
                    sent = {number for its_own, _ in waiting for number in its_own}
                    for number in numbers:
                        if number not in sent and answers[number] is None:
                            answers[number] = self._answer(error, topic)
            # One after the other: those of one Kafka batch are done together, and a callback each is dear.
            for _, future in waiting:
                with suppress(*FOREIGN):
                    await future
        finally:
            for its_own, future in waiting:
                if not future.cancel():  # it is done
                    self._fill_in(answers, its_own, future, records[its_own[0]].topic)

    async def _send_each(
        self,
        producer: AIOKafkaProducer,
        records: Sequence[Outgoing],
        numbers: Sequence[int],
        partition: int | None,
        waiting: list[tuple[Sequence[int], asyncio.Future[Any]]],
        answers: list[Position | Exception | None],
    ) -> None:
        """A few records, which share the batches of others that are sent meanwhile."""
        for number in numbers:
            topic, value, key, headers = records[number]
            try:
                future = await producer.send(
                    topic, value=value, key=key, headers=list(headers), partition=partition
                )
            except errors.MessageSizeTooLargeError as error:
                answers[number] = self._answer(error, topic)
            else:
                waiting.append(((number,), future))

    async def _send_together(
        self,
        producer: AIOKafkaProducer,
        records: Sequence[Outgoing],
        numbers: Sequence[int],
        partition: int,
        waiting: list[tuple[Sequence[int], asyncio.Future[Any]]],
    ) -> None:
        """Many records in batches of their own: one future each, and not one for each record."""
        begin = 0
        while begin < len(numbers):
            batch = producer.create_batch()
            end = begin
            while end < len(numbers):
                _, value, key, headers = records[numbers[end]]
                if batch.append(timestamp=None, key=key, value=value, headers=list(headers)) is None:
                    break  # it is full; the first always fits
                end += 1
            future = await producer.send_batch(batch, records[numbers[0]].topic, partition=partition)
            waiting.append((numbers[begin:end], future))
            begin = end

    def _fill_in(
        self,
        answers: list[Position | Exception | None],
        numbers: Sequence[int],
        future: asyncio.Future[Any],
        topic: str,
    ) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            for number in numbers:
                answers[number] = self._answer(error, topic)
            return
        done = future.result()
        partition = Partition(done.topic, done.partition)
        for offset, number in enumerate(numbers, done.offset):
            answers[number] = Position(partition, offset)

    def _answer(self, error: BaseException, topic: str) -> Exception:
        if isinstance(error, FORBIDDEN):
            return Forbidden(f"Kafka does not allow us to write to topic {topic}: {type(error).__name__}")
        if isinstance(error, HOPELESS):
            return Rejected(f"Kafka will never take the record: {error}")
        if not getattr(error, "retriable", True):
            self._kept.fail()  # fenced, out of sequence, closed: this producer is of no more use
        return LogUnavailable(f"Kafka did not take the record: {error!r}")


def _by_topic(
    records: Sequence[Outgoing], answers: Sequence[Position | Exception | None]
) -> dict[str, list[int]]:
    """The numbers of the records that have no answer yet."""
    found: dict[str, list[int]] = {}
    for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
        if answer is None:
            found.setdefault(record.topic, []).append(number)
    return found


def _by_partition(
    records: Sequence[Outgoing], numbers: Sequence[int], partitions: Sequence[int]
) -> dict[int | None, list[int]]:
    """Which partition each goes to, by its key; None: whichever.

    By CRC-32, as librdkafka and our own logs do: Kafka's murmur2 takes 4 us a key in Python.
    """
    found: dict[int | None, list[int]] = {}
    for number in numbers:
        key = records[number].key
        partition = None if key is None else partitions[zlib.crc32(key) % len(partitions)]
        found.setdefault(partition, []).append(number)
    return found
