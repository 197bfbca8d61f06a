"""Workers tell which tasks they know: what nobody knows is parked, and comes back when somebody does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from taskd.activation.lifecycle import Status
from taskd.daemon.pushing import parking_duty
from taskd.dispatch.roster import Roster
from taskd.wire import frames, frames_codec
from taskd.wire.frames import TaskName

Broker = Any
Clock = Any  # pytest-trio takes the clock among the test's own arguments only

KNOWN = TaskName("", "ns", "task")
OTHER = TaskName("", "ns", "other")


class Worker:
    """A worker with room for everything; `ids`: what it was assigned."""

    def __init__(self) -> None:
        self._to_broker, self._from_worker = trio.open_memory_channel[bytes](100)
        self.ids: list[str] = []
        self.heard: list[frames.BrokerFrame] = []

    async def say(self, frame: frames.WorkerFrame) -> None:
        await self._to_broker.send(frames_codec.encode_worker_frame(frame))

    # the stream's face

    async def receive(self) -> bytes | None:
        return await self._from_worker.receive()

    async def send(self, body: bytes) -> None:
        frame = frames_codec.decode_broker_frame(body)
        self.heard.append(frame)
        if isinstance(frame, frames.Assignments):
            self.ids += [item.id for item in frame.assignments]


@asynccontextmanager
async def connected(broker: Broker, *tasks: TaskName, id_: str = "w1", **hello: Any) -> AsyncIterator[Worker]:
    worker = Worker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.stream.work, worker)
        await worker.say(frames.Hello(id_, "default", tasks=tasks, **hello))
        await worker.say(frames.Credit(1, 1_000, 1_000))
        await broker.settle()
        yield worker
        nursery.cancel_scope.cancel()


async def produce(broker: Broker, *ids: str, **fields: Any) -> None:
    await broker.produce(*(broker.activation(id_, **fields) for id_ in ids))
    await broker.settle()


async def status(broker: Broker, id_: str) -> Status | None:
    (found,) = await broker.inflight.describe([id_])
    assert found.status is None or isinstance(found.status, Status)
    return found.status


async def test_what_nobody_knows_is_parked_and_blocks_nothing(autojump_clock: Clock, broker: Broker) -> None:
    with capture_logs() as lines:
        async with connected(broker, KNOWN) as worker:
            await produce(broker, "x", "y", taskname="other")
            await produce(broker, "a")
            assert worker.ids == ["a"]
            assert await status(broker, "x") is Status.PARKED
            (found,) = await broker.inflight.describe(["x"])
            assert found.reason == "unknown_task"
        await trio.sleep(5)
        assert await status(broker, "x") is Status.PARKED
        async with connected(broker, KNOWN, OTHER, id_="w2") as worker:
            await trio.sleep(2)
            assert worker.ids == ["x", "y"]
    (warning,) = [line for line in lines if "no connected worker knows" in line["event"]]
    assert (warning["namespace"], warning["taskname"]) == ("ns", "other")
    assert [line for line in lines if line["event"] == "task is known again"]


async def test_what_another_worker_knows_waits_for_that_one(autojump_clock: Clock, broker: Broker) -> None:
    async with connected(broker, OTHER, id_="busy") as busy:
        await busy.say(frames.Credit(2, 0, 0))
        async with connected(broker, KNOWN, id_="free") as free:
            await produce(broker, "x", taskname="other")
            await produce(broker, "a", "b")
            assert free.ids == ["a", "b"]
            assert await status(broker, "x") is Status.PENDING
            await busy.say(frames.Credit(3, 10, 10))
            await broker.settle()
            assert busy.ids == ["x"]


async def test_callers_that_name_no_tasks_may_know_any(autojump_clock: Clock, broker: Broker) -> None:
    async with connected(broker, KNOWN):
        await produce(broker, "x", "y", taskname="other")
        assert await status(broker, "x") is Status.PARKED
        with pytest.raises(Exception, match="No pending"):
            await broker.get_task(application="")
        await trio.sleep(1.1)
        assert (await broker.get_task(application="")).id == "x"
        await trio.sleep(61)  # nobody asked any more
        await produce(broker, "z", taskname="other")
        assert await status(broker, "z") is Status.PARKED


async def test_a_worker_that_names_no_tasks_gets_everything(autojump_clock: Clock, broker: Broker) -> None:
    async with connected(broker, KNOWN, id_="names"), connected(broker, id_="silent") as silent:
        await produce(broker, "x", taskname="other")
        assert silent.ids == ["x"]


async def test_by_policy_it_is_handed_out_all_the_same(autojump_clock: Clock, broker: Broker) -> None:
    broker.stream.parks_unknown = False
    async with connected(broker, KNOWN) as worker:
        await produce(broker, "x", taskname="other")
        assert worker.ids == ["x"]


async def test_taskds_own_tasks_belong_to_every_application(autojump_clock: Clock, broker: Broker) -> None:
    async with connected(broker, TaskName("", "internal", "canary_task")) as worker:
        await produce(broker, "x", application="shop", namespace="internal", taskname="canary_task")
        assert worker.ids == ["x"]


async def test_a_strict_order_lane_is_held_up_instead(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    from taskd.inflight.base import Policy

    policy = Policy(strict_order_namespaces=frozenset({"ns"}))
    async with open_broker(tmp_path, policy=policy) as broker, connected(broker, KNOWN) as worker:
        await produce(broker, "x", taskname="other")
        await produce(broker, "a")
        assert worker.ids == []
        assert broker.inflight.counts()[Status.PENDING] == 2


async def test_what_was_parked_comes_back_after_a_restart(
    autojump_clock: Clock, open_broker: Any, tmp_path: Path
) -> None:
    async with open_broker(tmp_path) as broker, connected(broker, KNOWN):
        await produce(broker, "x", taskname="other")
    async with open_broker(tmp_path) as broker:
        assert await status(broker, "x") is Status.PARKED
        async with connected(broker, OTHER) as worker:
            await trio.sleep(2)
            assert worker.ids == ["x"]


async def test_what_was_parked_comes_back_when_nothing_is_parked_any_more(
    autojump_clock: Clock, broker: Broker
) -> None:
    async with connected(broker, KNOWN):
        await produce(broker, "x", taskname="other")
    duty = parking_duty(
        broker.inflight, None, Roster(broker.clock), limit=9, every_s=lambda: 1.0, parks_unknown=False
    )
    assert await duty.round() == 1
    assert await status(broker, "x") is Status.PENDING


async def test_a_long_queue_of_what_others_know_is_passed_over_in_steps(
    autojump_clock: Clock, broker: Broker
) -> None:
    async with connected(broker, OTHER, id_="busy") as busy:
        await busy.say(frames.Credit(2, 0, 0))
        await produce(broker, *(f"x{n}" for n in range(1_500)), taskname="other")
        await produce(broker, "a")
        async with connected(broker, KNOWN, id_="free") as free:
            assert free.ids == ["a"]
            await produce(broker, "b")
            assert free.ids == ["a", "b"]


async def test_at_most_once_goes_to_idle_slots_only(autojump_clock: Clock, broker: Broker) -> None:
    async with connected(broker, KNOWN) as worker:
        await worker.say(frames.Credit(2, 10, 1))
        await broker.settle()
        policy = {"retry_state": broker.at_most_once_policy()}
        await broker.produce(
            broker.activation("once-1", **policy),
            broker.activation("once-2", **policy),
            broker.activation("other-lane", namespace="mail"),
            broker.activation("behind"),
        )
        await broker.settle()
        assert worker.ids == ["once-1"]  # and what is behind waits with it, or its turn might never come
        await worker.say(frames.Credit(3, 10, 2))
        await broker.settle()
        assert worker.ids == ["once-1", "once-2", "behind"]
        assert await status(broker, "other-lane") is Status.PARKED  # its lane is not known here


async def test_what_may_go_to_idle_slots_only_is_not_looked_for_over_and_over(
    autojump_clock: Clock, broker: Broker
) -> None:
    async with connected(broker, OTHER, id_="busy") as busy:
        await busy.say(frames.Credit(2, 0, 0))
        await produce(broker, "x", taskname="other")
        await produce(broker, "once", retry_state=broker.at_most_once_policy())
        await produce(broker, *(f"y{n}" for n in range(1_500)), taskname="other")
        async with connected(broker, KNOWN, id_="free") as free:
            assert free.ids == ["once"]
            await free.say(frames.Credit(2, 10, 1))  # no more slots are idle
            await broker.settle()
            with trio.fail_after(60):
                await broker.inflight.hand_back([free.heard[1].assignments[0].lease])  # type: ignore[union-attr]
                await broker.settle()
                assert free.ids == ["once"]
                await free.say(frames.Credit(3, 10, 2))
                await broker.settle()
            assert free.ids == ["once", "once"]


async def test_a_recall_is_answered(autojump_clock: Clock, broker: Broker) -> None:
    async with connected(broker, KNOWN) as worker:
        await worker.say(frames.Credit(2, 3, 3))
        await broker.settle()
        assert worker.heard[-1] == frames.Assignments((), 2)
        await produce(broker, *"abcdef")
        assert worker.ids == ["a", "b", "c"]


async def test_a_worker_that_comes_back_is_told_what_it_lost(autojump_clock: Clock, broker: Broker) -> None:
    await produce(broker, "gone", "handed-on", "kept")
    async with connected(broker) as worker:
        held = tuple(item.lease for item in worker.heard[1].assignments)  # type: ignore[union-attr]
        await worker.say(frames.Started(held))
        await broker.settle()
    await broker.inflight.reconcile("w1", [ref for ref in held if ref.id == "kept"])
    await broker.set_status((await broker.get_task()).id)
    await broker.get_task()
    hello = {"store_id": broker.inflight.store_id, "holding": held}
    async with connected(broker, **hello) as worker:
        (stop,) = [frame for frame in worker.heard if isinstance(frame, frames.Stop)]
        assert stop == frames.Stop(held[:2], frames.StopReason.LOST)
