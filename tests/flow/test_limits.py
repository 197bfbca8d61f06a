"""Limits over whole brokers in virtual time: workers of every protocol together, over ends of all kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import Status
from taskd.daemon.limiting import LimitReport
from taskd.dispatch.push import PushDispatch, PushSettings
from taskd.inflight.base import Policy
from taskd.inflight.limits import LimitKind, LimitRule
from taskd.inflight.rates import Rate
from taskd.telemetry import metrics
from taskd.wire import frames, frames_codec
from taskd.wire.envelope import scan
from taskd.wire.generated.sentry_protos.taskbroker.v1 import PushTaskRequest, TaskActivationStatus
from taskd.wire.pushing import PUSH_TASK

Broker = Any  # tests/flow/conftest.py, which importlib mode does not import by name
Clock = Any  # pytest-trio takes the clock among the test's own arguments only

SLOW = LimitRule(LimitKind.TASK, "ns:slow", namespace="ns", taskname="slow", concurrency=3)


class Running:
    """What runs, and what ran: every worker of a test tells it."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.began: list[tuple[float, str]] = []
        self._origin = trio.current_time()

    def begin(self, taskname: str) -> None:
        self.began.append((round(trio.current_time() - self._origin, 3), taskname))
        self.now[taskname] += 1
        self.most[taskname] = max(self.most[taskname], self.now[taskname])

    def end(self, taskname: str) -> None:
        self.now[taskname] -= 1

    def count(self, taskname: str) -> int:
        return sum(name == taskname for _, name in self.began)


class StreamWorker:
    """Speaks the stream; runs each task for so long."""

    def __init__(self, broker: Broker, running: Running, run_s: Callable[[str], float]) -> None:
        self._broker, self._running, self._run_s = broker, running, run_s
        self._to_worker, self._inbox = trio.open_memory_channel[bytes](1_000)
        self._outbox, self._from_worker = trio.open_memory_channel[bytes](1_000)
        self._total = 0

    async def receive(self) -> bytes | None:
        return await self._from_worker.receive()

    async def send(self, body: bytes) -> None:
        await self._to_worker.send(body)

    async def run(self, worker_id: str, slots: int, pool: str = "default") -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._broker.stream.work, self)
            await self._say(frames.Hello(worker_id, pool))
            await self._offer(slots)
            while True:
                with trio.move_on_after(10):
                    frame = frames_codec.decode_broker_frame(await self._inbox.receive())
                    if isinstance(frame, frames.Assignments):
                        for item in frame.assignments:
                            nursery.start_soon(self._work, item)
                    continue
                await self._say(frames.Heartbeat())

    async def _work(self, item: frames.Assignment) -> None:
        taskname = scan(item.activation).taskname
        self._running.begin(taskname)
        try:
            await trio.sleep(self._run_s(taskname))
        finally:
            self._running.end(taskname)
        await self._say(frames.Results((frames.Result(*item.lease, frames.ResultStatus.COMPLETE),)))
        await self._offer(1)

    async def _offer(self, more: int) -> None:
        self._total += more
        await self._say(frames.Credit(self._total, self._total, self._total))

    async def _say(self, frame: frames.WorkerFrame) -> None:
        await self._outbox.send(frames_codec.encode_worker_frame(frame))


async def unary_worker(broker: Broker, running: Running, run_s: float) -> None:
    """Fetches one after the other, as existing workers do."""
    while True:
        try:
            task = await broker.get_task()
        except Exception:
            await trio.sleep(0.5)
            continue
        running.begin(task.taskname)
        await trio.sleep(run_s)
        running.end(task.taskname)
        await broker.set_status(task.id)


@asynccontextmanager
async def opened(open_broker: Any, folder: Path, *rules: LimitRule, **policy: Any) -> AsyncIterator[Broker]:
    async with open_broker(folder, policy=Policy(limits=rules, **policy)) as broker:
        yield broker


async def produce(broker: Broker, taskname: str, count: int, **fields: Any) -> None:
    await broker.produce(
        *(broker.activation(f"{taskname}-{n}", taskname=taskname, **fields) for n in range(count))
    )


