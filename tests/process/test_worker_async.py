"""A real async child: many tasks on one loop, and what each can do to the others."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from worker_child_calls import activation

from taskd.wire.frames import Assignment, Result, ResultStatus
from taskd.worker.async_crowd import Limits
from taskd.worker.async_part import PROGRAM
from taskd.worker.async_slot import AsyncSlot
from taskd.worker.backlog import Backlog
from taskd.worker.ladder import Graces
from taskd.worker.process import ProcessSpawner
from taskd.worker.routing import AsyncTasks

pytestmark = [pytest.mark.process, pytest.mark.slow]

HERE = Path(__file__).parent
COMPLETE, FAILURE, RETRY, CRASHED, INTERRUPTED = sorted(set(ResultStatus) - {ResultStatus.UNSPECIFIED})


def call(id_: str, task: str, *args: object, deadline_s: float = 30) -> Assignment:
    return Assignment(id_, 7, activation(id_, task, *args), int(deadline_s * 1000))


class Everything(AsyncTasks):
    def __bool__(self) -> bool:
        return True

    def calls(self, activation: bytes) -> bool:
        return True


class Scene:
    """One async slot with a real child, and the account that its results come to."""

    def __init__(self, **limits: Any) -> None:
        self.backlog = Backlog(self._wake, self._wake, lambda: self.slot.end_stopped())
        self.backlog.async_tasks = Everything()
        self.account = self.backlog.account("store")
        self.slot = AsyncSlot(
            0,
            ProcessSpawner(
                modules=["worker_async_tasks"],
                environment={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
                program=PROGRAM,
                shares_step=True,
            ),
            self.backlog,
            capacity=200,
            limits=Limits(
                **{
                    "max_tasks": 10_000,
                    "max_rss_bytes": None,
                    "stall_s": 2.0,
                    "graces": Graces(0.5, 0.5),
                    **limits,
                }
            ),
            on_change=self._wake,
            rng=random.Random(1),
        )
        self._change = trio.Event()

    def _wake(self) -> None:
        self.slot.wake()
        self._change.set()

    async def until_change(self) -> None:
        self._change = trio.Event()
        await self._change.wait()

    def give(self, *calls: Assignment) -> None:
        self.backlog.accept(self.account, calls, trio.current_time())

    async def until_started(self, *ids: str) -> None:
        with trio.fail_after(20):
            while not set(ids) <= {lease.id for lease in self.account.running}:
                await self.until_change()

    async def results(self, *ids: str) -> list[Result]:
        """Of these, in their order."""
        with trio.fail_after(20):
            while not set(ids) <= {lease.id for lease in self.account.untaken}:
                await self.until_change()
        found = {lease.id: result for lease, result in self.account.untaken.items()}
        for id_ in ids:
            self.account.taken([found[id_].lease])
        return [found[id_] for id_ in ids]

    async def run(self, *calls: Assignment) -> list[Result]:
        self.give(*calls)
        return await self.results(*(item.id for item in calls))

    def stop(self, id_: str) -> None:
        self.backlog.stop(self.account, [lease for lease in self.account.jobs if lease.id == id_])


@asynccontextmanager
async def open_scene(**limits: Any) -> AsyncIterator[Scene]:
    scene = Scene(**limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.slot.run)
        with trio.fail_after(30):
            while scene.slot.health != "warm":
                await scene.until_change()
        yield scene
        nursery.cancel_scope.cancel()


async def test_many_run_at_once_in_one_child() -> None:
    async with open_scene() as scene:
        results = await scene.run(*(call(str(number), "meets", 100) for number in range(100)))
        assert {result.status for result in results} == {COMPLETE}
        assert scene.slot.tally.crashes == 0


async def test_outcomes(tmp_path: Path) -> None:
    async with open_scene() as scene:
        in_nursery, asked, interrupted, wrong_child, fine, forked = await scene.run(
            call("in_nursery", "raises_in_nursery", "déjà vu"),
            call("asked", "asks"),
            call("interrupted", "interrupted"),
            call("wrong_child", "sync_noop"),
            call("fine", "noop"),
            call("forked", "forks", str(tmp_path / "copy")),
        )
        assert (in_nursery.status, in_nursery.reason, in_nursery.max_attempts) == (RETRY, "error", 4)
        assert "ValueError: déjà vu" in in_nursery.error
        assert "entry_async" not in in_nursery.error
        assert (asked.status, asked.reason, asked.delay_on_retry_s) == (RETRY, "requested", 11)
        assert (interrupted.status, interrupted.reason) == (FAILURE, "error")
        assert (wrong_child.status, wrong_child.reason) == (FAILURE, "wrong_child")
        assert (fine.status, forked.status) == (COMPLETE, COMPLETE)
        assert not (tmp_path / "copy").exists()


async def test_each_sees_its_own_context(tmp_path: Path) -> None:
    async with open_scene() as scene:
        ids = [f"id{number}" for number in range(20)]
        await scene.run(*(call(id_, "writes_its_name", str(tmp_path)) for id_ in ids))
        assert [(tmp_path / id_).read_text() for id_ in ids] == [",".join([f"{id_} 7"] * 3) for id_ in ids]


async def test_a_deadline_ends_one_and_not_the_others(tmp_path: Path) -> None:
    async with open_scene() as scene:
        late, cleaned, other, beating = await scene.run(
            call("late", "sleeps", 60, deadline_s=0.3),
            call("cleaned", "cleans_up", str(tmp_path / "x"), deadline_s=0.3),
            call("other", "sleeps", 0.9),
            call("beating", "beats", 4, deadline_s=0.6),
        )
        assert (late.status, late.reason, late.delay_on_retry_s) == (RETRY, "timeout", 7)
        assert "in sleeps" in late.error
        assert (cleaned.status, cleaned.reason) == (FAILURE, "timeout")
        assert (tmp_path / "x").read_text() == "clean"
        assert (other.status, beating.status) == (COMPLETE, COMPLETE)
        assert scene.slot.tally.timeouts == 2


async def test_a_cancel_ends_one_and_not_the_others(tmp_path: Path) -> None:
    async with open_scene() as scene:
        scene.give(call("unwanted", "cleans_up", str(tmp_path / "x")), call("other", "sleeps", 0.5))
        await scene.until_started("unwanted", "other")
        scene.stop("unwanted")
        (other,) = await scene.results("other")
        assert other.status is COMPLETE
        assert (tmp_path / "x").read_text() == "clean"
        assert not scene.account.jobs
        assert not scene.account.untaken


async def test_a_blocked_loop_goes_on_without_the_task_that_blocks_it() -> None:
    async with open_scene() as scene:
        scene.give(call("other", "sleeps", 0.5))
        await scene.until_started("other")
        (blocks,) = await scene.run(call("blocks", "blocks"))
        (other,) = await scene.results("other")
        assert (blocks.status, blocks.reason) == (FAILURE, "error")
        assert "LoopBlocked" in blocks.error
        assert "time.sleep(60)" in blocks.error
        assert other.status is COMPLETE
        assert scene.slot.tally.crashes == 0


async def test_a_loop_blocked_in_c_ends_with_its_child_and_only_the_culprit_is_to_blame() -> None:
    async with open_scene() as scene:
        scene.give(call("other", "sleeps", 20), call("past", "sleeps", 20, deadline_s=1.5))
        await scene.until_started("other", "past")
        blocks, other, past = [
            *await scene.run(call("blocks", "blocks_in_c")),
            *await scene.results("other", "past"),
        ]
        assert (blocks.status, blocks.reason) == (CRASHED, "blocked")
        assert "SIGKILL" in blocks.error
        assert other.status is INTERRUPTED
        assert (past.status, past.reason) == (RETRY, "timeout")
        (after,) = await scene.run(call("after", "noop"))
        assert after.status is COMPLETE
        assert scene.slot.tally.crashes == 1


async def test_one_that_shields_itself_is_ended_with_its_child() -> None:
    async with open_scene() as scene:
        scene.give(call("other", "sleeps", 20))
        await scene.until_started("other")
        (shields,) = await scene.run(call("shields", "shields", deadline_s=0.3))
        (other,) = await scene.results("other")
        assert (shields.status, shields.reason) == (FAILURE, "timeout")
        assert other.status is INTERRUPTED
        (after,) = await scene.run(call("after", "noop"))
        assert after.status is COMPLETE


async def test_a_crash_counts_for_the_one_whose_code_ran() -> None:
    async with open_scene() as scene:
        scene.give(call("other", "sleeps", 20))
        await scene.until_started("other")
        (bad,) = await scene.run(call("bad", "segfaults"))
        (other,) = await scene.results("other")
        assert (bad.status, other.status) == (CRASHED, INTERRUPTED)
        assert "SIGSEGV" in bad.error
        (after,) = await scene.run(call("after", "noop"))
        assert after.status is COMPLETE


async def test_a_worn_child_finishes_what_it_runs_while_its_successor_works() -> None:
    async with open_scene(max_tasks=2) as scene:
        scene.give(call("slow", "sleeps", 1))
        await scene.until_started("slow")
        results = await scene.run(*(call(str(number), "noop") for number in range(2)))
        assert {result.status for result in results} == {COMPLETE}
        (slow,) = await scene.results("slow")
        assert slow.status is COMPLETE
        assert scene.slot.tally.crashes == 0


async def test_signals_of_others_are_not_for_it() -> None:
    async with open_scene() as scene:
        scene.give(call("slow", "sleeps", 0.5))
        await scene.until_started("slow")
        pid = scene.slot.pids[0]
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        (slow,) = await scene.results("slow")
        assert slow.status is COMPLETE
        assert scene.slot.pids == [pid]


async def test_what_a_task_prints_without_ending_the_line_is_its_own() -> None:
    with capture_logs() as logs:
        async with open_scene() as scene:
            for number in range(3):
                await scene.run(call(f"it{number}", "writes", f"text {number}"))
    lines = [(line["text"], line["id"]) for line in logs if line["event"] == "task output"]
    assert lines == [(f"text {number}", f"it{number}") for number in range(3)]
