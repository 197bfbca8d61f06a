"""A pool in virtual time: scripted brokers on in-memory streams, scripted children."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import taskd.worker.entry_pipe as pipe
from taskd.config.schema import PoolSection
from taskd.errors import PeerUnavailable, StartupError
from taskd.wire import frames, frames_codec
from taskd.wire.frames import Assignment, LeaseRef, Result, ResultStatus
from taskd.worker import results, slot
from taskd.worker.child import Child, ChildGone, Piece
from taskd.worker.output import nobody
from taskd.worker.pool import SPARES_AFTER_S, Pool, run_pool

COMPLETE = pipe.COMPLETE
CANCELLED = pipe.Verdict(int(ResultStatus.FAILURE), "error")
UNSEEN_S = 0.05
RETRY_ON_TIMEOUT = pipe.Verdict(int(ResultStatus.RETRY), "timeout", "", 4, 7)


# ---- children: an activation is what its task does, as text: "SECONDS [end]"


class ScriptedChild:
    """Runs b"1.5" in 1.5 seconds, crashes for b"1.5 crash", speaks nonsense for b"0 junk".

    An exception ends its task at the deadline, or ordered; not b"9 swallows", which SIGTERM ends, nor
    b"9 stubborn", which only SIGKILL does. Who begins b"9 unseen" is seen later.
    """

    ready = pipe.Ready((pipe.KnownTask("app", "tests", "any"),))

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.rss_bytes = 0
        self.whose = nobody
        self.killed = False
        self.stubborn, self.listens = False, True
        self.started: list[bytes] = []
        self._tokens: list[tuple[int, Piece, float | None]] = []
        self.orders: list[pipe.Order] = []
        self.terminated: list[int] = []
        self._task = trio.CancelScope()  # of the running task
        self._number = 0
        self._count = 0
        self._arrived = trio.Event()
        self._dismissed = False
        self._out, self._in = trio.open_memory_channel[pipe.Report](1_000)

    def give(self, work: Sequence[Piece]) -> bool:
        for piece in work:
            self._count += 1
            within_s = piece.start_within_s
            deadline = None if within_s is None else trio.current_time() + within_s
            self._tokens.append((self._count, piece, deadline))
        self._arrived.set()
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
                break
        for report in reports:
            if isinstance(report, pipe.Ready):
                raise pipe.ProtocolViolation("junk")
        return reports

    def take_back(self) -> int:
        taken = len(self._tokens)
        self._tokens.clear()
        return taken

    def dismiss(self, *, alone: bool = False) -> None:
        self._dismissed = True
        self._arrived.set()

    def look(self) -> None:
        pass

    def has_started(self) -> bool:
        return False

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        self.orders.append(pipe.Order(kind, number))
        if number == self._number and self.listens:
            self._task.cancel()

    def terminate(self, number: int) -> None:
        self.terminated.append(number)
        if number == self._number and not self.stubborn:
            self.kill()

    def kill(self) -> None:
        self.killed = True
        self._task.cancel()
        self._out.close()

    async def run(self) -> None:
        while not self.killed:
            if self._tokens:
                await self._run(*self._tokens.pop(0))
            elif self._dismissed:
                break
            else:
                self._arrived = trio.Event()
                await self._arrived.wait()
        self._out.close()

    async def _run(self, number: int, piece: Piece, deadline: float | None) -> None:
        seconds, _, how = piece.activation.decode().partition(" ")
        if deadline is not None and trio.current_time() >= deadline:
            return self._tell(pipe.Expired(number))
        if how == "hangs":
            await trio.sleep_forever()
        if how == "decodes":
            await trio.sleep(1)
        self.started.append(piece.activation)
        unseen_s = 0.0
        if "unseen" in how:
            unseen_s = UNSEEN_S
            await trio.sleep(unseen_s)
        self._tell(pipe.Started(number, RETRY_ON_TIMEOUT, ago_s=unseen_s))
        if "beats" in how:
            await trio.sleep(3.05 if "late" in how else 2)
            self._tell(pipe.Heartbeat(number, 0.5, "half"))
        self.stubborn, self._number = "stubborn" in how, number
        self.listens = not self.stubborn and "swallows" not in how
        limit_s = piece.deadline_s - unseen_s if self.listens else float("inf")
        with trio.CancelScope(deadline=trio.current_time() + limit_s) as self._task:
            await trio.sleep(float(seconds))
        self._number = 0
        if self._task.cancelled_caught:
            verdict = RETRY_ON_TIMEOUT if trio.current_time() >= self._task.deadline else CANCELLED
            return self._tell(pipe.Done(number, verdict, int(float(seconds) * 1e6)))
        if how == "grows":
            self.rss_bytes = 200 * 2**20
        if how == "crash":
            self.killed = True
        elif how == "late":
            begun = self._tokens.pop(0)  # the child is at its next piece before its report is read
            await trio.sleep(0.02)
            self._tell(pipe.Done(number, COMPLETE, 1))
            await self._run(*begun)
        elif how == "junk":
            self._tell(pipe.Ready(()))
        else:
            self._tell(pipe.Done(number, COMPLETE, int(float(seconds) * 1e6)))
        return None

    def _tell(self, report: pipe.Report) -> None:
        if not self.killed:
            self._out.send_nowait(report)


@dataclass
class ScriptedSpawner:
    failures: int = 0
    start_s: float = 0.0
    rss_bytes: int = 0
    children: list[ScriptedChild] = field(default_factory=list)
    open_count: int = 0
    attempts: int = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Child]:
        self.attempts += 1
        if self.failures:
            self.failures -= 1
            raise StartupError("no such interpreter")
        await trio.sleep(self.start_s)
        child = ScriptedChild(1000 + len(self.children))
        child.rss_bytes = self.rss_bytes
        self.children.append(child)
        self.open_count += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            try:
                yield child
            finally:
                self.open_count -= 1
                child.kill()
                nursery.cancel_scope.cancel()

    @property
    def started(self) -> list[bytes]:
        return [activation for child in self.children for activation in child.started]


# ---- brokers


class Connection:
    """The broker's end of one stream; `ended` once either side gave it up."""

    def __init__(self) -> None:
        self.to_worker, self.at_worker = trio.open_memory_channel[bytes](1_000)
        self.frames: list[frames.WorkerFrame] = []
        self.ended = False
        self.finished = False
        self._news = trio.Event()

    # the worker's face

    async def send(self, body: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.ended:
            raise PeerUnavailable
        self.frames.append(frames_codec.decode_worker_frame(body))
        self._news.set()

    async def receive(self) -> bytes | None:
        try:
            return await self.at_worker.receive()
        except trio.EndOfChannel:
            if self.finished:
                return None
            raise PeerUnavailable from None

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        self.finished = True
        self._news.set()
        self.to_worker.close()

    # the test's face

    def tell(self, *said: frames.BrokerFrame) -> None:
        for frame in said:
            self.to_worker.send_nowait(frames_codec.encode_broker_frame(frame))

    def cut(self) -> None:
        self.ended = True
        self.to_worker.close()

    async def until(self, condition: Callable[[], bool], within_s: float = 600) -> None:
        with trio.fail_after(within_s):
            while not condition():
                self._news = trio.Event()
                await self._news.wait()

    def said(self, kind: type[frames.WorkerFrame]) -> list[frames.WorkerFrame]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    @property
    def hello(self) -> frames.Hello:
        assert isinstance(self.frames[0], frames.Hello)
        return self.frames[0]

    @property
    def credit(self) -> int:
        """The total it may use now."""
        return next((f.total for f in reversed(self.frames) if isinstance(f, frames.Credit)), 0)

    @property
    def results(self) -> list[Result]:
        return [result for f in self.frames if isinstance(f, frames.Results) for result in f.results]

    @property
    def started(self) -> list[LeaseRef]:
        return [lease for f in self.frames if isinstance(f, frames.Started) for lease in f.leases]

    @property
    def back(self) -> list[LeaseRef]:
        return [lease for f in self.frames if isinstance(f, frames.HandBack) for lease in f.leases]

    def take_all(self) -> None:
        self.tell(frames.Taken(tuple(result.lease for result in self.results)))


class Network:
    """Addresses, and who connects to them."""

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self.attempts = 0
        self._calls: dict[
            str, tuple[trio.MemorySendChannel[Connection], trio.MemoryReceiveChannel[Connection]]
        ]
        self._calls = {}

    def _at(
        self, address: str
    ) -> tuple[trio.MemorySendChannel[Connection], trio.MemoryReceiveChannel[Connection]]:
        return self._calls.setdefault(address, trio.open_memory_channel[Connection](100))

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[Connection]:
        self.attempts += 1
        if address in self.refuses:
            raise PeerUnavailable
        connection = Connection()
        await self._at(address)[0].send(connection)
        try:
            yield connection
        finally:
            connection.ended = True

    async def accept(
        self, store_id: str = "store", address: str = "b:1", lease_ms: int = 30_000
    ) -> Connection:
        with trio.fail_after(600):
            connection = await self._at(address)[1].receive()
        await connection.until(lambda: bool(connection.frames))
        connection.tell(frames.Welcome(1, store_id, lease_ms))
        return connection


def work(
    *ids: str, task: str = "1", deadline_s: float = 10, expires_in_ms: int | None = None
) -> frames.Assignments:
    return frames.Assignments(
        tuple(Assignment(id_, 1, task.encode(), int(deadline_s * 1000), expires_in_ms) for id_ in ids)
    )


@dataclass
class Running:
    network: Network
    spawner: ScriptedSpawner
    stop: trio.Event
    ended: trio.Event
    pool: Pool


@asynccontextmanager
async def running(
    *,
    spawner: ScriptedSpawner | None = None,
    brokers: tuple[str, ...] = ("b:1",),
    slots: int = 2,
    max_tasks_per_child: int = 10_000,
    drain_grace_s: float | None = None,
    spare_children: int = 0,
    max_child_rss_mb: int | None = None,
) -> AsyncIterator[Running]:
    config = PoolSection(
        brokers=brokers,
        slots=slots,
        max_tasks_per_child=max_tasks_per_child,
        drain_grace_s=drain_grace_s,
        spare_children=spare_children,
        max_child_rss_mb=max_child_rss_mb,
    )
    spawner = spawner or ScriptedSpawner()
    network, stop, ended = Network(), trio.Event(), trio.Event()

    async def run(task_status: trio.TaskStatus[Pool]) -> None:
        await run_pool(
            config,
            "default",
            stop=stop,
            task_status=task_status,
            spawner=spawner,
            connect=network.connect,
            rng=random.Random(1),
        )
        ended.set()

    async with trio.open_nursery() as nursery:
        pool = await nursery.start(run)
        yield Running(network, spawner, stop, ended, pool)
        nursery.cancel_scope.cancel()
    assert spawner.open_count == 0


async def quicken(broker: Connection, count: int = 40) -> None:
    """Teach the pool that tasks are quick, so that it fetches ahead and feeds its children ahead."""
    for number in range(count):
        broker.tell(work(f"q{number}", task="0.0001"))
        await broker.until(lambda n=number: len(broker.results) == n + 1)  # type: ignore[misc]
        broker.take_all()


async def test_work_is_asked_for_by_free_slots_and_results_come_back(autojump_clock: MockClock) -> None:
    async with running() as it:
        broker = await it.network.accept()
        await broker.until(lambda: broker.credit == 2)
        assert broker.hello.pool == "default"
        assert (broker.hello.version_min, broker.hello.version_max) == (1, 1)
        assert broker.hello.worker_id
        assert broker.hello.store_id == ""
        broker.tell(work("a", "b"))
        await broker.until(lambda: len(broker.results) == 2)
        assert {result.status for result in broker.results} == {ResultStatus.COMPLETE}
        assert set(broker.started) == {LeaseRef("a", 1), LeaseRef("b", 1)}
        assert it.pool.statistics().untaken_results == 2
        broker.take_all()
        await broker.until(lambda: broker.credit == 4)
        await trio.testing.wait_all_tasks_blocked()
        assert it.pool.statistics().untaken_results == 0


async def test_quick_tasks_are_fetched_ahead_and_slow_ones_are_not(autojump_clock: MockClock) -> None:
    async with running() as it:
        broker = await it.network.accept()
        await quicken(broker)
        assert it.pool.statistics().prefetch == 1_000
        broker.tell(work("slow", task="8"))
        await broker.until(lambda: len(broker.results) == 41)
        assert it.pool.statistics().prefetch == 0


async def test_many_tasks_all_end_once(autojump_clock: MockClock) -> None:
    ids = [str(number) for number in range(600)]
    async with running() as it:
        broker = await it.network.accept()
        sent = 0
        while sent < len(ids):
            await broker.until(lambda: broker.credit > sent)  # noqa: B023  # awaited before it changes
            batch = ids[sent : broker.credit]
            broker.tell(work(*batch, task="0.001"))
            sent += len(batch)
        await broker.until(lambda: len(broker.results) == len(ids))
        assert sorted(result.id for result in broker.results) == sorted(ids)
        assert len(it.spawner.started) == len(ids)


async def test_what_waits_behind_slow_tasks_is_handed_back_unstarted(autojump_clock: MockClock) -> None:
    async with running() as it:
        broker = await it.network.accept()
        begin = trio.current_time()
        broker.tell(work("a", "b", "c", "d", task="9"))
        await broker.until(lambda: len(broker.back) == 2)
        assert set(broker.back) == {LeaseRef("c", 1), LeaseRef("d", 1)}
        assert 2 <= trio.current_time() - begin <= 3
        assert set(broker.started) == {LeaseRef("a", 1), LeaseRef("b", 1)}
        await broker.until(lambda: len(broker.results) == 2)
        assert it.spawner.started == [b"9", b"9"]


async def test_work_behind_a_slow_task_in_a_child_runs_elsewhere(
    autojump_clock: MockClock,
) -> None:
    async with running() as it:
        broker = await it.network.accept()
        await quicken(broker)
        begin = trio.current_time()
        slow = Assignment("slow", 1, b"9", 10_000)
        quick = [Assignment(f"r{number}", 1, b"0.0001", 10_000) for number in range(60)]
        broker.tell(frames.Assignments((slow, *quick)))
        await broker.until(lambda: len(broker.results) == 100)
        assert trio.current_time() - begin < 1
        assert not broker.back
        await broker.until(lambda: len(broker.results) == 101)


async def test_the_slot_with_least_to_do_gets_what_comes(autojump_clock: MockClock) -> None:
    """Children are fed ahead, so the first one would take it as well, and keep it behind what it runs."""
    async with running(slots=3) as it:
        broker = await it.network.accept()
        await quicken(broker)
        begin = trio.current_time()
        for name in ("a", "b", "c"):
            broker.tell(work(name, task="0.05"))
        await broker.until(lambda: len(broker.results) == 43)
        assert trio.current_time() - begin < 0.1, "all three ran at once"


@pytest.mark.parametrize(("count", "task"), [(40, "0.05"), (4, "1"), (6, "0.05")])
async def test_slots_share_evenly_what_comes_at_once(
    autojump_clock: MockClock, count: int, task: str
) -> None:
    """Also when the tasks before were so quick that one child would be given all of it."""
    async with running(slots=4) as it:
        broker = await it.network.accept()
        await quicken(broker, 60)
        begin = trio.current_time()
        broker.tell(work(*(f"s{number}" for number in range(count)), task=task))
        await broker.until(lambda: len(broker.results) == 60 + count)
        assert trio.current_time() - begin < float(task) * -(-count // 4) + 0.05


async def test_what_an_operator_stops_ends_unreported_wherever_it_is(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("runs", "waits", "other", task="5", deadline_s=60))
        await broker.until(lambda: LeaseRef("runs", 1) in broker.started)
        broker.tell(frames.Stop((LeaseRef("runs", 1), LeaseRef("waits", 1), LeaseRef("unknown", 1))))
        await broker.until(lambda: bool(broker.results))
        assert [result.id for result in broker.results] == ["other"]
        assert LeaseRef("waits", 1) not in broker.started
        assert broker.back == []
        (child,) = it.spawner.children
        assert child.orders == [pipe.Order(pipe.OrderKind.CANCEL, 1)]
        assert not child.terminated, "the exception ended it"
        broker.take_all()
        await trio.testing.wait_all_tasks_blocked()
        assert it.pool.statistics().crashes == 0
        assert it.pool.statistics().in_children == 0


async def test_an_order_does_not_hit_the_task_after_the_one_it_is_for(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        await quicken(broker)
        broker.tell(work("stopped", task="0.05 late"), work("next", task="0.05"), work("last", task="0.05"))
        await broker.until(lambda: LeaseRef("stopped", 1) in broker.started)
        await trio.sleep(0.06)
        broker.tell(frames.Stop((LeaseRef("stopped", 1),)))
        await broker.until(lambda: len(broker.results) == 42)
        assert [(result.id, result.status) for result in broker.results[40:]] == [
            ("next", ResultStatus.COMPLETE),
            ("last", ResultStatus.COMPLETE),
        ]
        (child,) = it.spawner.children
        assert not child.orders
        assert not child.terminated
        assert it.pool.statistics().crashes == 0


@pytest.mark.parametrize(
    ("task", "terminated", "killed", "ends_s"),
    [("50 swallows", [1], True, 4), ("50 stubborn", [1], True, 5), ("50", [], False, 3)],
)
async def test_a_task_at_its_deadline_is_ended_step_by_step(
    autojump_clock: MockClock, task: str, terminated: list[int], killed: bool, ends_s: float
) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task=task, deadline_s=3))
        await broker.until(lambda: bool(broker.started))
        begin = trio.current_time()
        await broker.until(lambda: bool(broker.results))
        assert trio.current_time() - begin == pytest.approx(ends_s, abs=0.01)
        (result,) = broker.results
        assert (result.status, result.reason) == (ResultStatus.RETRY, "timeout")
        child = it.spawner.children[0]
        assert (child.orders, child.terminated, child.killed) == ([], terminated, killed)
        assert it.pool.statistics().timeouts == 1
        assert it.pool.statistics().crashes == 0
        if killed:
            assert ("SIGKILL" if "stubborn" in task else "SIGTERM") in result.error


async def test_the_deadline_counts_from_the_start_and_not_from_when_it_was_seen(
    autojump_clock: MockClock,
) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        begin = trio.current_time()
        broker.tell(work("a", task="50 unseen stubborn", deadline_s=3))
        await broker.until(lambda: bool(broker.started))
        assert trio.current_time() - begin == pytest.approx(UNSEEN_S, abs=0.01)
        await broker.until(lambda: bool(broker.results))
        assert trio.current_time() - begin == pytest.approx(5, abs=0.01)
        assert (broker.results[0].reason, broker.results[0].delay_on_retry_s) == ("timeout", 7)


async def test_what_is_stopped_before_its_start_is_seen_is_ended_once_it_is(
    autojump_clock: MockClock,
) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="50 unseen", deadline_s=60))
        await trio.sleep(UNSEEN_S / 2)
        broker.tell(frames.Stop((LeaseRef("a", 1),)))
        await trio.sleep(UNSEEN_S)
        (child,) = it.spawner.children
        assert child.orders == [pipe.Order(pipe.OrderKind.CANCEL, 1)]
        assert it.pool.statistics().in_children == 0
        assert not broker.results
        assert it.pool.statistics().crashes == 0


