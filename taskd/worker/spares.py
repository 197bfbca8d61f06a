"""Children that are kept ready, so that replacing one does not cost its start-up.

A start imports every plugin, which takes long where plugins are large. And a child that leaves has its
time to do so without a slot waiting for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

import structlog
import trio

from taskd.errors import StartupError
from taskd.worker.child import Child, ChildGone
from taskd.worker.entry_pipe import ProtocolViolation

log = structlog.get_logger("taskd.worker")

RETIRE_WITHIN_S = 10.0  # for a child that was dismissed, and has nothing left to do
AGAIN_AFTER_S = 10.0  # when a spare did not start


C = TypeVar("C", bound=Child)
C_co = TypeVar("C_co", bound=Child, covariant=True)


class Opens(Protocol[C_co]):
    """A `Spawner` of one kind of children."""

    def open(self) -> AbstractAsyncContextManager[C_co]: ...


class _Kept(Generic[C]):
    """One child, in the hands of the task that opened it."""

    def __init__(self, child: C) -> None:
        self.child = child
        self.life = trio.CancelScope()  # shielded while a slot has the child
        self.waiting = trio.CancelScope()  # for a slot to take it
        self.handed_over = trio.Event()
        self.released = trio.Event()


class Spares(Generic[C]):
    """Implements `Spawner` on top of another one. `run` it; children can be opened while it runs.

    `count`: how many to keep ready from `begin` on.
    """

    def __init__(self, spawner: Opens[C], count: int) -> None:
        self._spawner = spawner
        self._count = count
        self._ready: deque[_Kept[C]] = deque()
        self._starting = 0
        self._began = False
        self._nursery: trio.Nursery | None = None

    @property
    def ready_count(self) -> int:
        return len(self._ready)

    async def run(self, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then once every child is given back, and ended."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def begin(self) -> None:
        """Start the spares: whoever needed a child to begin with has one."""
        self._began = True
        self._refill()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[C]:
        """A spare if there is one, else a new child. Leaving the block does not wait for the child's end."""
        assert self._nursery is not None, "run it first"
        kept: _Kept[C]
        kept = self._ready.popleft() if self._ready else await self._nursery.start(self._keep)
        kept.life.shield = True
        kept.waiting.cancel()
        self._refill()
        try:
            await kept.handed_over.wait()
            yield kept.child
        finally:
            kept.released.set()

    # ---- keeping

    def _refill(self) -> None:
        if self._began and self._nursery is not None:
            for _ in range(self._count - len(self._ready) - self._starting):
                self._starting += 1
                self._nursery.start_soon(self._keep_spare)

    async def _keep(self, task_status: trio.TaskStatus[_Kept[C]]) -> None:
        """For one slot. Raises StartupError to it."""
        async with self._spawner.open() as child:
            kept = _Kept(child)
            kept.handed_over.set()
            task_status.started(kept)
            with kept.life:
                await kept.released.wait()
            await _see_off(child)

    async def _keep_spare(self) -> None:
        try:
            async with self._spawner.open() as child:
                self._starting -= 1
                await self._offer(_Kept(child))
                await _see_off(child)
        except StartupError as error:
            log.warning("spare child did not start", error=str(error))
            await trio.sleep(AGAIN_AFTER_S)
            self._starting -= 1
        self._refill()

    async def _offer(self, kept: _Kept[C]) -> None:
        """Until a slot took it and gave it back, or it ended before."""
        self._ready.append(kept)
        with kept.life:
            with kept.waiting:
                why = await _until_ended(kept.child)
                if kept in self._ready:
                    self._ready.remove(kept)
                    log.warning("spare child ended", why=why)
                    await trio.sleep(AGAIN_AFTER_S)  # or they would end as fast as they start
                    return
                # It was taken a moment ago: whoever did so finds out.
            kept.handed_over.set()
            await kept.released.wait()


async def _until_ended(child: Child) -> str:
    """Read what it prints; it has nothing to report."""
    try:
        reports = await child.receive()
    except (ChildGone, ProtocolViolation) as error:
        return str(error)
    return f"child {child.pid} reported {reports[0]!r:.100} without work"


async def _see_off(child: Child) -> None:
    """Give one that was dismissed its time to leave; what a slot killed is gone already."""
    with trio.move_on_after(RETIRE_WITHIN_S), suppress(ChildGone, ProtocolViolation):
        while True:
            await child.receive()
