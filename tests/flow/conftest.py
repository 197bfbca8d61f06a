"""A whole broker in virtual time: memory log, inline store, no sockets and no threads."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from taskd.daemon.pushing import parking_duty
from taskd.dispatch.roster import Roster
from taskd.dispatch.stream import StreamDispatch
from taskd.dispatch.unary import UnaryDispatch
from taskd.inflight.base import Policy
from taskd.inflight.presence import Presence
from taskd.inflight.writer import Inflight, open_inflight
from taskd.ingest.backpressure import Limits
from taskd.ingest.loop import COMMIT_AFTER_S, Ingest
from taskd.ingest.overflow import Overflow
from taskd.log.base import Outgoing, Partition, Reader, Record
from taskd.log.memory import MemoryLog
from taskd.testing.clock import TrioClock
from taskd.upkeep.duties import Upkeep
from taskd.upkeep.publish import Publisher, Topics
from taskd.upkeep.table import UpkeepSettings, broker_duties
from taskd.wire import consumer
from taskd.wire.generated.sentry_protos.taskbroker.v1 import (
    GetTaskRequest,
    GetTaskResponse,
    RetryState,
    SetTaskStatusRequest,
    TaskActivation,
    TaskActivationStatus,
)

sys.path.insert(0, str(Path(__file__).parent))  # shared modules; importlib mode adds none

TOPIC, DLQ = "taskd", "taskd-dlq"


def activation(id_: str, **fields: Any) -> bytes:
    """A serialized activation of a task that nobody has to know."""
    fields = {"namespace": "ns", "taskname": "task", "processing_deadline_duration": 10, **fields}
    return bytes(TaskActivation(id=id_, **fields))


def dead_letter_policy(attempts: int = 0) -> RetryState:
    return RetryState(attempts=attempts, max_attempts=3, on_attempts_exceeded=2)


def at_most_once_policy() -> RetryState:
    return RetryState(attempts=0, max_attempts=1, on_attempts_exceeded=1, at_most_once=True)


@dataclass
class TestBroker:
    """The stations, introduced to each other as the daemon does."""

    __test__ = False

    log: MemoryLog
    inflight: Inflight
    ingest: Ingest
    upkeep: Upkeep
    unary: UnaryDispatch
    stream: StreamDispatch
    draining: trio.Event
    clock: TrioClock
    reader: Reader

    activation = staticmethod(activation)
    dead_letter_policy = staticmethod(dead_letter_policy)
    at_most_once_policy = staticmethod(at_most_once_policy)

    async def produce(self, *values: bytes, key: bytes | None = None) -> None:
        async with self.log.open_writer() as writer:
            answers = await writer.append([Outgoing(TOPIC, value, key) for value in values])
        assert not [answer for answer in answers if isinstance(answer, Exception)]

    async def get_task(self, namespace: str | None = None, application: str | None = None) -> TaskActivation:
        request = bytes(GetTaskRequest(namespace=namespace, application=application))
        task = GetTaskResponse.parse((await self.unary.get_task(request)).body).task
        assert task is not None
        return task

    async def set_status(self, id_: str, status: int = consumer.COMPLETE, **fields: Any) -> bytes:
        return (
            await self.unary.set_task_status(
                bytes(SetTaskStatusRequest(id=id_, status=TaskActivationStatus(status), **fields))
            )
        ).body

    async def records(self, topic: str) -> list[Record]:
        async with self.log.open_reader([topic], f"look-{trio.current_time()}") as reader:
            return await reader.read_batch(1000, 0.1)

    async def committed(self) -> int | None:
        """The group's offset, once what is owed to the log now was committed."""
        await trio.sleep(2 * COMMIT_AFTER_S)
        return await self.reader.committed(Partition(TOPIC, 0))

    async def settle(self) -> None:
        """Until nobody has anything to do now."""
        await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def open_broker(
    folder: Path,
    log: MemoryLog | None = None,
    *,
    policy: Policy | None = None,
    limits: Limits | None = None,
    quiet_ms: int = 0,
    lease_ms: int = 30_000,
    outlet: Any = None,
    share: int | None = None,
    overflow_topic: str | None = None,
) -> AsyncIterator[TestBroker]:
    clock = TrioClock()
    log = log or MemoryLog(clock=clock)
    policy = policy or Policy()
    async with (
        open_inflight(folder / "inflight.sqlite", clock, policy, inline=True) as inflight,
        log.open_reader([TOPIC], "taskd") as reader,
        log.open_writer() as writer,
        trio.open_nursery() as nursery,
    ):
        draining = trio.Event()
        presence = Presence(clock)
        roster = Roster(clock)
        if outlet is not None:
            outlet.append = writer.append
        publisher = Publisher(inflight, outlet or writer.append, clock, Topics(DLQ), limit=100)
        settings = UpkeepSettings(1.0, quiet_ms, 100, lease_ms, 600_000, 1_000)
        overflow = None
        if share is not None:
            overflow = Overflow(inflight, writer.append, max_rows=share, topic=overflow_topic)
        ingest = Ingest(
            reader, inflight, clock, limits=limits or Limits(), batch_max_records=100, overflow=overflow
        )
        duties = broker_duties(inflight, publisher, presence, clock, lambda: settings)
        duties.append(parking_duty(inflight, None, roster, limit=100, every_s=lambda: 1.0))
        broker = TestBroker(
            log=log,
            inflight=inflight,
            ingest=ingest,
            upkeep=Upkeep(duties, clock),
            unary=UnaryDispatch(inflight, roster, draining),
            stream=StreamDispatch(
                inflight, presence, roster, draining, lease_ms=lease_ms, max_assignments_per_frame=16
            ),
            draining=draining,
            clock=clock,
            reader=reader,
        )
        nursery.start_soon(broker.ingest.run)
        nursery.start_soon(broker.upkeep.run)
        yield broker
        nursery.cancel_scope.cancel()


@pytest.fixture(name="open_broker")
def open_broker_fixture() -> Any:
    """`open_broker(folder, log, policy=…, limits=…)` for tests that need a broker of their own."""
    return open_broker


@pytest.fixture
async def broker(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> AsyncIterator[TestBroker]:
    async with open_broker(tmp_path) as opened, trio.open_nursery() as nursery:
        nursery.start_soon(_end_of_time)
        yield opened
        nursery.cancel_scope.cancel()


async def _end_of_time() -> None:
    # Upkeep ticks for ever, so a test that waits in vain would never end by itself.
    await trio.sleep(3_600)
    pytest.fail("an hour of virtual time passed")