@pytest.mark.parametrize(("task", "ends_s"), [("50 swallows", 1), ("50 stubborn", 2), ("50", 0)])
async def test_a_task_that_is_stopped_is_ended_step_by_step(
    autojump_clock: MockClock, task: str, ends_s: float
) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task=task, deadline_s=60))
        await broker.until(lambda: bool(broker.started))
        await trio.sleep(1)
        broker.tell(frames.Stop((LeaseRef("a", 1),)))
        await trio.sleep(max(ends_s - 0.01, 0))
        assert it.pool.statistics().in_children == 1
        await trio.sleep(0.02)
        assert it.pool.statistics().in_children == 0
        broker.tell(work("b", task="0"))
        await broker.until(lambda: bool(broker.results))
        assert [result.id for result in broker.results] == ["b"]
        assert it.spawner.children[0].orders == [pipe.Order(pipe.OrderKind.CANCEL, 1)]
        assert it.pool.statistics().crashes == 0


async def test_a_heartbeat_moves_the_deadline_of_its_task(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="50 beats stubborn", deadline_s=3))
        await broker.until(lambda: bool(broker.started))
        begin = trio.current_time()
        await broker.until(lambda: bool(broker.results))
        assert trio.current_time() - begin == pytest.approx(2 + 3 + 2, abs=0.01)
        beats = [frame.tasks for frame in broker.said(frames.Heartbeat) if frame.tasks]  # type: ignore[attr-defined]
        assert beats == [(frames.TaskProgress("a", 1, 500, "half"),)]


