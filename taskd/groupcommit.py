"""Group commit: many callers' writes become one transaction, and each is answered after it.

A transaction of one row costs hundreds of microseconds of waiting for the disk; a thousand rows in
one transaction cost little more. So writes are queued, a single thread takes whatever has gathered,
applies it in one transaction, and answers all of it at once. Under load batches grow by
themselves; when idle, a write is alone and quick.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

import outcome
import trio

from taskd.clock import monotonic_s

T = TypeVar("T")

# Applies every write in order inside one transaction; a write that fails on its own yields its
# error and leaves its neighbours alone. Raises only when the whole transaction failed.
Write = Callable[[], object]
Apply = Callable[[Sequence[Write]], "list[outcome.Outcome[object]]"]
OnBatch = Callable[[int, float], None]


class Committer(Protocol):
    """Where writes are submitted, whether a thread or the caller itself performs them."""

    async def submit(self, write: Callable[[], T]) -> T: ...

    def begin(self, write: Callable[[], T]) -> Pending[T]:
        """As `submit`, without waiting yet. Those begun in one go are most likely one transaction."""
        ...


class InlineCommitter:
    """Performs each write at once in the caller's task: for the autojump clock, where no thread may run."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply

    async def submit(self, write: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        pending = self.begin(write)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return await pending.wait()

    def begin(self, write: Callable[[], T]) -> Pending[T]:
        pending = Pending(write)
        (pending.result,) = self._apply([write])  # type: ignore[assignment]  # the outcome of this very write
        pending.done.set()
        return pending


class Pending(Generic[T]):
    """A write that was submitted."""

    __slots__ = ("done", "result", "write")

    def __init__(self, write: Callable[[], T]) -> None:
        self.write = write
        self.done = trio.Event()
        self.result: outcome.Outcome[T] | None = None

    async def wait(self) -> T:
        """What it returned, after the commit that holds it; cancelling does not take effect before."""
        if not self.done.is_set():
            with trio.CancelScope(shield=True):
                await self.done.wait()
        assert self.result is not None
        return self.result.unwrap()


class GroupCommit:
    """A committer whose transactions run in one thread of their own.

    Open it with `open_group_commit`. `on_batch` is called in the Trio thread after each
    transaction with the number of writes and the seconds it took.
    """

    def __init__(self, apply: Apply, on_batch: OnBatch, max_batch: int) -> None:
        self._apply = apply
        self._on_batch = on_batch
        self._max_batch = max_batch
        self._queue: queue.SimpleQueue[Pending[object] | None] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._stopped = trio.Event()
        self._closing = False

    async def submit(self, write: Callable[[], T]) -> T:
        """Queue `write`, wait for the commit that holds it, and return what it returned.

        Cancelling does not take effect between submission and commit: what was submitted
        happens, and its caller learns of it (design rule 4).
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        return await self.begin(write).wait()

    def begin(self, write: Callable[[], T]) -> Pending[T]:
        if self._closing:
            raise RuntimeError("submitted after close")
        pending = Pending(write)
        self._queue.put(pending)  # type: ignore[arg-type]  # the queue holds writes of every result type
        return pending

    def _run(self) -> None:
        open_ = True
        while open_:
            batch: list[Pending[object]] = []
            item = self._queue.get()
            while item is not None:
                batch.append(item)
                if len(batch) >= self._max_batch or self._queue.empty():
                    break
                item = self._queue.get()
            open_ = item is not None
            if batch:
                self._perform(batch)
        self._token.run_sync_soon(self._stopped.set)

    def _perform(self, batch: list[Pending[object]]) -> None:
        began_s = monotonic_s()
        try:
            results = self._apply([waiting.write for waiting in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"expected {len(batch)} results of a transaction, found {len(results)}")
        except BaseException as error:  # whatever it was, an end of this thread would hang every caller
            results = [outcome.Error(error) for _ in batch]
        for waiting, result in zip(batch, results, strict=True):  # the lengths are checked above
            waiting.result = result
        self._token.run_sync_soon(self._announce, batch, monotonic_s() - began_s)

    def _announce(self, batch: list[Pending[object]], seconds: float) -> None:
        for waiting in batch:
            waiting.done.set()
        self._on_batch(len(batch), seconds)

    async def _close(self) -> None:
        self._closing = True
        self._queue.put(None)
        with trio.CancelScope(shield=True):
            await self._stopped.wait()


@asynccontextmanager
async def open_group_commit(
    apply: Apply,
    *,
    name: str,
    on_batch: OnBatch = lambda size, seconds: None,
    max_batch: int = 4096,
) -> AsyncIterator[GroupCommit]:
    """Run the committing thread while the block lasts; what was submitted is committed before it ends."""
    committer = GroupCommit(apply, on_batch, max_batch)
    threading.Thread(target=committer._run, name=name, daemon=True).start()
    try:
        yield committer
    finally:
        await committer._close()
