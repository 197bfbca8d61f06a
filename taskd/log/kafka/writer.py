"""Appending to Kafka: confirmed by every replica in sync, or answered with the reason why not."""

from __future__ import annotations

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
                    answers[number] = self._answer(broken[record.topic], record.topic)
                    continue
                try:
                    future = await producer.send(
                        record.topic, value=record.value, key=record.key, headers=list(record.headers)
                    )
                    waiting.append((number, future))
                except FOREIGN as error:
                    if not isinstance(error, errors.MessageSizeTooLargeError):
                        broken[record.topic] = error
                    answers[number] = self._answer(error, record.topic)
            # One after the other: those of one Kafka batch are done together, and a callback each is dear.
            for _, future in waiting:
                with suppress(*FOREIGN):
                    await future
        finally:
            for number, future in waiting:
                if not future.cancel():  # it is done
                    answers[number] = self._outcome(future, records[number].topic)

    def _outcome(self, future: asyncio.Future[Any], topic: str) -> Position | Exception | None:
        if future.cancelled():
            return None
        error = future.exception()
        if error is not None:
            return self._answer(error, topic)
        done = future.result()
        return Position(Partition(done.topic, done.partition), done.offset)

    def _answer(self, error: BaseException, topic: str) -> Exception:
        if isinstance(error, FORBIDDEN):
            return Forbidden(f"Kafka does not allow us to write to topic {topic}: {type(error).__name__}")
        if isinstance(error, HOPELESS):
            return Rejected(f"Kafka will never take the record: {error}")
        if not getattr(error, "retriable", True):
            self._kept.fail()  # fenced, out of sequence, closed: this producer is of no more use
        return LogUnavailable(f"Kafka did not take the record: {error!r}")