async def test_a_heartbeat_that_is_read_after_the_deadline_still_moves_it(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="2 late beats swallows", deadline_s=3))
        await broker.until(lambda: bool(broker.results))
        assert broker.results[0].status is ResultStatus.COMPLETE
        assert not it.spawner.children[0].terminated


async def test_a_child_that_is_large_from_the_start_is_used(autojump_clock: MockClock) -> None:
    spawner = ScriptedSpawner(rss_bytes=150 * 2**20)
    async with running(spawner=spawner, slots=1, max_child_rss_mb=100) as it:
        broker = await it.network.accept()
        for id_ in "abc":
            broker.tell(work(id_, task="0.1"))
        await broker.until(lambda: len(broker.results) == 3)
        assert len(spawner.children) == 1


async def test_what_is_stopped_inside_a_child_never_begins(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        for number in range(40):  # quick tasks, so that children are fed ahead
            broker.tell(work(f"q{number}", task="0.0001"))
            await broker.until(lambda n=number: len(broker.results) == n + 1)  # type: ignore[misc]
        broker.tell(work("runs", "ahead", task="0.05"))
        await broker.until(lambda: LeaseRef("runs", 1) in broker.started)
        broker.tell(frames.Stop((LeaseRef("ahead", 1),)))
        await broker.until(lambda: broker.results[-1].id == "runs")
        await trio.sleep(5)
        assert LeaseRef("ahead", 1) not in broker.started
        assert len(it.spawner.children) == 1


async def test_expired_before_start_is_handed_back(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a"), work("late", expires_in_ms=500), work("b"))
        await broker.until(lambda: len(broker.results) == 2)
        assert broker.back == [LeaseRef("late", 1)]
        assert [result.id for result in broker.results] == ["a", "b"]


async def test_deadline_kills_and_reports_what_the_task_s_policy_says(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="50 stubborn", deadline_s=3))
        await broker.until(lambda: bool(broker.results))
        (result,) = broker.results
        assert result.status is ResultStatus.RETRY
        assert (result.reason, result.max_attempts, result.delay_on_retry_s) == ("timeout", 4, 7)
        assert "3 s" in result.error
        assert it.spawner.children[0].killed
        broker.tell(work("b"))
        await broker.until(lambda: len(broker.results) == 2)
        assert it.pool.statistics().timeouts == 1


@pytest.mark.parametrize("how", ["crash", "junk"])
async def test_a_crash_or_junk_costs_one_child(autojump_clock: MockClock, how: str) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task=f"1 {how}"), work("b"))
        await broker.until(lambda: len(broker.results) == 2)
        assert [result.status for result in broker.results] == [ResultStatus.CRASHED, ResultStatus.COMPLETE]
        assert broker.started[0] == LeaseRef("a", 1)
        assert len(it.spawner.children) == 2


