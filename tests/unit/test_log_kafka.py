"""The log on Kafka when Kafka is not there: at the start, in the middle, and for good."""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
import trio
import trio.testing

from taskd import aio  # isort: skip  # before aiokafka: it replaces functions of asyncio

import asyncio

from aiokafka import AIOKafkaProducer

from taskd.errors import ConfigError, LogUnavailable
from taskd.log import kept
from taskd.log.base import Assigned, Outgoing, Partition, Position, Reader, Record, Revoked
from taskd.log.kafka import KafkaLog, cluster, connection
from taskd.testing.kafka import is_real_cluster, open_local_kafka

WITHIN_S = 30

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "RETRY_MOST_S", 0.2)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def own_broker() -> pytest.MarkDecorator:
    return pytest.mark.skipif(is_real_cluster(), reason="starts and stops a broker of its own")


def log_at(address: str) -> KafkaLog:
    return KafkaLog(address, session_timeout_ms=6_000 if is_real_cluster() else 1_000)


@asynccontextmanager
async def no_alarm() -> AsyncIterator[None]:
    """asyncio's loop, under which nothing may be left lying about that complains when it is collected."""
    before = aio.unhandled_errors
    async with aio.open_loop():
        yield
        gc.collect()
        await trio.lowlevel.checkpoint()
    assert aio.unhandled_errors == before


async def read_one(reader: Reader) -> Record:
    with trio.fail_after(WITHIN_S):
        while not (records := await reader.read_batch(1, 5)):
            pass
    return records[0]


async def test_an_idle_request_waits_at_the_broker_as_long_as_configured(kafka_address: str) -> None:
    log = KafkaLog(kafka_address, fetch_max_wait_ms=20)
    async with no_alarm(), log.open_reader(["waits"], "waits") as reader:
        with trio.fail_after(WITHIN_S):
            consumer = await reader._kept.opened()
        assert consumer._fetch_max_wait_ms == 20


@own_broker()
async def test_kafka_that_appears_later(free_port: int) -> None:
    log = log_at(f"127.0.0.1:{free_port}")
    async with (
        no_alarm(),
        log.open_reader(["t"], "g") as reader,
        log.open_writer() as writer,
        trio.open_nursery() as nursery,
    ):
        assert await reader.read_batch(10, 0.3) == []
        assert not reader.healthy
        with pytest.raises(LogUnavailable, match="not reached yet"):
            await reader.commit({Partition("t", 0): 1})
        ensured = trio.Event()

        async def ensure() -> None:
            await log.ensure_topics({"t": 1})
            ensured.set()

        nursery.start_soon(ensure)
        with open_local_kafka(free_port):
            with trio.fail_after(WITHIN_S):
                await ensured.wait()
            (position,) = await writer.append([Outgoing("t", b"v")])
            # Which partition depends on who asked for the topic first: asking may create it, with several.
            assert isinstance(position, Position)
            assert (position.partition.topic, position.offset) == ("t", 0)
            assert (await read_one(reader)).value == b"v"
            assert reader.healthy


