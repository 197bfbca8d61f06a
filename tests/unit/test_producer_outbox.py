"""The synchronous face: real threads, so no virtual time, and nothing here waits for a time-out to pass."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

import taskd
from taskd import aio
from taskd.config.loader import load_producer_config
from taskd.errors import ConfigError, DeliveryError, LogUnavailable
from taskd.log.base import Outgoing, Partition, Position
from taskd.log.kafka import KafkaLog
from taskd.log.memory import MemoryLog
from taskd.producer.client import open_producer
from taskd.producer.destination import Destination
from taskd.producer.outbox import SyncOutbox, open_outbox
from taskd.producer.service import LogService
from taskd.rpc.server import serve
from taskd.tasks import outbox
from taskd.tasks.outbox import Call
from taskd.testing.kafka import open_local_kafka

Answer = Callable[[Outgoing], Exception | None]


class ThreadedLog:
    """A destination for another thread: appends when the test lets it."""

    def __init__(self, answer: Answer = lambda record: None) -> None:
        self.answer = answer
        self.may_append = threading.Event()
        self.may_append.set()
        self.appending = threading.Event()
        self.batches: list[list[bytes]] = []
        self.opened = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ThreadedLog]:
        self.opened += 1
        yield self

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        self.appending.set()
        await trio.to_thread.run_sync(self.may_append.wait, abandon_on_cancel=True)
        self.batches.append([record.key or b"" for record in records])
        return [self.answer(record) or Position(Partition("t", 0), 0) for record in records]

    @property
    def destination(self) -> Destination:
        return Destination("the log", "Is it there?", self.open)


def call(number: int = 0) -> Call:
    return Call(f"id-{number}", "n", "t", "", "", (number,), {})


@pytest.fixture
def log() -> ThreadedLog:
    return ThreadedLog()


@pytest.fixture
def out(log: ThreadedLog) -> Iterator[SyncOutbox]:
    out = SyncOutbox(log.destination, topic="topic", timeout_s=30, max_waiting=5, max_waiting_bytes=10_000)
    yield out
    log.may_append.set()
    out.close()


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_waiting_returns_when_it_is_durable(log: ThreadedLog, out: SyncOutbox) -> None:
    out.send(call(), wait=True)
    assert log.batches == [[b"id-0"]]
    assert out.statistics().sent == 1


def test_nothing_starts_before_the_first_call(log: ThreadedLog, out: SyncOutbox) -> None:
    assert log.opened == 0


def test_not_waiting_returns_before(log: ThreadedLog, out: SyncOutbox) -> None:
    log.may_append.clear()
    out.send(call(), wait=False)
    assert log.batches == []
    assert out.statistics().waiting == 1
    log.may_append.set()
    out.close()
    assert log.batches == [[b"id-0"]]


def test_what_gathers_meanwhile_goes_together(log: ThreadedLog, out: SyncOutbox) -> None:
    log.may_append.clear()
    out.send(call(0), wait=False)
    log.appending.wait()
    threads = [in_thread(partial(out.send, call(number), wait=True)) for number in range(1, 5)]
    while out.statistics().waiting < 5:
        threads[0].join(0.001)
    log.may_append.set()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*log.batches)) == [f"id-{number}".encode() for number in range(5)]
    assert len(log.batches) <= 3


def test_a_refusal_is_raised_to_who_waits(log: ThreadedLog, out: SyncOutbox) -> None:
    log.answer = lambda record: ValueError("never")
    with pytest.raises(DeliveryError, match="the log refused it: never"):
        out.send(call(), wait=True)
    assert out.statistics().failed == 1


def test_a_failure_nobody_waits_for_is_logged(
    log: ThreadedLog, out: SyncOutbox, caplog: pytest.LogCaptureFixture
) -> None:
    log.answer = lambda record: ValueError("never")
    out.send(call(), wait=False)
    out.close()
    assert "id-0" in caplog.text
    assert "the log refused it: never" in caplog.text
    assert out.statistics().failed == 1


def test_arguments_are_checked_where_the_call_is_made(out: SyncOutbox) -> None:
    with pytest.raises(DeliveryError, match="argument 0 cannot be sent: found set"):
        out.send(Call("i", "n", "t", "", "", ({1},), {}), wait=False)


def test_arguments_are_those_of_the_moment(log: ThreadedLog, out: SyncOutbox) -> None:
    records: list[Outgoing] = []
    log.answer = records.append  # type: ignore[assignment]
    log.may_append.clear()
    argument = ["before"]
    out.send(Call("i", "n", "t", "", "", (argument,), {}), wait=False)
    argument[0] = "after"
    log.may_append.set()
    out.close()
    assert b"before" in records[0].value


def test_too_many_waiting_calls_are_refused_at_once(log: ThreadedLog, out: SyncOutbox) -> None:
    log.may_append.clear()
    for number in range(5):
        out.send(call(number), wait=False)
    with pytest.raises(DeliveryError, match=r"5 calls \(.* bytes\) already wait for the log"):
        out.send(call(5), wait=True)
    log.may_append.set()
    out.close()
    assert out.statistics().sent == 5


def test_so_are_too_many_bytes(log: ThreadedLog, out: SyncOutbox) -> None:
    log.may_append.clear()
    big = Call("big", "n", "t", "", "", ("x" * 20_000,), {})
    out.send(big, wait=False)  # alone it may
    with pytest.raises(DeliveryError, match="1 calls"):
        out.send(call(), wait=False)


def test_no_answer_in_time(log: ThreadedLog) -> None:
    out = SyncOutbox(log.destination, topic="topic", timeout_s=0.05)
    log.may_append.clear()
    with pytest.raises(DeliveryError, match=r"expected the log to store it within 0.05 s; .*Is it there\?"):
        out.send(call(), wait=True)
    assert out.statistics().waiting == 0
    log.may_append.set()
    out.close()


def test_an_outage_in_between_is_waited_out(log: ThreadedLog, out: SyncOutbox) -> None:
    failures = [LogUnavailable("restarting")] * 2
    log.answer = lambda record: failures.pop() if failures else None
    out.send(call(), wait=True)
    assert len(log.batches) == 3


def test_a_thread_that_died_fails_its_calls_and_another_starts(
    log: ThreadedLog, out: SyncOutbox, caplog: pytest.LogCaptureFixture
) -> None:
    class Fatal(BaseException):
        pass

    def broken(record: Outgoing) -> None:
        raise Fatal

    log.answer = broken
    with pytest.raises(DeliveryError, match=r"id-0.* was not scheduled"):
        out.send(call(0), wait=True)
    log.answer = lambda record: None
    assert out._thread is not None
    out._thread._thread.join()
    out.send(call(1), wait=True)
    assert log.opened == 2
    assert "the next call starts another" in caplog.text


def test_closed_is_closed(log: ThreadedLog, out: SyncOutbox) -> None:
    out.close()
    with pytest.raises(DeliveryError, match="the outbox is closed"):
        out.send(call(), wait=True)
    out.close()


# ---- configuration ---------------------------------------------------------------------------


@pytest.fixture
def configured() -> Iterator[None]:
    yield
    taskd.configure()


def test_bad_settings_are_an_error_at_the_first_call(
    configured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKD_TIMEOUT_S", "soon")
    taskd.configure(log="rabbit")
    with pytest.raises(ConfigError) as caught:
        outbox.current_outbox()
    assert "rabbit" in str(caught.value)
    assert "TASKD_TIMEOUT_S" in str(caught.value)


def test_settings_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKD_BROKER", "from.environment:1")
    monkeypatch.setenv("TASKD_TOPIC", "from-environment")
    out = open_outbox({"broker": "from.settings:2", "topic": None})
    assert (out._to.name, out._topic) == ("the broker at from.settings:2", "from-environment")
    assert open_outbox({"log": "kafka", "kafka": "k:9092"})._to.name == "Kafka at k:9092"


# ---- the real way: gRPC, two threads, a forked child -----------------------------------------


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, MemoryLog]]:
    log = MemoryLog()
    async with (
        aio.open_loop(),
        log.open_writer() as writer,
        serve(
            LogService(writer, frozenset({"taskd"})).services,
            "127.0.0.1",
            0,
            max_request_bytes=10 * 1024 * 1024,
        ) as port,
    ):
        yield f"127.0.0.1:{port}", log


async def keys(log: MemoryLog | KafkaLog, count: int, topic: str = "taskd") -> list[bytes | None]:
    async with log.open_reader([topic], "group") as reader:
        found: list[bytes | None] = []
        with trio.fail_after(30):
            while len(found) < count:
                found += [record.key for record in await reader.read_batch(1_000, 1.0)]
        return found


async def test_delay_reaches_the_brokers_log(configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = taskd.TaskNamespace("outbox-test")
    task = namespace.register("echo")(lambda *args: None)
    monkeypatch.delenv("TASKD_TOPIC", raising=False)
    async with broker() as (address, log):
        taskd.configure(broker=address, log="embedded")
        ids = [await trio.to_thread.run_sync(task.delay, number) for number in range(3)]
        assert await keys(log, 3) == [activation_id.encode() for activation_id in ids]
        await trio.to_thread.run_sync(outbox.unbind)


async def test_a_topic_the_broker_lacks(configured: None) -> None:
    task = taskd.TaskNamespace("outbox-test", topic="elsewhere").register("topic")(lambda: None)
    async with broker() as (address, _):
        taskd.configure(broker=address, log="embedded")
        with pytest.raises(DeliveryError, match="no topic 'elsewhere'; it has taskd"):
            await trio.to_thread.run_sync(task.delay)
        await trio.to_thread.run_sync(outbox.unbind)


def test_nobody_there(configured: None) -> None:
    task = taskd.TaskNamespace("outbox-test").register("nobody")(lambda: None)
    taskd.configure(broker="127.0.0.1:1", log="embedded", timeout_s=0.3)
    with pytest.raises(DeliveryError) as caught:
        task.delay()
    message = str(caught.value)
    assert "expected the broker at 127.0.0.1:1 to store it within 0.3 s" in message
    assert "nobody answers" in message
    assert "TASKD_BROKER" in message


PROGRAM = """
import os, sys, taskd
task = taskd.TaskNamespace("outbox-test").register("exit", wait_for_delivery=False)(print)
waiting = taskd.TaskNamespace("outbox-test").register("wait")(print)
{body}
"""
AT_EXIT = "ids = [task.delay(n) for n in range(20)]"
FORK = """
waiting.delay()
child = os.fork()
if child == 0:
    try:
        waiting.delay()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