async def test_a_worker_that_was_frozen_hears_its_child_before_it_judges_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "BEGIN_WITHIN_S", 2.0)
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="0.1 decodes"))
        await trio.testing.wait_all_tasks_blocked()
        autojump_clock.jump(slot.BEGIN_WITHIN_S + slot.LAST_WORD_S + 1)  # meanwhile its child began it
        await broker.until(lambda: bool(broker.results))
        assert [result.status for result in broker.results] == [ResultStatus.COMPLETE]


async def test_a_child_that_hangs_before_start_is_replaced(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="1 hangs"))
        await broker.until(lambda: bool(broker.results))
        assert broker.results[0].status is ResultStatus.CRASHED
        assert broker.started == [LeaseRef("a", 1)], "the broker counts crashes by starts"


async def test_children_are_replaced_after_their_share_of_tasks(autojump_clock: MockClock) -> None:
    async with running(slots=1, max_tasks_per_child=2) as it:
        broker = await it.network.accept()
        broker.tell(work("a", "b", "c", task="0.1"))
        await broker.until(lambda: len(broker.results) == 3)
        assert [len(child.started) for child in it.spawner.children] == [2, 1]
        assert it.pool.statistics().crashes == 0


async def test_a_child_is_replaced_after_the_task_that_left_it_too_large(autojump_clock: MockClock) -> None:
    async with running(slots=1, max_child_rss_mb=100) as it:
        broker = await it.network.accept()
        broker.tell(work("small", task="0.1"), work("large", task="0.1 grows"), work("c", task="0.1"))
        await broker.until(lambda: len(broker.results) == 3)
        assert [result.status for result in broker.results] == [ResultStatus.COMPLETE] * 3
        assert [child.started for child in it.spawner.children] == [[b"0.1", b"0.1 grows"], [b"0.1"]]
        assert it.pool.statistics().crashes == 0


