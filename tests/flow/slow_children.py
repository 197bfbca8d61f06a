"""Children that take their time in virtual time, and streams in memory that lead to a broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

import taskd.worker.entry_pipe as pipe
from taskd.errors import PeerUnavailable
from taskd.wire.envelope import scan
from taskd.wire.frames import ResultStatus
from taskd.worker.async_watch import AsyncChild
from taskd.worker.child import ChildGone, Piece
from taskd.worker.output import Whose, nobody

DONE = pipe.Verdict(int(ResultStatus.COMPLETE))
FAILED = pipe.Verdict(int(ResultStatus.FAILURE))


class SlowChild:
    """Takes `run_s` for each task; `at_once` of them at the same time. Knows `tasks`."""

    pid = 1
    rss_bytes = 0
    whose: Whose = staticmethod(nobody)

    def __init__(
        self, tasks: tuple[pipe.KnownTask, ...], run_s: float, at_once: int, started: list[str]
    ) -> None:
        self.ready = pipe.Ready(tasks)
        self._run_s = run_s
        self._slots = trio.Semaphore(at_once)
        self._started = started
        self._given = 0
        self._work_in, self._work = trio.open_memory_channel[tuple[int, Piece]](1_000)
        self._out, self._reports = trio.open_memory_channel[pipe.Report](1_000)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for number, piece in self._work:
                await self._slots.acquire()
                nursery.start_soon(self._task, number, piece)

    async def _task(self, number: int, piece: Piece) -> None:
        self._started.append(scan(piece.activation).id)
        self._out.send_nowait(pipe.Started(number, FAILED))
        await trio.sleep(self._run_s)
        self._out.send_nowait(pipe.Done(number, DONE, 1))
        self._slots.release()

    def give(self, work: Sequence[Piece]) -> bool:
        for piece in work:
            self._given += 1
            self._work_in.send_nowait((self._given, piece))
        return True

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> list[pipe.Report]:
        try:
            return [await self._reports.receive()]
        except trio.EndOfChannel:
            raise ChildGone from None

    def take_back(self) -> int:
        return 0

    def has_started(self) -> bool:
        return False

    def look(self) -> None:
        pass

    def step(self) -> pipe.Step:
        return pipe.Step(0, int(trio.current_time() * 10))

    def dismiss(self, *, alone: bool = False) -> None:
        self._work_in.close()

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        pass

    def terminate(self, number: int) -> None:
        pass

    def kill(self) -> None:
        self._out.close()


class SlowSpawner:
    """`started`: ids of what its children began, in their order."""

    def __init__(self, *tasks: pipe.KnownTask, run_s: float, at_once: int = 1) -> None:
        self.started: list[str] = []
        self.children = 0
        self._tasks = tasks
        self._run_s = run_s
        self._at_once = at_once

    @asynccontextmanager
    async def open(self) -> AsyncIterator[AsyncChild]:
        child = SlowChild(self._tasks, self._run_s, self._at_once, self.started)
        self.children += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            yield child
            nursery.cancel_scope.cancel()


class End:
    """One end of a stream in memory."""

    def __init__(self, out: trio.MemorySendChannel[bytes], into: trio.MemoryReceiveChannel[bytes]) -> None:
        self._out, self._into = out, into

    async def send(self, body: bytes) -> None:
        try:
            await self._out.send(body)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise PeerUnavailable from None

    async def receive(self) -> bytes | None:
        async for body in self._into:
            return body
        return None

    async def finish(self) -> None:
        await self._out.aclose()

    def close(self) -> None:
        self._out.close()
        self._into.close()


def open_stream() -> tuple[End, End]:
    """The worker's end and the broker's."""
    to_broker, at_broker = trio.open_memory_channel[bytes](100)
    to_worker, at_worker = trio.open_memory_channel[bytes](100)
    return End(to_broker, at_worker), End(to_worker, at_broker)
