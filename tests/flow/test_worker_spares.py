"""Spare children, in virtual time: what waits for a start-up, and what does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import taskd.worker.entry_pipe as pipe
from taskd.errors import StartupError
from taskd.worker.child import Child, ChildGone
from taskd.worker.output import nobody
from taskd.worker.spares import Spares

START_S = 5.0


class Idle:
    """A child that does nothing, and takes its time to start and to leave."""

    ready = pipe.Ready(())
    rss_bytes = 0
    whose = staticmethod(nobody)

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.gone = trio.Event()
        self.dismissed = False
        self.closed_at: float | None = None
        self._receiving = False

    async def receive(self) -> list[pipe.Report]:
        assert not self._receiving, "two at a time"
        self._receiving = True
        try:
            await self.gone.wait()
        finally:
            self._receiving = False
        raise ChildGone(f"child {self.pid} ended")

    def dismiss(self, *, alone: bool = False) -> None:
        self.dismissed = True


class Spawner:
    def __init__(self) -> None:
        self.children: list[Idle] = []
        self.failures = 0
        self.open_count = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Child]:
        await trio.sleep(START_S)
        if self.failures:
            self.failures -= 1
            raise StartupError("no")
        child = Idle(len(self.children))
        self.children.append(child)
        self.open_count += 1
        try:
            yield child  # type: ignore[misc]  # what Spares uses of it
        finally:
            self.open_count -= 1
            child.closed_at = trio.current_time()


@asynccontextmanager
async def spares(count: int) -> AsyncIterator[tuple[Spares[Child], Spawner]]:
    spawner = Spawner()
    it = Spares(spawner, count)
    async with trio.open_nursery() as nursery:
        await nursery.start(it.run)
        yield it, spawner
        nursery.cancel_scope.cancel()
    assert spawner.open_count == 0


async def test_a_spare_is_there_at_once_and_replaced_by_the_next(autojump_clock: MockClock) -> None:
    async with spares(1) as (it, spawner):
        async with it.open() as first:
            assert trio.current_time() >= START_S, "there was none yet"
            assert len(spawner.children) == 1, "nothing is spared before the slots have theirs"
            it.begin()
            await trio.sleep(START_S + 1)
            assert it.ready_count == 1
        begin = trio.current_time()
        async with it.open() as second:
            assert trio.current_time() == begin
            assert second.pid != first.pid
            await trio.sleep(START_S + 1)
            assert it.ready_count == 1
            assert len(spawner.children) == 3


async def test_a_child_that_leaves_keeps_nobody_waiting(autojump_clock: MockClock) -> None:
    async with spares(0) as (it, spawner):
        async with it.open() as child:
            child.dismiss()
        (idle,) = spawner.children
        begin = trio.current_time()
        await trio.sleep(3)
        assert idle.closed_at is None, "it is given its time"
        idle.gone.set()
        await trio.testing.wait_all_tasks_blocked()
        assert idle.closed_at == begin + 3


async def test_a_child_that_does_not_leave_is_ended(autojump_clock: MockClock) -> None:
    async with spares(0) as (it, spawner):
        async with it.open() as child:
            child.dismiss()
        begin = trio.current_time()
        await trio.sleep(60)
        assert spawner.children[0].closed_at == begin + 10


async def test_a_spare_that_ended_is_not_given_out(autojump_clock: MockClock) -> None:
    async with spares(1) as (it, spawner):
        it.begin()
        await trio.sleep(START_S + 1)
        spawner.children[0].gone.set()
        await trio.testing.wait_all_tasks_blocked()
        assert it.ready_count == 0
        async with it.open() as child:
            assert child.pid == 1
        await trio.sleep(60)
        assert it.ready_count == 1


async def test_spares_that_do_not_start_are_tried_again_slowly(autojump_clock: MockClock) -> None:
    async with spares(1) as (it, spawner):
        spawner.failures = 3
        it.begin()
        await trio.sleep(3 * (START_S + 10) - 1)
        assert it.ready_count == 0
        await trio.sleep(START_S + 2)
        assert it.ready_count == 1


async def test_who_opens_one_hears_that_it_does_not_start(autojump_clock: MockClock) -> None:
    async with spares(0) as (it, spawner):
        spawner.failures = 1
        with pytest.raises(StartupError):
            async with it.open():
                pass


async def test_a_child_in_use_is_ended_after_its_user_let_go(autojump_clock: MockClock) -> None:
    spawner = Spawner()
    it = Spares(spawner, 1)
    order: list[str] = []

    async def use() -> None:
        async with it.open() as child:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)
                order.append("let go")
                assert spawner.children[child.pid].closed_at is None

    async with trio.open_nursery() as nursery:
        await nursery.start(it.run)
        it.begin()
        await trio.sleep(START_S + 1)
        nursery.start_soon(use)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert order == ["let go"]
    assert spawner.open_count == 0


async def test_a_spare_that_ends_while_it_is_taken_harms_nobody_else(autojump_clock: MockClock) -> None:
    async with spares(1) as (it, spawner):
        it.begin()
        await trio.sleep(START_S + 1)
        spawner.children[0].gone.set()  # and before anybody was told:
        async with it.open() as child:
            with pytest.raises(ChildGone):
                await child.receive()
        await trio.sleep(60)
        assert it.ready_count == 1