async def test_a_spare_takes_over_at_once_from_a_child_that_crashed(autojump_clock: MockClock) -> None:
    spawner = ScriptedSpawner(start_s=5)
    async with running(spawner=spawner, slots=1, spare_children=1) as it:
        broker = await it.network.accept()
        await trio.sleep(SPARES_AFTER_S + 6)
        begin = trio.current_time()
        broker.tell(work("a", task="0.1 crash"), work("b", task="0.1"))
        await broker.until(lambda: len(broker.results) == 2)
        assert trio.current_time() - begin == pytest.approx(0.2, abs=0.01)
        assert [child.started for child in spawner.children] == [[b"0.1 crash"], [b"0.1"]]


async def test_children_that_do_not_start_are_tried_again_slowly(autojump_clock: MockClock) -> None:
    spawner = ScriptedSpawner(failures=5)
    begin = trio.current_time()
    async with running(spawner=spawner, slots=1) as it:
        assert trio.current_time() - begin > 5
        assert it.pool.statistics().failed_starts == 5
        assert spawner.attempts == 6


async def test_stopping_does_not_wait_for_children_that_never_start(autojump_clock: MockClock) -> None:
    stop = trio.Event()
    spawner = ScriptedSpawner(failures=1_000_000)

    async def stop_soon() -> None:
        await trio.sleep(5)
        stop.set()

    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_soon)
            await run_pool(PoolSection(), "default", stop=stop, spawner=spawner, connect=Network().connect)