@own_broker()
async def test_kafka_that_goes_and_comes_back(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.log.kafka.writer.APPEND_WITHIN_S", 0.5)
    monkeypatch.setattr("taskd.log.kafka.reader.COMMIT_WITHIN_S", 0.5)
    monkeypatch.setattr("taskd.log.kafka.reader.PROBE_EVERY_S", 0.2)
    log = log_at(f"127.0.0.1:{free_port}")
    async with no_alarm(), log.open_reader(["t"], "g") as reader, log.open_writer() as writer:
        with open_local_kafka(free_port):
            await log.ensure_topics({"t": 1})
            await writer.append([Outgoing("t", b"before")])
            assert (await read_one(reader)).value == b"before"
        (answer,) = await writer.append([Outgoing("t", b"nobody there")])
        assert isinstance(answer, LogUnavailable)
        with pytest.raises(LogUnavailable):
            await reader.commit({Partition("t", 0): 1})
        with trio.fail_after(WITHIN_S):
            while reader.healthy:
                await reader.read_batch(10, 0.1)
        with open_local_kafka(free_port):  # it has forgotten everything, the group included
            await log.ensure_topics({"t": 1})
            with trio.fail_after(WITHIN_S):
                while not reader.healthy:
                    await reader.read_batch(10, 0.1)
                for number in range(1_000):
                    (answer,) = await writer.append([Outgoing("t", b"after %d" % number)])
                    records = await reader.read_batch(10, 0.1)
                    for event in pending(reader):
                        if isinstance(event, Revoked):
                            event.acknowledge()
                    if any(record.value.startswith(b"after") for record in records):
                        break


def pending(reader: Reader) -> list[Assigned | Revoked]:
    return [
        reader.assignments.receive_nowait()
        for _ in range(reader.assignments.statistics().current_buffer_used)
    ]


async def test_leaving_while_nobody_is_there_is_quick_and_quiet(free_port: int) -> None:
    log = log_at(f"127.0.0.1:{free_port}")
    async with no_alarm():
        with trio.fail_after(connection.STOP_WITHIN_S):
            async with log.open_reader(["t"], "g"), log.open_writer():
                await trio.testing.wait_all_tasks_blocked()


async def test_an_append_is_bounded_while_nobody_is_there(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.log.kafka.writer.APPEND_WITHIN_S", 0.2)
    async with no_alarm(), log_at(f"127.0.0.1:{free_port}").open_writer() as writer:
        answers = await writer.append([Outgoing("t", b"1"), Outgoing("t", b"2")])
    assert [type(answer) for answer in answers] == [LogUnavailable, LogUnavailable]
    assert answers[0] is not answers[1]


async def test_a_broker_without_idempotent_producers_is_written_to_all_the_same(kafka_address: str) -> None:
    topic = f"t-{uuid4().hex}"
    log = KafkaLog(kafka_address, idempotent=True)
    async with no_alarm():
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer:
            (answer,) = await writer.append([Outgoing(topic, b"v")])
    assert isinstance(answer, Position)


async def test_a_revoke_that_nobody_acknowledges_ends(
    kafka_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "REBALANCE_SESSIONS", 1)
    topic, group = f"t-{uuid4().hex}", f"g-{uuid4().hex}"
    log = log_at(kafka_address)
    async with no_alarm():
        await log.ensure_topics({topic: 2})
        async with log.open_reader([topic], group) as first, log.open_reader([topic], group) as second:
            with trio.fail_after(WITHIN_S):
                while not first.assigned or not second.assigned:
                    await first.read_batch(10, 0.1)
            assert not first.assigned & second.assigned


async def test_an_impossible_topic_is_a_matter_of_configuration() -> None:
    with pytest.raises(ConfigError, match="at most 249 letters"):
        await KafkaLog("127.0.0.1:1").ensure_topics({"a b": 1})


@pytest.mark.parametrize("error", [KeyError("a batch"), RuntimeError("a bug")])
async def test_a_client_that_cannot_be_stopped_does_not_stay_connected(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is given up in the middle of a request that nobody answers."""
    monkeypatch.setattr(connection, "STOP_WITHIN_S", 0.1)
    ended = []

    class Part:
        def fail_all(self, error: Exception) -> None:
            ended.append("batches")

        async def close(self) -> None:
            ended.append("connections")

    class Sender:
        async def close(self) -> None:
            raise error

    class Stuck(AIOKafkaProducer):  # type: ignore[misc]  # aiokafka is untyped
        def __init__(self) -> None:
            self._message_accumulator, self._sender, self.client = Part(), Sender(), Part()
            self._closed = True  # nothing of it was ever opened

        async def stop(self) -> None:
            await asyncio.sleep(WITHIN_S)

    async with aio.open_loop():
        await connection.stop(Stuck())
    assert ended == ["batches", "connections"]
