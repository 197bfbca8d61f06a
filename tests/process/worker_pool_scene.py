"""A pool of real children and a broker in memory, for tests of what tasks do to their child."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from taskd.config.schema import PoolSection
from taskd.rpc.base import ClientStream
from taskd.wire import frames, frames_codec
from taskd.wire.frames import Assignment, LeaseRef, Result, ResultStatus
from taskd.wire.parameters import encode
from taskd.wire.protobuf import bytes_field, text_field, varint_field
from taskd.worker.pool import Pool, run_pool
from taskd.worker.process import ProcessSpawner

HERE = Path(__file__).parent
COMPLETE, FAILURE, RETRY, CRASHED = (
    ResultStatus.COMPLETE,
    ResultStatus.FAILURE,
    ResultStatus.RETRY,
    ResultStatus.CRASHED,
)


def spawner(*modules: str, **settings: Any) -> ProcessSpawner:
    paths = (str(HERE), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return ProcessSpawner(
        modules=modules or ("worker_child_tasks", "worker_fault_tasks"), environment=environment, **settings
    )


def call(
    id_: str, task: str, *args: object, deadline_s: float = 30, attempts: int = 0, raw: bytes | None = None
) -> Assignment:
    parameters = encode(args, {}, "plaintext") if raw is None else raw
    activation = (
        text_field(1, id_)
        + text_field(2, "tests")
        + text_field(3, task)
        + bytes_field(5, text_field(1, "who") + text_field(2, "me"))
        + bytes_field(7, varint_field(1, attempts))
        + text_field(12, "app")
        + bytes_field(13, parameters)
    )
    return Assignment(id_, 1, activation, int(deadline_s * 1000))


class Broker:
    """A broker in memory that assigns what it is given and takes every result."""

    def __init__(self) -> None:
        self._out, self._in = trio.open_memory_channel[bytes](10_000)
        self.results: dict[str, Result] = {}
        self.started: set[LeaseRef] = set()
        self._arrived = trio.Event()
        self._welcomed = trio.Event()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[ClientStream]:
        yield self

    async def send(self, body: bytes) -> None:
        await trio.lowlevel.checkpoint()
        match frames_codec.decode_worker_frame(body):
            case frames.Hello():
                self._tell(frames.Welcome(1, "store", 30_000))
                self._welcomed.set()
            case frames.Credit(number):
                self._tell(frames.Assignments((), number))  # seen: a worker that leaves waits for it
            case frames.Started(leases):
                self.started.update(leases)
                self._arrived.set()
            case frames.Results(results):
                self.results.update({result.id: result for result in results})
                self._tell(frames.Taken(tuple(result.lease for result in results)))
                self._arrived.set()

    async def receive(self) -> bytes | None:
        async for body in self._in:
            return body
        return None

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        self._out.close()

    def _tell(self, frame: frames.BrokerFrame) -> None:
        self._out.send_nowait(frames_codec.encode_broker_frame(frame))

    async def stop(self, assignment: Assignment, writes: Path | None = None) -> None:
        """Assign it, and stop it once it began, and has written that."""
        await self._welcomed.wait()
        self._tell(frames.Assignments((assignment,)))
        with trio.fail_after(30):
            while assignment.lease not in self.started:
                self._arrived = trio.Event()
                await self._arrived.wait()
            while writes is not None and not await trio.Path(writes).exists():  # noqa: ASYNC110
                await trio.sleep(0.01)
        self._tell(frames.Stop((assignment.lease,)))

    async def stop_after(self, assignment: Assignment, seconds: float) -> None:
        """Assign it, and stop it wherever it is then."""
        await self._welcomed.wait()
        self._tell(frames.Assignments((assignment,)))
        await trio.sleep(seconds)
        self._tell(frames.Stop((assignment.lease,)))

    async def run(self, *assignments: Assignment) -> list[Result]:
        """The results of these, in their order."""
        await self._welcomed.wait()
        self._tell(frames.Assignments(assignments))
        with trio.fail_after(30):
            while not all(item.id in self.results for item in assignments):
                self._arrived = trio.Event()
                await self._arrived.wait()
        return [self.results.pop(item.id) for item in assignments]


_OTHERS: set[int] = set()  # children of this process that were there before the test


def remember_others() -> None:
    """To be called before each test: other ones may have started servers."""
    _OTHERS.clear()
    _OTHERS.update(children())


@asynccontextmanager
async def open_pool(
    slots: int = 1, *, memory_limit_bytes: int = 0, **config: Any
) -> AsyncIterator[tuple[Broker, Pool]]:
    broker, stop = Broker(), trio.Event()
    section = PoolSection(slots=slots, **{"spare_children": 0, "async_slots": 0, **config})

    async def run(task_status: trio.TaskStatus[Pool]) -> None:
        await run_pool(
            section,
            "default",
            stop=stop,
            task_status=task_status,
            spawner=spawner(memory_limit_bytes=memory_limit_bytes),
            connect=broker.connect,
            rng=random.Random(1),
        )

    before = open_descriptors()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            pool = await nursery.start(run)
            yield broker, pool
            stop.set()
    assert open_descriptors() == before
    assert not children()


def open_descriptors() -> set[str]:
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


def children() -> list[int]:
    """Worker's children of this process, living and dead ones."""
    me = str(os.getpid())
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == me and int(stat.parent.name) not in _OTHERS:
            found.append(int(stat.parent.name))
    return found


async def gone(pid: int) -> None:
    """Until that process, which is nobody's child here, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with trio.fail_after(10):
        await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)