async def test_results_are_sent_again_until_taken(autojump_clock: MockClock) -> None:
    async with running() as it:
        first = await it.network.accept()
        first.tell(work("a", "b", task="1"), work("c", "d", task="0.1"))
        await trio.sleep(0.01)
        first.cut()  # all of it is still with the worker
        second = await it.network.accept()
        assert second.hello.store_id == "store"
        assert second.hello.worker_id == first.hello.worker_id
        assert {lease.id for lease in second.hello.holding} == {"a", "b", "c", "d"}
        await second.until(lambda: len(second.results) == 4)
        assert LeaseRef("a", 1) in second.started, "the first connection may have lost it"
        second.cut()
        third = await it.network.accept()
        await third.until(lambda: len(third.results) == 4)
        assert {lease.id for lease in third.hello.holding} == {"a", "b", "c", "d"}
        third.take_all()
        await trio.sleep(1)
        third.cut()
        fourth = await it.network.accept()
        await trio.sleep(1)
        assert fourth.hello.holding == ()
        assert not fourth.results
        assert len(it.spawner.started) == 4


async def test_another_store_at_the_address_gets_nothing_of_the_old_one(autojump_clock: MockClock) -> None:
    async with running() as it:
        first = await it.network.accept("old")
        first.tell(work("a", task="1"))
        await first.until(lambda: bool(first.started))
        first.cut()
        other = await it.network.accept("new")
        await trio.sleep(5)
        assert not other.results
        assert not other.started
        other.tell(work("z"))
        await other.until(lambda: bool(other.results))
        assert [result.id for result in other.results] == ["z"]
        other.cut()
        back = await it.network.accept("old")
        assert back.hello.store_id == "new"
        back = await it.network.accept("old")  # and this time it says what it has from there
        assert back.hello.store_id == "old"
        assert [lease.id for lease in back.hello.holding] == ["a"]
        await back.until(lambda: bool(back.results))
        assert [result.id for result in back.results] == ["a"]


