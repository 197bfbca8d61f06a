"""`taskd cancel` on a whole broker, for each place where an activation can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import structlog.testing
import trio

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import Status
from taskd.admin.cancel import IDS_PER_WRITE, MAX_IDS, CancelOrders
from taskd.admin.operate import Operator
from taskd.errors import LogUnavailable, Refused
from taskd.inflight.base import ClaimRequest, Lease, LeaseKind, Ref, Report, ReportStatus, Verdict
from taskd.inflight.cancelling import Effect
from taskd.log.base import Outgoing, Position
from taskd.rpc.base import Unary
from taskd.telemetry import metrics
from taskd.wire import consumer, frames, frames_codec
from taskd.wire.envelope import MAX_ID_BYTES
from taskd.wire.generated.taskd import v1

BY = "by ann: no longer wanted"


class Scene:
    """A broker, an operator who cancels, and what was told to workers."""

    def __init__(self, broker: Any) -> None:
        self.broker = broker
        self.told: list[tuple[str, Ref]] = []
        self.orders = CancelOrders(broker.inflight, self.told.extend)
        self.operator = Operator(self)  # type: ignore[arg-type]

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        service = self.orders.services[path]
        assert isinstance(service, Unary)
        answer = await service.handler(body)
        assert isinstance(answer, bytes)
        return answer

    async def cancel(self, *ids: str, **options: bool) -> list[tuple[str, str, str]]:
        """For each: what was done, its state before, and its newest id or how it had ended."""
        found = await self.operator.cancel(ids, "no longer wanted", "ann", **options)
        assert [one.id for one in found] == list(ids)
        return [((one.effect.name or "").lower(), one.state, one.newest or one.outcome) for one in found]

    async def cancel_one(self, id_: str, **options: bool) -> tuple[str, str, str]:
        (found,) = await self.cancel(id_, **options)
        return found

    async def ends(self, *ids: str) -> list[tuple[str, str, str]]:
        """How each ended, and why."""
        return [(d.outcome, d.reason, d.error) for d in await self.broker.inflight.describe(ids)]

    async def claim(self, kind: LeaseKind, holder: str | None = None) -> Lease:
        (lease,) = await self.broker.inflight.claim(ClaimRequest(1, kind, holder))
        assert isinstance(lease, Lease)
        return lease

    async def nothing_follows(self) -> None:
        """Neither a retry nor a dead letter was published, and nothing is left to be done."""
        await trio.sleep(5)
        assert await self.broker.records("taskd-dlq") == []
        held = {status: count for status, count in self.broker.inflight.counts().items() if count}
        assert set(held) <= {Status.GONE}


@pytest.fixture
def scene(broker: Any) -> Scene:
    return Scene(broker)


CANCELLED = ("dropped", "cancelled", BY)


async def test_what_waits_is_dropped(scene: Scene, autojump_clock: Any) -> None:
    broker = scene.broker
    policy = broker.dead_letter_policy()
    await broker.produce(
        broker.activation("now", retry_state=policy),
        broker.activation("later", delay=60, retry_state=policy),
        broker.activation("nobody", application="unserved", retry_state=policy),
    )
    await broker.settle()
    await broker.inflight.sort_parked({""}, 10)
    assert await scene.cancel("later", "now", "nobody") == [
        ("dropped", "delayed", ""), ("dropped", "pending", ""), ("dropped", "parked", ""),
    ]  # fmt: skip
    assert await scene.ends("now", "later", "nobody") == [CANCELLED] * 3
    await broker.produce(broker.activation("now"))  # delivered again
    await trio.sleep(65)
    with pytest.raises(Refused, match="No pending activations"):
        await broker.get_task()
    await scene.nothing_follows()
    assert await scene.cancel_one("now") == ("ended", "gone", "dropped")


@pytest.mark.parametrize("started", [False, True])
async def test_a_worker_on_the_stream_is_to_be_told(scene: Scene, autojump_clock: Any, started: bool) -> None:
    broker = scene.broker
    await broker.produce(broker.activation("a", retry_state=broker.dead_letter_policy()))
    await broker.settle()
    lease = await scene.claim(LeaseKind.STREAM, "w1")
    if started:
        await broker.inflight.start([lease.ref])
    assert await scene.cancel_one("a") == ("stopping", "processing", "")
    assert scene.told == [("w1", lease.ref)]
    for status in ReportStatus:  # whatever crossed the order on its way
        (verdict,) = await broker.inflight.report([Report("a", lease.fence, status)])
        assert verdict is Verdict.UNKNOWN
    assert await broker.inflight.hand_back([lease.ref]) == [Verdict.UNKNOWN]
    assert await scene.ends("a") == [CANCELLED]
    await scene.nothing_follows()


class Worker:
    """A worker's stream in memory, from the broker's side."""

    def __init__(self) -> None:
        self.heard: list[frames.BrokerFrame] = []
        self._in, self._out = trio.open_memory_channel[bytes](100)

    async def say(self, *said: frames.WorkerFrame) -> None:
        for frame in said:
            await self._in.send(frames_codec.encode_worker_frame(frame))

    async def receive(self) -> bytes | None:
        return await self._out.receive()

    async def send(self, body: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.heard.append(frames_codec.decode_broker_frame(body))

    @property
    def stops(self) -> list[frames.Stop]:
        return [frame for frame in self.heard if isinstance(frame, frames.Stop)]


async def test_a_worker_hears_it_at_once_or_when_it_comes_back(broker: Any, autojump_clock: Any) -> None:
    scene = Scene(broker)
    scene.orders = CancelOrders(broker.inflight, broker.stream.stop_leases)
    await broker.produce(broker.activation("a"), broker.activation("b"))
    worker, again = Worker(), Worker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.stream.work, worker)
        await worker.say(frames.Hello("w1", "default"), frames.Credit(1, 2))
        await broker.settle()
        held = tuple(
            item.lease for f in worker.heard if isinstance(f, frames.Assignments) for item in f.assignments
        )
        before = trio.current_time()
        assert await scene.cancel_one("a") == ("stopping", "processing", "")
        await broker.settle()
        assert worker.stops == [frames.Stop(held[:1], frames.StopReason.CANCELLED)]
        assert trio.current_time() == before, "at once"
        nursery.cancel_scope.cancel()
    assert await scene.cancel_one("b") == ("stopping", "processing", "")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.stream.work, again)
        store_id = broker.inflight.store_id
        await again.say(frames.Hello("w1", "default", store_id=store_id, holding=held[1:]))
        await broker.settle()
        assert again.stops == [frames.Stop(held[1:], frames.StopReason.LOST)]
        nursery.cancel_scope.cancel()
    assert await scene.ends("a", "b") == [CANCELLED] * 2


async def test_a_worker_that_cannot_be_told_is_not_heard_any_more(scene: Scene, autojump_clock: Any) -> None:
    broker = scene.broker
    await broker.produce(broker.activation("a", retry_state=broker.dead_letter_policy()))
    await broker.settle()
    await broker.get_task()
    assert await scene.cancel_one("a") == ("untold", "processing", "")
    before = metrics.superseded_results._value.get()
    await broker.set_status("a", consumer.RETRY)
    assert metrics.superseded_results._value.get() == before + 1
    assert scene.told == []
    assert await scene.ends("a") == [CANCELLED]
    await scene.nothing_follows()


async def test_a_push_that_is_under_way_ends_nowhere(scene: Scene, autojump_clock: Any) -> None:
    broker = scene.broker
    await broker.produce(broker.activation("taken"), broker.activation("refused"), broker.activation("cut"))
    await broker.settle()
    taken, refused, cut = [await scene.claim(LeaseKind.PUSH) for _ in range(3)]
    assert await scene.cancel("taken", "refused", "cut") == [("untold", "claimed", "")] * 3
    assert await broker.inflight.pushed([taken.ref]) == [Verdict.UNKNOWN]
    assert await broker.inflight.unclaim([refused.ref]) == [Verdict.UNKNOWN]
    assert await broker.inflight.maybe_pushed([cut.ref]) == [Verdict.UNKNOWN]
    await trio.sleep(65)  # claims are over by now
    assert await scene.ends("taken", "refused", "cut") == [CANCELLED] * 3
    await scene.nothing_follows()


async def test_the_first_id_cancels_what_it_goes_on_as(scene: Scene, autojump_clock: Any) -> None:
    broker = scene.broker
    second = retry_id("a", 1)
    await broker.produce(broker.activation("a"))
    await broker.settle()
    lease = await scene.claim(LeaseKind.STREAM, "w1")
    await broker.inflight.report([Report("a", lease.fence, ReportStatus.RETRY)])
    await trio.sleep(2)
    assert await scene.cancel_one("a") == ("dropped", "pending", second)
    assert await scene.ends("a", second) == [("retried", "retry", ""), CANCELLED]
    assert await scene.cancel_one("a") == ("ended", "gone", second)
    await scene.nothing_follows()


class Outlet:
    """The way to the log, which may be closed, or slow: before a record is in the log, or after."""

    append: Any

    def __init__(self, *, away: bool = False) -> None:
        self.away = away
        self.written, self.answered = trio.Event(), trio.Event()

    async def __call__(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        if self.away:
            return [LogUnavailable("away") for _ in records]
        await self.written.wait()
        answers: list[Position | Exception] = await self.append(records)
        await self.answered.wait()
        return answers


async def asks_for_a_retry(scene: Scene, id_: str) -> None:
    await scene.broker.produce(scene.broker.activation(id_))
    await scene.broker.settle()
    lease = await scene.claim(LeaseKind.STREAM, "w1")
    await scene.broker.inflight.report([Report(id_, lease.fence, ReportStatus.RETRY)])
    await scene.broker.settle()


async def test_a_retry_that_waits_for_the_log_is_never_published(
    open_broker: Any, tmp_path: Any, autojump_clock: Any
) -> None:
    outlet = Outlet(away=True)
    async with open_broker(tmp_path, outlet=outlet) as broker:
        scene = Scene(broker)
        await asks_for_a_retry(scene, "a")
        assert await scene.cancel_one("a") == ("dropped", "retry", retry_id("a", 1))
        outlet.away = False
        await trio.sleep(120)
        assert len(await broker.records("taskd")) == 1
        assert await scene.ends("a", retry_id("a", 1)) == [CANCELLED] * 2


@pytest.mark.parametrize("in_the_log", [False, True])
async def test_a_retry_that_is_being_published_ends_where_it_arrives(
    open_broker: Any, tmp_path: Any, autojump_clock: Any, in_the_log: bool
) -> None:
    outlet = Outlet()
    async with open_broker(tmp_path, outlet=outlet) as broker:
        scene = Scene(broker)
        await asks_for_a_retry(scene, "a")
        if in_the_log:
            outlet.written.set()
            await broker.settle()
        (found,) = await broker.inflight.describe(["a"])
        assert found.status is Status.RETRY  # the publisher has read it, and waits for the log
        was = "pending" if in_the_log else "retry"
        assert await scene.cancel_one("a") == ("dropped", was, retry_id("a", 1))
        outlet.written.set()
        outlet.answered.set()
        await trio.sleep(60)
        assert len(await broker.records("taskd")) == 2
        assert await scene.ends("a", retry_id("a", 1)) == [CANCELLED] * 2
        await scene.nothing_follows()


async def test_what_cannot_be_cancelled_is_told(scene: Scene, autojump_clock: Any) -> None:
    broker = scene.broker
    await broker.produce(broker.activation("done"), broker.activation("failed"))
    await broker.settle()
    done, failed = [await scene.claim(LeaseKind.STREAM, "w1") for _ in range(2)]
    await broker.inflight.report(
        [
            Report("done", done.fence, ReportStatus.COMPLETE),
            Report("failed", failed.fence, ReportStatus.FAILURE),
        ]
    )
    assert await scene.cancel("done", "failed", "never heard of") == [
        ("ended", "gone", "complete"), ("ended", "gone", "failed"), ("unknown", "unknown", ""),
    ]  # fmt: skip
    await broker.produce(broker.activation("never heard of"))
    await broker.settle()
    assert (await broker.get_task()).id == "never heard of"


async def test_a_dead_letter_and_a_copy_on_their_way_are_left_alone(
    open_broker: Any, tmp_path: Any, autojump_clock: Any
) -> None:
    outlet = Outlet(away=True)
    outlet.answered.set()
    outlet.written.set()
    async with open_broker(tmp_path, outlet=outlet) as broker:
        scene = Scene(broker)
        policy = broker.dead_letter_policy()
        await broker.produce(broker.activation("fails", retry_state=policy), broker.activation("goes"))
        await broker.settle()
        lease = await scene.claim(LeaseKind.STREAM, "w1")
        await broker.inflight.report([Report("fails", lease.fence, ReportStatus.FAILURE)])
        await broker.inflight.forward_all(10, "evacuated")
        assert await scene.cancel("fails", "goes") == [
            ("leaving", "failure", ""), ("leaving", "forwarded", ""),
        ]  # fmt: skip
        outlet.away = False
        await trio.sleep(60)
        assert [record.value for record in await broker.records("taskd-dlq")]


async def test_what_is_not_here_yet_can_be_dropped_when_it_comes(scene: Scene, autojump_clock: Any) -> None:
    broker = scene.broker
    assert await scene.cancel_one("soon", even_unknown=True) == ("expected", "unknown", "")
    assert await scene.cancel_one("soon", even_unknown=True) == ("ended", "gone", "dropped")
    await broker.produce(broker.activation("soon"))
    await broker.settle()
    with pytest.raises(Refused, match="No pending activations"):
        await broker.get_task()
    assert await scene.ends("soon") == [CANCELLED]
    await trio.sleep(610)  # as long as any tombstone is kept
    assert await scene.cancel_one("soon") == ("unknown", "unknown", "")
    assert broker.inflight.depths() == []


async def test_a_strict_order_goes_on_behind_what_was_cancelled(scene: Scene, autojump_clock: Any) -> None:
    broker = scene.broker
    policy = broker.inflight._store.policy
    broker.inflight.set_policy(type(policy)(strict_order_namespaces=frozenset({"ns"})))
    await broker.produce(broker.activation("first"), broker.activation("second"))
    await broker.settle()
    await scene.claim(LeaseKind.STREAM, "w1")
    claimable = broker.inflight.watch_claimable()
    assert await broker.inflight.claim(ClaimRequest(1, LeaseKind.STREAM, "w1")) == []
    await scene.cancel("first")
    await claimable.wait()
    assert (await scene.claim(LeaseKind.STREAM, "w1")).id == "second"


async def test_a_large_order_is_several_writes_and_a_larger_one_several_orders(
    scene: Scene, autojump_clock: Any
) -> None:
    broker = scene.broker
    ids = [f"{number}" for number in range(MAX_IDS + 2 * IDS_PER_WRITE + 1)]
    async with trio.open_nursery() as nursery:
        for start in range(0, len(ids), 100):
            nursery.start_soon(broker.produce, *map(broker.activation, ids[start : start + 100]))
    await broker.settle()
    with structlog.testing.capture_logs() as lines:
        assert await scene.cancel(*ids) == [("dropped", "pending", "")] * len(ids)
    told = [line for line in lines if line["event"] == "cancel ordered"]
    assert [id_ for line in told for id_ in line["dropped"]] == ids
    assert {(line["by"], line["reason"]) for line in told} == {("ann", "no longer wanted")}
    assert max(len(line["dropped"]) for line in told) == IDS_PER_WRITE


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (v1.CancelRequest(ids=["a"], author="ann"), "expected the reason"),
        (v1.CancelRequest(ids=["a"], reason="why"), "expected the author"),
        (v1.CancelRequest(ids=["a"], reason="why\x1b[2J", author="ann"), "printable"),
        (v1.CancelRequest(reason="why", author="ann"), "expected ids"),
        (v1.CancelRequest(ids=["a", ""], reason="why", author="ann"), "an id has 1 to"),
        (v1.CancelRequest(ids=["ä" * (MAX_ID_BYTES // 2 + 1)], reason="why", author="ann"), "an id has 1 to"),
        (v1.CancelRequest(ids=["a"] * (MAX_IDS + 1), reason="why", author="ann"), "at most 1000 at once"),
    ],
)
async def test_a_wrong_order_does_nothing(
    scene: Scene, autojump_clock: Any, order: v1.CancelRequest, why: str
) -> None:
    await scene.broker.produce(scene.broker.activation("a"))
    await scene.broker.settle()
    with pytest.raises(Refused, match=why):
        await scene.orders.cancel(bytes(order))
    with pytest.raises(Refused, match="cannot be read"):
        await scene.orders.cancel(bytes(v1.CancelRequest(ids=["a"], reason="why", author="ann"))[:-1])
    assert (await scene.broker.get_task()).id == "a"


async def test_an_operator_who_hangs_up_does_not_leave_a_worker_untold(
    scene: Scene, autojump_clock: Any
) -> None:
    broker = scene.broker
    await broker.produce(broker.activation("a"))
    await broker.settle()
    lease = await scene.claim(LeaseKind.STREAM, "w1")
    with trio.CancelScope() as calling:
        calling.cancel()
        await scene.cancel("a")
    assert await scene.ends("a") == [CANCELLED]
    assert scene.told == [("w1", lease.ref)]


def test_every_effect_has_a_number_on_the_wire() -> None:
    from taskd.admin.cancel import WIRE_EFFECTS

    assert set(WIRE_EFFECTS) == set(Effect)
    assert {effect.name for effect in WIRE_EFFECTS.values()} == {effect.name for effect in Effect}
