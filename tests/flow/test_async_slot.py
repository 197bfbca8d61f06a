"""An async slot in virtual time: scripted children that run many tasks on one loop."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing
from trio.testing import MockClock

import taskd.worker.entry_pipe as pipe
from taskd.errors import StartupError
from taskd.wire.frames import Assignment, LeaseRef, Result, ResultStatus, TaskName
from taskd.wire.protobuf import text_field
from taskd.worker.async_blame import SPARED_TIMES
from taskd.worker.async_crowd import Limits
from taskd.worker.async_slot import AsyncSlot
from taskd.worker.async_watch import AsyncChild
from taskd.worker.backlog import Backlog
from taskd.worker.child import ChildGone, Piece
from taskd.worker.ladder import Graces
from taskd.worker.output import Whose, nobody
from taskd.worker.routing import AsyncTasks

COMPLETE, FAILURE, RETRY, CRASHED, INTERRUPTED = sorted(set(ResultStatus) - {ResultStatus.UNSPECIFIED})
DONE = pipe.Verdict(int(COMPLETE))
RETRY_ON_TIMEOUT = pipe.Verdict(int(RETRY), "timeout", "", 4, 7)


def call(name: str, deadline_s: float = 100, expires_in_s: float | None = None) -> Assignment:
    """What the task does is its name: "sleep 3", "shield 60", "block 9", "block 9 hard", "crash" ..."""
    raw = text_field(1, name) + text_field(2, "tests") + text_field(3, "any") + text_field(12, "app")
    expires_in_ms = None if expires_in_s is None else int(expires_in_s * 1000)
    return Assignment(name, 1, raw, int(deadline_s * 1000), expires_in_ms)


class ScriptedChild:
    """Does in virtual time what an async child does."""

    ready = pipe.Ready((pipe.KnownTask("app", "tests", "any", True),))

    def __init__(self, pid: int, names: dict[bytes, str]) -> None:
        self.pid = pid
        self.rss_bytes = 0
        self.whose: Whose = nobody
        self.killed = self.dismissed = False
        self.started: list[str] = []
        self.ordered: list[tuple[str, int]] = []
        self._names = names
        self._step = self._steps = 0
        self._hard = False  # what blocks the loop cannot be interrupted
        self._unblocked: trio.Event | None = None  # set once the loop is not blocked any more
        self._count = 0
        self._tokens: list[tuple[int, Piece, float]] = []
        self._scopes: dict[int, trio.CancelScope] = {}
        self._news = trio.Event()
        self._out, self._in = trio.open_memory_channel[pipe.Report](10_000)

    def give(self, work: Sequence[Piece]) -> bool:
        for piece in work:
            self._count += 1
            self._tokens.append((self._count, piece, trio.current_time()))
        self._news.set()
        return True

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> list[pipe.Report]:
        try:
            reports = [await self._in.receive()]
        except trio.EndOfChannel:
            raise ChildGone(f"child {self.pid} ended") from None
        while True:
            try:
                reports.append(self._in.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                return reports

    def take_back(self) -> int:
        taken = len(self._tokens)
        self._tokens.clear()
        return taken

    def has_started(self) -> bool:
        return False

    def look(self) -> None:
        pass

    def dismiss(self) -> None:
        self.dismissed = True
        self._news.set()

    def step(self) -> pipe.Step:
        return pipe.Step(self._step, self._steps)

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        self.ordered.append((kind.name, number))
        if number and number == self._step and self._unblocked is not None and not self._hard:
            self._unblocked.set()  # the signal interrupts the one that blocks
        elif number in self._scopes and not self._step:
            self._scopes[number].cancel()

    def terminate(self, number: int) -> None:
        self.ordered.append(("END", number))

    def kill(self) -> None:
        if not self.killed:
            self.killed = True
            self._out.close()
            self._news.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            while not self.killed:
                if self._unblocked is not None:
                    await self._unblocked.wait()
                    self._step, self._unblocked = 0, None
                tokens, self._tokens = self._tokens, []
                for number, piece, at in tokens:
                    if piece.start_within_s is not None and trio.current_time() >= at + piece.start_within_s:
                        self._tell(pipe.Expired(number))
                        continue
                    if self._names[piece.activation].startswith("junk"):
                        self._tell(pipe.Ready(()))  # and what comes behind it is not read any more
                    self._tell(pipe.Started(number, RETRY_ON_TIMEOUT))
                    self._scopes[number] = trio.CancelScope(deadline=trio.current_time() + piece.deadline_s)
                    nursery.start_soon(self._task, number, self._names[piece.activation])
                if self.dismissed and not self._scopes:
                    break
                await self._until_news()
            nursery.cancel_scope.cancel()
        self._out.close()

    async def _until_news(self) -> None:
        self._news = trio.Event()
        await self._news.wait()

    async def _beat(self) -> None:
        while True:
            await trio.sleep(0.2)
            self._steps += self._unblocked is None

    async def _task(self, number: int, name: str) -> None:
        self.started.append(name)
        how, _, rest = name.partition(" ")
        verdict = RETRY_ON_TIMEOUT
        with self._scopes[number]:
            verdict = await self._do(number, how, rest.split())
        del self._scopes[number]
        self._tell(pipe.Done(number, verdict, 1_000))
        self._news.set()

    async def _do(self, number: int, how: str, what: list[str]) -> pipe.Verdict:
        if how in ("crash", "vanish"):
            self._step = number if how == "crash" else 0
            self.kill()
            await trio.sleep_forever()
        elif how == "mute":
            self._unblocked = trio.Event()  # silent, and nobody knows why
            self._news.set()
            await trio.sleep_forever()
        elif how == "block":
            self._step, self._hard = number, "hard" in what
            unblocked = self._unblocked = trio.Event()
            self._news.set()
            with trio.move_on_after(float(what[0])):
                await unblocked.wait()
            unblocked.set()
            if self._hard and ("CANCEL", number) in self.ordered:
                return pipe.Verdict(int(FAILURE), "cancelled")  # it reads the order now
            return pipe.Verdict(int(FAILURE), "error")
        else:
            with trio.CancelScope(shield=how == "shield"):
                await trio.sleep(float(what[0]))
        return DONE

    def _tell(self, report: pipe.Report) -> None:
        if not self.killed:
            self._out.send_nowait(report)


@dataclass
class ScriptedSpawner:
    failures: int = 0
    names: dict[bytes, str] = field(default_factory=dict)
    children: list[ScriptedChild] = field(default_factory=list)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[AsyncChild]:
        if self.failures:
            self.failures -= 1
            raise StartupError("no such interpreter")
        child = ScriptedChild(1000 + len(self.children), self.names)
        self.children.append(child)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            try:
                yield child
            finally:
                child.kill()
                nursery.cancel_scope.cancel()


class Scene:
    def __init__(self, capacity: int = 10, **limits: Any) -> None:
        self.spawner = ScriptedSpawner()
        self.backlog = Backlog(self._wake, self._wake, lambda: self.slot.end_stopped())
        self.backlog.async_tasks = AsyncTasks([TaskName("app", "tests", "any")])
        self.account = self.backlog.account("store")
        self.slot = AsyncSlot(
            0,
            self.spawner,
            self.backlog,
            capacity=capacity,
            limits=Limits(
                **{
                    "max_tasks": 1_000,
                    "max_rss_bytes": None,
                    "stall_s": 5.0,
                    "graces": Graces(1.0, 1.0),
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

    def give(self, *calls: Assignment) -> None:
        self.spawner.names |= {item.activation: item.id for item in calls}
        self.backlog.accept(self.account, calls, trio.current_time())

    async def results(self, *ids: str, within_s: float = 1_000) -> list[Result]:
        with trio.fail_after(within_s):
            while not set(ids) <= {lease.id for lease in self.account.untaken}:
                self._change = trio.Event()
                await self._change.wait()
        return [self.account.untaken.pop(LeaseRef(id_, 1)) for id_ in ids]

    async def run(self, *calls: Assignment, within_s: float = 1_000) -> list[Result]:
        self.give(*calls)
        return await self.results(*(item.id for item in calls), within_s=within_s)

    def stop(self, id_: str) -> None:
        self.backlog.stop(self.account, [LeaseRef(id_, 1)])

    @property
    def started(self) -> list[str]:
        return [name for child in self.spawner.children for name in child.started]


@asynccontextmanager
async def open_scene(capacity: int = 10, failures: int = 0, **limits: Any) -> AsyncIterator[Scene]:
    scene = Scene(capacity, **limits)
    scene.spawner.failures = failures
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.slot.run)
        yield scene
        nursery.cancel_scope.cancel()
    assert all(child.killed for child in scene.spawner.children)


async def test_they_run_side_by_side_up_to_the_capacity(autojump_clock: MockClock) -> None:
    async with open_scene(capacity=10) as scene:
        begin = trio.current_time()
        await scene.run(*(call(f"sleep 10 {number}") for number in range(20)))
        assert 20 <= trio.current_time() - begin < 21  # two rounds
        assert scene.slot.tally.ended == 20


async def test_the_room_is_told_to_the_pool(autojump_clock: MockClock) -> None:
    async with open_scene(capacity=10) as scene:
        scene.give(*(call(f"sleep 10 {number}") for number in range(12)))
        await trio.sleep(1)
        assert (scene.slot.free, scene.slot.jobs_count, scene.backlog.async_count) == (0, 10, 2)
        assert scene.slot.remaining_s(trio.current_time()) == 99
        await trio.sleep(15)
        assert (scene.slot.free, scene.slot.jobs_count) == (8, 2)


async def test_a_deadline_ends_one(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        late, other = await scene.run(call("sleep 60", deadline_s=10), call("sleep 20"))
        assert (late.status, late.reason, late.delay_on_retry_s) == (RETRY, "timeout", 7)
        assert other.status is COMPLETE
        assert (scene.slot.tally.timeouts, len(scene.spawner.children)) == (1, 1)


async def test_what_shields_itself_ends_with_the_child_and_others_are_spared(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        scene.give(call("sleep 60"))
        begin = trio.current_time()
        (shielded,) = await scene.run(call("shield 60", deadline_s=10))
        assert 10 + 2 <= trio.current_time() - begin < 10 + 3  # both graces
        assert (shielded.status, shielded.reason) == (RETRY, "timeout")
        assert "deadline of 10 s" in shielded.error
        (other,) = await scene.results("sleep 60")
        assert other.status is INTERRUPTED
        assert scene.spawner.children[0].ordered == [("END", 2)]
        (after,) = await scene.run(call("sleep 1"))
        assert after.status is COMPLETE


async def test_a_loop_that_is_interrupted_goes_on(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.give(call("sleep 20"))
        (blocking,) = await scene.run(call("block 60"), within_s=7)
        assert (blocking.status, blocking.reason) == (FAILURE, "error")
        (other,) = await scene.results("sleep 20")
        assert other.status is COMPLETE
        assert scene.spawner.children[0].ordered == [("CANCEL", 2)]
        assert (len(scene.spawner.children), scene.slot.tally.stalls) == (1, 1)


async def test_a_loop_that_is_not_interrupted_is_killed_and_one_is_to_blame(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        scene.give(call("sleep 60"), call("sleep 50", deadline_s=2))
        blocking, other, past = await scene.run(call("block 60 hard")) + await scene.results(
            "sleep 60", "sleep 50"
        )
        assert (blocking.status, blocking.reason) == (CRASHED, "blocked")
        assert other.status is INTERRUPTED
        assert (past.status, past.reason) == (RETRY, "timeout")
        assert (scene.slot.tally.crashes, scene.slot.tally.timeouts) == (1, 1)
        assert trio.current_time() < 10  # stall, both graces and a tick


async def test_a_loop_that_goes_on_by_itself_after_all(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.give(call("sleep 20"))
        (blocking,) = await scene.run(call("block 5.8 hard"))
        assert (blocking.status, blocking.reason) == (FAILURE, "blocked"), "nobody else cancelled it"
        (other,) = await scene.results("sleep 20")
        assert other.status is COMPLETE


async def test_who_is_there_too_often_is_not_spared(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        for expected in [INTERRUPTED] * SPARED_TIMES + [CRASHED]:
            scene.give(call("sleep 60"), call("block 60 hard"))
            blocking, other = await scene.results("block 60 hard", "sleep 60")
            assert (blocking.status, other.status) == (CRASHED, expected)


async def test_when_nobody_is_known_to_block_all_count_as_crashed(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        results = await scene.run(call("sleep 60"), call("mute"))
        assert {result.status for result in results} == {CRASHED}


async def test_what_the_blocked_child_did_not_begin_is_run_by_its_successor(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        scene.give(call("block 60 hard"))
        await trio.sleep(1)
        (late,) = await scene.run(call("sleep 1"), within_s=10)
        assert late.status is COMPLETE
        assert scene.spawner.children[1].started == ["sleep 1"]


async def test_a_crash_counts_for_the_one_whose_code_ran(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.give(call("sleep 60"))
        await trio.sleep(1)
        bad, other = await scene.run(call("crash")) + await scene.results("sleep 60")
        assert (bad.status, bad.reason) == (CRASHED, "crashed")
        assert other.status is INTERRUPTED
        assert scene.slot.tally.crashes == 1


async def test_a_crash_without_a_culprit_counts_for_all_that_ran(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.give(call("sleep 60"))
        await trio.sleep(1)
        bad, other = await scene.run(call("vanish")) + await scene.results("sleep 60")
        assert (bad.status, other.status) == (CRASHED, CRASHED)
        assert scene.slot.tally.crashes == 2


async def test_a_worker_that_slept_itself_blames_nobody(mock_clock: MockClock) -> None:
    async with open_scene() as scene:
        await trio.testing.wait_all_tasks_blocked()
        scene.give(call("sleep 30"))
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(60)  # as after SIGSTOP and SIGCONT of both
        (slept,) = await scene.results("sleep 30")
        assert slept.status is COMPLETE
        assert scene.slot.tally.stalls == 0


async def test_a_worn_child_finishes_while_its_successor_works(autojump_clock: MockClock) -> None:
    async with open_scene(max_tasks=3) as scene:
        scene.give(call("sleep 30"))
        await scene.run(*(call(f"sleep 1 {number}") for number in range(4)), within_s=5)
        first, second = scene.spawner.children
        assert (len(first.started), len(second.started)) == (3, 2)
        assert first.dismissed
        assert not first.killed
        (slow,) = await scene.results("sleep 30")
        assert slow.status is COMPLETE
        assert scene.slot.tally.crashes == 0


async def test_a_child_that_grew_too_big_is_replaced(autojump_clock: MockClock) -> None:
    async with open_scene(max_rss_bytes=1_000) as scene:
        scene.give(call("sleep 30"))
        await trio.sleep(1)
        first = scene.spawner.children[0]
        first.rss_bytes = 1_001
        await trio.sleep(1)
        assert not first.dismissed, "it has done nothing yet"
        await scene.run(call("sleep 1"))
        await trio.sleep(0.5)
        await scene.run(call("sleep 2"))
        assert first.dismissed
        assert scene.spawner.children[1].started == ["sleep 2"]
        (slow,) = await scene.results("sleep 30")
        assert slow.status is COMPLETE


async def test_a_worn_child_that_does_not_leave_is_ended(autojump_clock: MockClock) -> None:
    async with open_scene(max_tasks=1) as scene:
        await scene.run(call("sleep 1"))
        first = scene.spawner.children[0]
        first.dismissed = False  # it does not see that it was
        await trio.sleep(20)
        assert first.killed
        assert scene.slot.tally.crashes == 0


async def test_a_stop_cancels_one_in_time(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.give(call("sleep 60"), call("sleep 20"))
        await trio.sleep(1)
        scene.stop("sleep 60")
        (other,) = await scene.results("sleep 20")
        assert other.status is COMPLETE
        assert not scene.account.jobs
        assert scene.spawner.children[0].ordered == [("CANCEL", 1)]


async def test_a_stop_that_is_shielded_against_ends_the_child(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.give(call("shield 60"), call("sleep 20"))
        await trio.sleep(1)
        scene.stop("shield 60")
        (other,) = await scene.results("sleep 20", within_s=5)
        assert other.status is INTERRUPTED
        assert not scene.account.jobs
        assert not scene.account.untaken


async def test_what_expired_is_handed_back(autojump_clock: MockClock) -> None:
    async with open_scene(capacity=1) as scene:
        scene.give(call("sleep 3"), call("sleep 4", expires_in_s=2))
        await scene.results("sleep 3")
        await trio.sleep(1)
        assert scene.started == ["sleep 3"]
        assert LeaseRef("sleep 4", 1) in scene.account.holding
        assert LeaseRef("sleep 4", 1) not in scene.account.jobs


async def test_starts_that_fail_are_tried_again(autojump_clock: MockClock) -> None:
    async with open_scene(failures=3) as scene:
        await trio.sleep(0.1)
        assert (scene.slot.health, scene.slot.free) == ("failing", 0)
        (late,) = await scene.run(call("sleep 1"))
        assert late.status is COMPLETE
        assert scene.slot.failed_starts_count == 3


async def test_what_began_behind_junk_in_the_pipe_does_not_begin_again(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        (junk, other) = await scene.run(call("junk 60"), call("sleep 60"), within_s=10)
        assert (junk.status, other.status) == (CRASHED, CRASHED)
        assert sorted(scene.started) == ["junk 60", "sleep 60"]
        (after,) = await scene.run(call("sleep 1"))
        assert after.status is COMPLETE


async def test_a_child_whose_loop_was_blocked_by_its_only_task_takes_work_again(
    autojump_clock: MockClock,
) -> None:
    async with open_scene(capacity=1) as scene:
        blocking, after = await scene.run(call("block 60"), call("sleep 1"), within_s=10)
        assert (blocking.status, after.status) == (FAILURE, COMPLETE)
        assert len(scene.spawner.children) == 1


async def test_a_child_takes_what_waits_as_soon_as_its_loop_goes_on(autojump_clock: MockClock) -> None:
    async with open_scene(capacity=3) as scene:
        scene.give(call("sleep 50"))
        await scene.run(call("block 60"), call("sleep 1"), call("sleep 2"), within_s=12)


async def test_a_loop_that_is_blocked_with_nothing_left_in_its_child_is_ended(
    autojump_clock: MockClock,
) -> None:
    async with open_scene(capacity=1) as scene:
        scene.give(call("mute"))
        await trio.sleep(1)
        scene.stop("mute")
        (after,) = await scene.run(call("sleep 1"), within_s=30)
        assert after.status is COMPLETE


async def test_a_child_that_had_its_share_of_tasks_did_not_fail(autojump_clock: MockClock) -> None:
    async with open_scene(capacity=2, max_tasks=1) as scene:
        await scene.run(*(call(f"sleep 2 {number}") for number in range(10)), within_s=15)
        assert scene.slot.health == "warm"