async def test_work_whose_lease_ended_while_disconnected_is_not_started(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept(lease_ms=1_500)
        broker.tell(work("a", task="5"), work("b"))
        await broker.until(lambda: bool(broker.started))
        it.network.refuses.add("b:1")
        broker.cut()
        await trio.sleep(20)
        assert it.spawner.started == [b"5"]
        it.network.refuses.clear()
        again = await it.network.accept()
        assert [lease.id for lease in again.hello.holding] == ["a", "b"]
        await again.until(lambda: bool(again.results and again.back))
        assert [lease.id for lease in again.back] == ["b"]


async def test_an_unreachable_broker_costs_nothing_but_its_own_work(autojump_clock: MockClock) -> None:
    async with running(brokers=("b:1", "gone:1")) as it:
        it.network.refuses.add("gone:1")
        broker = await it.network.accept()
        for number in range(5):
            broker.tell(work(str(number)))
            await broker.until(lambda n=number: len(broker.results) == n + 1)  # type: ignore[misc]
        attempts = it.network.attempts
        await trio.sleep(100)
        assert it.network.attempts - attempts < 30, "reconnecting backs off"
        assert it.pool.statistics().connected_brokers == 1


async def test_two_brokers_share_the_slots(autojump_clock: MockClock) -> None:
    async with running(brokers=("b:1", "c:1"), slots=4) as it:
        one, two = await it.network.accept("s1", "b:1"), await it.network.accept("s2", "c:1")
        await trio.sleep(0.1)
        one.tell(work("a"))
        two.tell(work("b"))
        await one.until(lambda: bool(one.results))
        await two.until(lambda: bool(two.results))
        assert [result.id for result in one.results] == ["a"]
        assert [result.id for result in two.results] == ["b"]


async def test_leases_are_kept_alive_while_nothing_else_is_said(autojump_clock: MockClock) -> None:
    async with running() as it:
        broker = await it.network.accept(lease_ms=8_000)
        broker.tell(work("a", task="60", deadline_s=100))
        await trio.sleep(41)
        assert 19 <= len(broker.said(frames.Heartbeat)) <= 21


async def test_a_draining_broker_is_asked_for_nothing(autojump_clock: MockClock) -> None:
    async with running() as it:
        broker = await it.network.accept()
        await broker.until(lambda: broker.credit == 2)
        broker.tell(work("a"), frames.Draining())
        await broker.until(lambda: bool(broker.results))
        broker.take_all()
        await trio.sleep(1)
        assert broker.credit == 2


async def test_stop_hands_back_finishes_reports_and_leaves(autojump_clock: MockClock) -> None:
    async with running() as it:
        broker = await it.network.accept()
        broker.tell(work("a", "b", task="5"), work("c"))
        await broker.until(lambda: len(broker.started) == 2)
        begin = trio.current_time()
        it.stop.set()
        await broker.until(lambda: bool(broker.back))
        assert broker.back == [LeaseRef("c", 1)]
        broker.tell(work("crossed"))
        await broker.until(lambda: len(broker.back) == 2)
        await broker.until(lambda: len(broker.results) == 2)
        assert not it.ended.is_set(), "the results are not taken yet"
        broker.take_all()
        await it.ended.wait()
        assert broker.finished
        assert trio.current_time() - begin < 6
        assert {result.status for result in broker.results} == {ResultStatus.COMPLETE}


async def test_stop_waits_until_no_more_can_come(autojump_clock: MockClock) -> None:
    """What crosses the goodbye would wait for the end of its lease, though nobody has it."""
    async with running() as it:
        broker = await it.network.accept()
        await broker.until(lambda: broker.credit == 2)
        it.stop.set()
        await broker.until(lambda: broker.credit == 0)
        await trio.sleep(1)
        assert not it.ended.is_set(), "the recall is not seen yet"
        broker.tell(work("crossed"))
        await broker.until(lambda: broker.back == [LeaseRef("crossed", 1)])
        broker.tell(frames.Assignments((), broker.said(frames.Credit)[-1].number))  # type: ignore[union-attr]
        with trio.fail_after(1):
            await it.ended.wait()
        assert broker.finished


@pytest.mark.parametrize("how", ["", "swallows", "stubborn"])
async def test_stop_ends_what_outlives_the_grace_and_reports_it(autojump_clock: MockClock, how: str) -> None:
    async with running(slots=2, drain_grace_s=2) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task=f"9 {how}", deadline_s=60), work("b", task="1.5"))
        await broker.until(lambda: len(broker.started) == 2)
        begin = trio.current_time()
        it.stop.set()
        await broker.until(lambda: len(broker.results) == 2)
        assert 2 <= trio.current_time() - begin <= 5, "the grace, and what the ladder takes"
        by_id = {result.id: result for result in broker.results}
        assert by_id["b"].status is ResultStatus.COMPLETE
        assert (by_id["a"].status, by_id["a"].reason) == (ResultStatus.INTERRUPTED, "drained")
        assert "2 s" in by_id["a"].error
        broker.take_all()
        await it.ended.wait()
        assert broker.finished


async def test_what_ends_while_it_is_broken_off_counts_as_it_ended(autojump_clock: MockClock) -> None:
    async with running(slots=1, drain_grace_s=2) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="2.5 swallows", deadline_s=60))
        await broker.until(lambda: bool(broker.started))
        it.stop.set()
        await broker.until(lambda: bool(broker.results))
        assert broker.results[0].status is ResultStatus.COMPLETE
        broker.take_all()
        await it.ended.wait()


async def test_a_worker_that_was_frozen_for_longer_than_its_lease_starts_nothing_of_it(
    autojump_clock: MockClock,
) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept(lease_ms=400)
        broker.tell(work("a", task="1.5"), work("b"))
        await broker.until(lambda: bool(broker.started))
        broker.tell(work("c"))  # on the way when the worker freezes
        autojump_clock.jump(1)
        again = await it.network.accept(lease_ms=30_000)
        assert broker.ended, "whatever else came on that stream is as old"
        assert {lease.id for lease in again.hello.holding} == {"a", "b"}
        await again.until(lambda: bool(again.results and again.back))
        assert [lease.id for lease in again.back] == ["b"]
        assert [result.id for result in again.results] == ["a"], "the broker judges it by its fence"
        await trio.testing.wait_all_tasks_blocked()
        assert it.spawner.started == [b"1.5"]


async def test_a_lease_that_ended_with_the_connection_is_not_begun_after_the_next_welcome(
    autojump_clock: MockClock,
) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept(lease_ms=400)
        broker.tell(work("a", task="1.5"), work("b"))
        await broker.until(lambda: bool(broker.started))
        it.network.refuses.add("b:1")
        broker.cut()
        await trio.sleep(0.7)
        it.network.refuses.clear()
        again = await it.network.accept(lease_ms=30_000)
        await again.until(lambda: bool(again.results and again.back))
        await trio.testing.wait_all_tasks_blocked()
        assert it.spawner.started == [b"1.5"]