async def test_several_workers_of_both_kinds_share_a_limit_and_others_do_not_wait(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    async with opened(open_broker, tmp_path, SLOW) as broker, trio.open_nursery() as nursery:
        running = Running()
        for number in range(2):
            worker = StreamWorker(broker, running, lambda name: 5.0 if name == "slow" else 0.1)
            nursery.start_soon(worker.run, f"w{number}", 8)
        nursery.start_soon(unary_worker, broker, running, 5.0)
        await produce(broker, "slow", 30, processing_deadline_duration=100)
        await produce(broker, "quick", 30)
        await trio.sleep(4)
        assert running.count("quick") == 30
        assert running.now["slow"] <= 3
        await trio.sleep(60)
        assert running.count("slow") == 30  # ten rounds of five seconds: no end of a lease went unnoticed
        assert running.most["slow"] == 3
        nursery.cancel_scope.cancel()


async def test_a_worker_that_is_gone_gives_its_room_back(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    async with opened(open_broker, tmp_path, SLOW) as broker, trio.open_nursery() as nursery:
        running = Running()
        await produce(broker, "slow", 6, processing_deadline_duration=1_000)
        with trio.move_on_after(5):
            await StreamWorker(broker, running, lambda name: 100.0).run("dies", 10)
        assert running.count("slow") == 3
        nursery.start_soon(StreamWorker(broker, running, lambda name: 1.0).run, "lives", 10)
        await trio.sleep(20)
        assert running.count("slow") == 3  # the dead worker's leases are alive for 30 s
        await trio.sleep(30)
        assert running.count("slow") == 9
        assert running.most["slow"] == 3
        nursery.cancel_scope.cancel()


async def test_push_obeys_the_limit(autojump_clock: Clock, open_broker: Any, tmp_path: Path) -> None:
    running = Running()

    class Worker:
        async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
            assert path == PUSH_TASK
            task = PushTaskRequest.parse(body).task
            assert task is not None
            nursery.start_soon(work, task.id, task.taskname)
            return b""

    @asynccontextmanager
    async def connect(url: str) -> AsyncIterator[Worker]:
        yield Worker()

    async def work(id_: str, taskname: str) -> None:
        running.begin(taskname)
        await trio.sleep(5)
        running.end(taskname)
        await broker.set_status(id_)

    async with opened(open_broker, tmp_path, SLOW) as broker, trio.open_nursery() as nursery:
        settings = PushSettings(30.0, 16)
        push = PushDispatch(broker.inflight, connect, broker.draining, {"": "http://w:1"}, settings)
        nursery.start_soon(push.run)
        await produce(broker, "slow", 12, processing_deadline_duration=100)
        await trio.sleep(25)
        assert running.count("slow") == 12
        assert running.most["slow"] == 3
        nursery.cancel_scope.cancel()


async def test_a_rate_is_kept_over_a_minute_and_nobody_polls_for_it(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    rules = (
        LimitRule(LimitKind.TASK, "ns:fast", namespace="ns", taskname="fast", rate=Rate(10, 1_000)),
        LimitRule(LimitKind.TASK, "ns:mail", namespace="ns", taskname="mail", rate=Rate(30, 60_000)),
    )
    async with opened(open_broker, tmp_path, *rules) as broker, trio.open_nursery() as nursery:
        running = Running()
        for number in range(2):
            nursery.start_soon(StreamWorker(broker, running, lambda name: 0.01).run, f"w{number}", 5)
        await produce(broker, "mail", 50)
        for second in range(60):
            await broker.produce(
                *(broker.activation(f"fast-{second}-{n}", taskname="fast") for n in range(20 * (second < 31)))
            )
            await trio.sleep(1)
        times = [at for at, name in running.began if name == "mail"]
        assert times == pytest.approx([2.0 * n for n in range(1, len(times) + 1)], abs=0.05)
        assert len(times) in (29, 30)
        fast = [at for at, name in running.began if name == "fast"]
        assert 9.5 * 60 <= len(fast) <= 10 * 60
        for start in range(58):
            assert sum(start <= at < start + 1 for at in fast) <= 20  # a second's worth, and a burst
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("strict", [frozenset(), frozenset({"ns"})])
async def test_whoever_waits_for_a_token_is_woken_when_it_comes(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path, strict: frozenset[str]
) -> None:
    rate = LimitRule(LimitKind.TASK, "ns:mail", namespace="ns", taskname="mail", rate=Rate(30, 60_000))
    async with (
        opened(open_broker, tmp_path, rate, strict_order_namespaces=strict) as broker,
        trio.open_nursery() as nursery,
    ):
        running = Running()
        nursery.start_soon(StreamWorker(broker, running, lambda name: 0.01).run, "w", 5)
        await produce(broker, "mail", 3)
        await trio.sleep(60)
        assert [at for at, _ in running.began] == pytest.approx([2, 4, 6], abs=0.05)
        nursery.cancel_scope.cancel()


async def test_a_limit_that_is_changed_while_running_holds_at_once(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    async with opened(open_broker, tmp_path) as broker, trio.open_nursery() as nursery:
        running = Running()
        nursery.start_soon(StreamWorker(broker, running, lambda name: 5.0).run, "w", 10)
        await produce(broker, "slow", 200, processing_deadline_duration=100)
        await trio.sleep(2)
        assert running.now["slow"] == 10
        broker.inflight.set_policy(Policy(limits=(SLOW,)))
        await trio.sleep(5)
        assert running.now["slow"] == 3
        broker.inflight.set_policy(Policy())
        await trio.sleep(0.1)
        assert running.now["slow"] == 10
        nursery.cancel_scope.cancel()


async def test_in_strict_order_a_retry_goes_behind_also_under_limits(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    rate = LimitRule(LimitKind.TASK, "ns:book", namespace="ns", taskname="book", rate=Rate(1, 1_000))
    of_all = LimitRule(LimitKind.NAMESPACE, "ns", namespace="ns", concurrency=1)
    strict = frozenset({"ns"})
    async with opened(open_broker, tmp_path, rate, of_all, strict_order_namespaces=strict) as broker:
        await broker.produce(
            broker.activation("a", taskname="book"),
            broker.activation("b"),
            broker.activation("c", taskname="book"),
        )
        done = []
        while len(done) < 4:
            await trio.sleep(1)
            if not broker.inflight.claimable(None, ()):
                continue
            task = await broker.get_task()
            assert broker.inflight.counts()[Status.PROCESSING] == 1
            done.append(task.id)
            with pytest.raises(Exception, match="No pending"):
                await broker.get_task()
            is_first = task.id == "a"
            await broker.set_status(
                task.id, TaskActivationStatus.RETRY if is_first else TaskActivationStatus.COMPLETE
            )
            await broker.settle()
        assert done == ["a", "b", "c", retry_id("a", 1)]


async def test_a_limit_that_holds_back_is_shown_and_logged_once(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    pool = LimitRule(LimitKind.POOL, "small", concurrency=2)
    async with opened(open_broker, tmp_path, SLOW, pool) as broker, trio.open_nursery() as nursery:
        running = Running()
        nursery.start_soon(StreamWorker(broker, running, lambda name: 30.0).run, "w", 10)
        nursery.start_soon(StreamWorker(broker, running, lambda name: 30.0).run, "s", 10, "small")
        report = LimitReport()
        report.tell(await broker.inflight.limit_states())
        await produce(broker, "slow", 10, processing_deadline_duration=100)
        await produce(broker, "quick", 20, processing_deadline_duration=100)
        await trio.sleep(2)
        with capture_logs() as logs:
            for _ in range(3):
                report.tell(await broker.inflight.limit_states())
        assert [line["limit"] for line in logs] == ["task ns:slow"]
        page = metrics.render().decode()
        assert 'taskd_limit_live{kind="task",name="ns:slow"} 3.0' in page
        assert 'taskd_limit_concurrency{kind="task",name="ns:slow"} 3.0' in page
        assert 'taskd_limit_waiting{kind="task",name="ns:slow"} 7.0' in page
        assert 'taskd_limit_live{kind="pool",name="small"} 2.0' in page
        report.tell([])
        assert "ns:slow" not in metrics.render().decode()
        nursery.cancel_scope.cancel()