waiting.delay()
"""


@pytest.mark.process
@pytest.mark.parametrize(("body", "count"), [(AT_EXIT, 20), (FORK, 3)], ids=["flushed at exit", "forked"])
async def test_a_program(body: str, count: int) -> None:
    async with broker() as (address, log):
        host, _, port = address.partition(":")
        assert host
        environ = {**os.environ, "TASKD_BROKER": f"localhost:{port}", "TASKD_LOG": "embedded"}
        command = [sys.executable, "-c", PROGRAM.format(body=body)]
        done = await trio.run_process(
            command, env=environ, capture_stderr=True, capture_stdout=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert len(await keys(log, count)) == count


@pytest.mark.process
def test_exit_is_not_held_up_for_ever() -> None:
    environ = {**os.environ, "TASKD_BROKER": "127.0.0.1:1", "TASKD_LOG": "embedded", "TASKD_TIMEOUT_S": "0.3"}
    command = [sys.executable, "-c", PROGRAM.format(body="task.delay(1)")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "outbox-test:exit" in done.stderr
    assert "was not scheduled" in done.stderr


@pytest.mark.kafka
@pytest.mark.process
async def test_delay_reaches_kafka(configured: None) -> None:
    topic = f"outbox-{uuid.uuid4().hex}"
    task = taskd.TaskNamespace("outbox-test", topic=topic).register("kafka")(lambda *args: None)
    with open_local_kafka() as bootstrap:
        async with aio.open_loop():
            log = KafkaLog(bootstrap)
            await log.ensure_topics({topic: 1})
            taskd.configure(log="kafka", kafka=bootstrap, timeout_s=30)
            activation_id = await trio.to_thread.run_sync(task.delay, 1)
            async with open_producer(load_producer_config({"log": "kafka", "kafka": bootstrap})) as producer:
                assert await producer.send_many([task.to_call((2,)), task.to_call((3,))]) == [None, None]
            found = await keys(log, 3, topic)
            await trio.to_thread.run_sync(outbox.unbind)
    assert found[0] == activation_id.encode()