async def test_stop_gives_tasks_their_deadline_and_reports_the_timeout(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="500", deadline_s=20))
        await broker.until(lambda: bool(broker.started))
        it.stop.set()
        await broker.until(lambda: bool(broker.results))
        assert broker.results[0].reason == "timeout"
        broker.take_all()
        await it.ended.wait()


async def test_stop_ends_though_no_broker_takes_the_results(autojump_clock: MockClock) -> None:
    async with running() as it:
        broker = await it.network.accept()
        broker.tell(work("a"))
        await broker.until(lambda: bool(broker.results))
        it.network.refuses.add("b:1")
        broker.cut()
        it.stop.set()
        with trio.fail_after(30):
            await it.ended.wait()


async def test_a_broker_that_speaks_another_version_is_left_alone(autojump_clock: MockClock) -> None:
    async with running() as it:
        connection = await it.network._at("b:1")[1].receive()
        await connection.until(lambda: bool(connection.frames))
        connection.tell(frames.Welcome(9, "store", 30_000))
        await trio.sleep(0.05)
        assert connection.ended
        assert connection.credit == 0
        await it.network.accept()


async def test_a_pool_is_stuck_when_no_slot_ends_what_must_end(autojump_clock: MockClock) -> None:
    async with running(slots=2) as it:
        broker = await it.network.accept()
        for child in it.spawner.children:
            child.kill = lambda: None  # type: ignore[method-assign]  # as in a system call that does not end
        broker.tell(work("a", task="9000 stubborn"))
        await broker.until(lambda: len(broker.started) == 1)
        await trio.sleep(200)
        assert it.pool.stuck() == "", "the other slot works"
        broker.tell(work("b", task="9000 stubborn"))
        await broker.until(lambda: len(broker.started) == 2)
        await trio.sleep(60)
        assert it.pool.stuck() == "", "it has its deadline and its graces"
        await trio.sleep(20)
        assert "every slot is overdue" in it.pool.stuck()


async def test_what_a_child_prints_while_it_leaves_is_not_of_the_task_of_its_successor(
    autojump_clock: MockClock,
) -> None:
    async with running(slots=1, max_tasks_per_child=1, spare_children=1) as it:
        broker = await it.network.accept()
        broker.tell(work("a"))
        await broker.until(lambda: bool(broker.results))
        broker.tell(work("b", task="9"))
        await broker.until(lambda: len(broker.started) == 2)
        first, second = (child for child in it.spawner.children if child.started)
        assert [second.whose(number) for number in (0, 1)] == ["b", "b"]
        assert [first.whose(number) for number in (0, 1)] == [None, None]


async def test_a_broker_that_takes_no_results_keeps_no_work_of_others_away(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "MAX_UNTAKEN", 5)
    async with running(brokers=("deaf:1", "good:1"), slots=2) as it:
        deaf = await it.network.accept("one", "deaf:1")
        good = await it.network.accept("two", "good:1")
        for number in range(5):
            await deaf.until(lambda n=number: deaf.credit > n)  # type: ignore[misc]
            deaf.tell(work(f"d{number}"))
        await deaf.until(lambda: len(deaf.results) == 5)
        given = good.credit
        for number in range(given):
            good.tell(work(f"g{number}"))
        await good.until(lambda: good.credit > given)
        await trio.sleep(10)
        assert deaf.credit == 5, "it gets none"


async def test_an_idle_child_whose_work_was_taken_back_is_left_alone(autojump_clock: MockClock) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept()
        (child,) = it.spawner.children

        async def arrives_late(work: Sequence[Piece]) -> None:
            child.take_back = lambda: len(work)  # type: ignore[method-assign]
            broker.tell(frames.Stop((LeaseRef("a", 1),)))

        child.send = arrives_late  # type: ignore[method-assign]
        broker.tell(work("a"))
        await trio.sleep(60)
        assert it.pool.statistics().in_children == 0
        assert not child.killed


async def test_a_broker_that_comes_back_late_still_gets_the_results_of_a_worker_that_stops(
    autojump_clock: MockClock,
) -> None:
    async with running(slots=1) as it:
        broker = await it.network.accept(lease_ms=600_000)
        broker.tell(work("a"))
        await broker.until(lambda: bool(broker.started))
        it.network.refuses.add("b:1")
        broker.cut()
        await trio.sleep(100)
        attempts = it.network.attempts
        with trio.fail_after(60):
            while it.network.attempts == attempts:  # noqa: ASYNC110  # the next one is seconds away
                await trio.sleep(0.1)
        it.network.refuses.clear()
        it.stop.set()
        again = await it.network.accept()
        await again.until(lambda: bool(again.results), within_s=2)
        again.take_all()
        await it.ended.wait()


async def test_a_task_that_is_about_to_start_when_the_grace_is_over_is_reported_too(
    autojump_clock: MockClock,
) -> None:
    async with running(slots=1, drain_grace_s=0.5) as it:
        broker = await it.network.accept()
        broker.tell(work("a", task="9 decodes"))
        await trio.sleep(0.1)
        it.stop.set()
        await broker.until(lambda: bool(broker.results))
        broker.take_all()
        assert [(result.status, result.reason) for result in broker.results] == [
            (ResultStatus.INTERRUPTED, "drained")
        ]
        await it.ended.wait()
