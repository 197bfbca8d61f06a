"""What the store hands out under limits: never more at once, never faster, and nobody else waits for it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rows import arrival, check

from taskd.activation.lifecycle import Status
from taskd.clock import Now
from taskd.inflight.base import (
    ClaimRequest,
    Lease,
    LeaseKind,
    Policy,
    Report,
    ReportStatus,
    Settlement,
)
from taskd.inflight.known import known_tasks
from taskd.inflight.limits import LimitKind, LimitRule
from taskd.inflight.rates import Rate
from taskd.inflight.writer import Inflight, open_inflight
from taskd.testing.clock import FixedClock

Opener = Callable[..., AbstractAsyncContextManager[Inflight]]


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock(mono_ms=5_000_000)


@pytest.fixture
def opened(tmp_path: Path, clock: FixedClock) -> Opener:
    """Opens the test's one store file, again if asked again."""

    @asynccontextmanager
    async def open_(*rules: LimitRule, settle: bool = True, **policy: Any) -> AsyncIterator[Inflight]:
        path = tmp_path / "store.sqlite"
        async with open_inflight(path, clock, Policy(limits=rules, **policy), inline=True) as store:
            if settle:
                await relane(store)
            yield store

    return open_


def task_limit(
    taskname: str = "slow", concurrency: int | None = None, rate: Rate | None = None, **changes: Any
) -> LimitRule:
    return LimitRule(
        LimitKind.TASK,
        f"ns:{taskname}",
        **{"namespace": "ns", "taskname": taskname, "concurrency": concurrency, "rate": rate, **changes},
    )


def namespace_limit(concurrency: int, application: str | None = None) -> LimitRule:
    return LimitRule(LimitKind.NAMESPACE, "ns", application, "ns", concurrency=concurrency)


def pool_limit(pool: str, concurrency: int) -> LimitRule:
    return LimitRule(LimitKind.POOL, pool, concurrency=concurrency)


async def put(inflight: Inflight, *ids: str, taskname: str = "task", **changes: Any) -> None:
    fields = {"namespace": "ns", "taskname": taskname, **changes}
    await inflight.insert([arrival(id_, **fields) for id_ in ids])


async def claim(
    inflight: Inflight, limit: int = 10, kind: LeaseKind = LeaseKind.STREAM, **more: Any
) -> list[Lease]:
    if kind is LeaseKind.STREAM:
        more = {"holder": "w", **more}
    return await inflight.claim(ClaimRequest(limit, kind, **more))


def names(leases: list[Lease]) -> list[str]:
    return [lease.id for lease in leases]


async def end(inflight: Inflight, *leases: Lease, status: ReportStatus = ReportStatus.COMPLETE) -> None:
    await inflight.report([Report(lease.id, lease.fence, status) for lease in leases])


async def relane(inflight: Inflight, limit: int = 100) -> int:
    """Until every row is in its lane. Returns how many rounds that took."""
    rounds = 1
    while await inflight.relane(limit) == limit:
        rounds += 1
    return rounds


# ---- concurrency


@pytest.mark.parametrize("kind", [LeaseKind.UNARY, LeaseKind.STREAM, LeaseKind.PUSH])
async def test_a_full_task_leaves_the_round_and_its_namespace_goes_on(
    opened: Opener, kind: LeaseKind
) -> None:
    async with opened(task_limit(concurrency=2)) as store:
        await put(store, "s1", "s2", "s3", taskname="slow")
        await put(store, "a", "b", "c")
        first = await claim(store, 10, kind)
        assert sorted(names(first)) == ["a", "b", "c", "s1", "s2"]
        assert not store.claimable(None, ())
        assert await claim(store, 10, kind) == []
        await end(store, *(lease for lease in first if lease.id == "s1"))
        assert store.claimable(None, ())
        assert names(await claim(store, 10, kind)) == ["s3"]
        check(store)


@pytest.mark.parametrize(
    "how",
    ["complete", "failure", "retry", "crashed", "hand_back", "reconcile", "deadline", "cancel"],
)
async def test_however_a_lease_ends_its_room_is_free(opened: Opener, clock: FixedClock, how: str) -> None:
    async with opened(task_limit(concurrency=1), max_processing_attempts=9) as store:
        await put(store, "s1", "s2", taskname="slow")
        (lease,) = await claim(store)
        await (store.start([lease.ref]) if how in ("deadline", "crashed") else store.start([]))
        wake = store.watch_claimable()
        if how in ("complete", "failure", "retry", "crashed"):
            await end(store, lease, status=ReportStatus(how))
        elif how == "hand_back":
            await store.hand_back([lease.ref])
        elif how == "reconcile":
            await store.reconcile("w", ())
        elif how == "cancel":
            await store.cancel(["s1"], "why")
        else:
            clock.advance(60)
            await store.end_overdue(10)
        assert wake._event.is_set()
        assert len(await claim(store)) == 1
        assert await claim(store) == []
        check(store)


async def test_what_is_held_counts_again_after_a_restart(opened: Opener) -> None:
    rules = (task_limit(concurrency=2), namespace_limit(3))
    async with opened(*rules) as store:
        await put(store, "s1", "s2", "s3", taskname="slow")
        await put(store, "a", "b", "c")
        held = await claim(store)
        assert len(held) == 3
    async with opened(*rules) as store:
        assert await claim(store) == []
        await end(store, held[0])
        assert len(await claim(store)) == 1


async def test_a_namespace_counts_all_its_tasks_and_others_do_not_wait(opened: Opener) -> None:
    async with opened(namespace_limit(3), task_limit(concurrency=2)) as store:
        await put(store, "s1", "s2", "s3", taskname="slow")
        await put(store, "a", "b", "c")
        await put(store, "x", "y", namespace="other")
        leases = await claim(store, 20)
        tasks = Counter(name[0] for name in names(leases))
        assert tasks["x"] + tasks["y"] == 2
        assert len(leases) == 5
        assert tasks["s"] <= 2


async def test_a_limit_without_application_is_one_for_all_of_them(opened: Opener) -> None:
    async with opened(task_limit(concurrency=1)) as store:
        await put(store, "s1", taskname="slow")
        await put(store, "s2", taskname="slow", application="bank")
        assert len(await claim(store)) == 1
        assert await claim(store) == []
    async with opened(task_limit(concurrency=1, application="bank")) as store:
        await put(store, "s3", taskname="slow", application="bank")
        assert len(await claim(store)) == 1
        assert await claim(store) == []


async def test_a_task_of_the_same_name_elsewhere_is_not_limited(opened: Opener) -> None:
    async with opened(task_limit(concurrency=1)) as store:
        await put(store, "s1", "s2", taskname="slow", namespace="other")
        assert len(await claim(store)) == 2


async def test_a_full_task_with_many_rows_costs_no_look_at_them(opened: Opener) -> None:
    async with opened(task_limit(concurrency=1)) as store:
        await put(store, *(f"s{n}" for n in range(3_000)), taskname="slow")
        await put(store, "a")
        await claim(store, 1)
        await claim(store, 1)
        steps = 0
        store._store.db.set_exec_trace(lambda *_: count())

        def count() -> bool:
            nonlocal steps
            steps += 1
            return True

        await put(store, "b")
        steps = 0
        assert names(await claim(store, 100)) == ["b"]
        store._store.db.set_exec_trace(None)
        assert steps < 20


async def test_a_worker_that_does_not_know_the_task_does_not_look_at_its_rows(opened: Opener) -> None:
    async with opened(task_limit(concurrency=9)) as store:
        await put(store, *(f"s{n}" for n in range(9)), taskname="slow")
        quick, both = known_tasks([("shop", "ns", "task")]), known_tasks([("shop", "ns", "slow")])
        assert await claim(store, knows=quick, known_to_any=both) == []
        assert store._store.passed == {}
        assert await claim(store, knows=quick, known_to_any=quick) == []
        assert store.counts() == {Status.PARKED: 9}
        await store.bring_back(both, 9)
        assert len(await claim(store, knows=both, known_to_any=both)) == 9


async def test_what_claims_remember_of_a_lane_goes_with_it(opened: Opener, clock: FixedClock) -> None:
    async with opened() as store:
        spaces = [f"made-up-{number}" for number in range(5)]
        for space in spaces:
            await put(store, space, taskname="slow", namespace=space, expires_s=1)
        quick = known_tasks([("shop", space, "task") for space in spaces])
        both = known_tasks([("shop", space, name) for space in spaces for name in ("task", "slow")])
        assert await claim(store, knows=quick, known_to_any=both) == []
        assert len(store._store.passed) == 5
        clock.advance(2)
        await store.expire(5)
        await store.settle([Settlement(row.id) for row in await store.leaving(5)])
        assert await store.forget(0, 0, 5) == 5
        assert store._store.passed == {}


async def test_whoever_asks_is_told_which_limits_hold_a_row_back(opened: Opener, clock: FixedClock) -> None:
    rules = (task_limit("slow", 1), namespace_limit(2), task_limit("rated", None, Rate(1, 60_000)))
    async with opened(*rules) as store:
        await put(store, "s1", "s2", taskname="slow")
        await put(store, "a", "b")
        await put(store, "r", taskname="rated")

        async def told() -> list[str]:
            return [found.reason for found in await store.describe(["s1", "s2", "b", "r"])]

        assert await told() == ["", "", "", "held back by limit of task ns:rated"]
        await claim(store)
        both = "held back by limit of task ns:slow, limit of namespace ns"
        assert (await told())[:3] == ["", both, "held back by limit of namespace ns"]
        assert "task ns:rated" in (await told())[3]


# ---- pools


async def test_a_pool_holds_no_more_than_its_limit_over_all_its_workers(opened: Opener) -> None:
    async with opened(pool_limit("small", 3)) as store:
        await put(store, *(f"{n}" for n in range(9)))
        first = await claim(store, 2, holder="w1", pool="small")
        second = await claim(store, 5, holder="w2", pool="small")
        assert (len(first), len(second)) == (2, 1)
        assert await claim(store, 5, holder="w1", pool="small") == []
        assert not store.claimable(None, (), pool="small")
        assert len(await claim(store, 2, holder="w3", pool="large")) == 2
        wake = store.watch_claimable()
        await end(store, first[0])
        assert wake._event.is_set()
        assert store.claimable(None, (), pool="small")
        assert len(await claim(store, 5, holder="w1", pool="small")) == 1
        (state,) = await store.limit_states()
        assert (state.name, state.live, state.concurrency) == ("small", 3, 3)


async def test_what_a_pool_holds_is_known_after_a_restart_before_its_workers_are_back(opened: Opener) -> None:
    async with opened() as store:
        await put(store, *(f"{n}" for n in range(9)))
        await claim(store, 3, holder="w1", pool="small")
    async with opened(pool_limit("small", 4)) as store:
        assert len(await claim(store, 5, holder="w2", pool="small")) == 1


async def test_pools_of_workers_that_hold_nothing_are_forgotten(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.inflight.pools.FORGET_ABOVE", 5)
    async with opened(pool_limit("small", 100)) as store:
        await put(store, *(f"{n}" for n in range(30)))
        await claim(store, 1, holder="keeps", pool="small")
        for number in range(20):
            await end(store, *await claim(store, 1, holder=f"w{number}", pool="small"))
        assert len(store._store.run("pools").fetchall()) <= 6
        (state,) = await store.limit_states()
        assert state.live == 1


# ---- rates


async def test_a_rate_hands_out_its_number_in_a_minute(opened: Opener, clock: FixedClock) -> None:
    async with opened(task_limit(rate=Rate(30, 60_000))) as store:
        await put(store, *(f"{n}" for n in range(100)), taskname="slow")
        assert await claim(store) == []  # a broker that was just started has no tokens yet
        times = []
        for _ in range(600):
            clock.advance(0.1)
            times += [clock.mono_ms - 5_000_000 for _ in await claim(store)]
        assert times == [2_000 * n for n in range(1, 31)]
        clock.advance(3_600)
        assert len(await claim(store)) == 1  # what was not used is not saved up


async def test_a_fast_rate_may_burst_for_one_second(opened: Opener, clock: FixedClock) -> None:
    async with opened(task_limit(rate=Rate(100, 1_000))) as store:
        await put(store, *(f"{n}" for n in range(500)), taskname="slow")
        clock.advance(60)
        assert len(await claim(store, 500)) == 100
        clock.advance(0.05)
        assert len(await claim(store, 500)) == 5


async def test_a_hand_back_gives_its_token_back(opened: Opener, clock: FixedClock) -> None:
    async with opened(task_limit(rate=Rate(1, 60_000))) as store:
        await put(store, "a", "b", taskname="slow")
        clock.advance(60)
        (lease,) = await claim(store)
        await store.hand_back([lease.ref])
        (lease,) = await claim(store, kind=LeaseKind.PUSH)
        await store.unclaim([lease.ref])
        (lease,) = await claim(store)
        await end(store, lease)
        assert await claim(store) == []


async def test_a_claim_that_could_not_be_stored_takes_no_token(
    opened: Opener, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(task_limit(rate=Rate(1, 60_000)), pool_limit("p", 5)) as store:
        await put(store, "a", taskname="slow")
        clock.advance(60)
        with monkeypatch.context() as patched:
            patched.setattr(store._store, "_save_counters", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await claim(store, pool="p")
        assert store._store.run("pools").fetchall() == []
        assert names(await claim(store, pool="p")) == ["a"]
        assert store._store.run("pools").fetchall() == [("w", "p")]


async def test_a_new_configuration_of_something_else_keeps_the_tokens(
    opened: Opener, clock: FixedClock
) -> None:
    rule = task_limit(rate=Rate(1, 60_000))
    async with opened(rule) as store:
        await put(store, "a", taskname="slow")
        clock.advance(59)
        store.set_policy(Policy(limits=(rule, namespace_limit(9))))
        await relane(store)
        assert await claim(store) == []
        clock.advance(1)
        assert len(await claim(store)) == 1


# ---- strict order


async def test_in_strict_order_a_rate_holds_up_what_is_behind_it(opened: Opener, clock: FixedClock) -> None:
    rule = task_limit(rate=Rate(1, 60_000))
    async with opened(rule, strict_order_namespaces=frozenset({"ns"})) as store:
        await put(store, "a")
        await put(store, "s1", "s2", taskname="slow")
        await put(store, "z")
        order = []
        for _ in range(125):
            leases = await claim(store)
            order += [(clock.mono_ms - 5_000_000, lease.id) for lease in leases]
            await end(store, *leases)
            clock.advance(1)
        assert order == [(0, "a"), (60_000, "s1"), (120_000, "s2"), (121_000, "z")]


async def test_in_strict_order_a_hand_back_gives_its_token_back(opened: Opener, clock: FixedClock) -> None:
    rule = task_limit(rate=Rate(1, 60_000))
    async with opened(rule, strict_order_namespaces=frozenset({"ns"})) as store:
        await put(store, "s1", taskname="slow")
        clock.advance(60)
        (lease,) = await claim(store)
        await store.hand_back([lease.ref])
        assert names(await claim(store)) == ["s1"]


async def test_limits_of_strict_order_namespaces_hold_one_lease_in_each(opened: Opener) -> None:
    strict = frozenset({"ns"})
    async with opened(namespace_limit(2), strict_order_namespaces=strict) as store:
        for application in ("a", "b", "c"):
            await put(store, f"{application}1", f"{application}2", application=application)
        leases = await claim(store)
        assert len({name[0] for name in names(leases)}) == len(leases) == 2


# ---- other limits than before


async def test_rows_move_to_their_lanes_when_a_task_is_limited_and_back(opened: Opener) -> None:
    async with opened() as store:
        await put(store, "a", "b")
        await put(store, "s1", "s2", "parked", taskname="slow")
        await put(store, "c")
        await put(store, "delayed", taskname="slow", delay_s=60)
        await put(store, "elsewhere", taskname="slow", namespace="other")
        await put(store, "failed", taskname="slow", namespace="last")
        await end(store, *await claim(store, namespaces=("last",)), status=ReportStatus.FAILURE)
        store._store.run("park_row", store._store.one("leased", "parked")[0])
        number = store._store.one("leased", "parked")[2]
        store._store.lanes[number].counts.update({Status.PENDING: -1, Status.PARKED: 1})
        assert names(await claim(store, 1, namespaces=("ns",))) == ["a"]
        store.set_policy(Policy(limits=(task_limit(concurrency=1),)))
        assert await relane(store, 2) > 3
        assert sorted(names(await claim(store))) == ["b", "c", "elsewhere", "s1"]
        check(store)
        (its,) = (lane for lane in store._store.lanes.values() if lane.taskname)
        assert +its.counts == {
            Status.PENDING: 1, Status.DELAYED: 1, Status.PARKED: 1, Status.PROCESSING: 1
        }  # fmt: skip
    async with opened(settle=False) as store:
        assert not store.claimable(None, ("ns",))  # nothing is handed out before the rows are back
        await relane(store)
        assert names(await claim(store, namespaces=("ns",))) == ["s2"]
        check(store)
        lanes = {(lane.namespace, lane.taskname) for lane in store._store.lanes.values()}
        assert lanes == {("ns", ""), ("other", ""), ("last", "")}


async def test_what_was_held_before_counts_in_the_limit(opened: Opener) -> None:
    async with opened() as store:
        await put(store, "s1", "s2", "s3", taskname="slow")
        held = await claim(store, 2)
        store.set_policy(Policy(limits=(task_limit(concurrency=2),)))
        assert await store.relane(1) == 1  # not yet through
        assert await claim(store) == []
        await relane(store)
        assert await claim(store) == []
        await end(store, held[0])
        assert names(await claim(store)) == ["s3"]


async def test_an_interrupted_move_goes_on_at_the_next_start(opened: Opener) -> None:
    async with opened() as store:
        await put(store, *(f"s{n}" for n in range(9)), taskname="slow")
    rule = task_limit(concurrency=1)
    async with opened(rule, settle=False) as store:
        await store.relane(4)
    async with opened(settle=False) as store:  # other limits again, halfway
        assert await claim(store) == []
        await relane(store)
        assert len(await claim(store, 20)) == 9
        assert {lane.taskname for lane in store._store.lanes.values()} == {""}


async def test_what_came_in_before_the_move_began_is_found_at_the_next_start(opened: Opener) -> None:
    rule = task_limit(concurrency=1)
    async with opened(rule):
        pass
    async with opened(settle=False) as store:  # the limit is gone, and this start is cut off at once
        await put(store, "s1", "s2", "s3", taskname="slow")
    async with opened(rule) as store:
        assert names(await claim(store)) == ["s1"]


async def test_a_file_without_limits_is_not_looked_through(opened: Opener) -> None:
    async with opened(namespace_limit(1)) as store:
        await put(store, "a")
        assert await store.relane(10) == 0


async def test_the_order_of_a_lane_outlives_the_move(opened: Opener) -> None:
    async with opened() as store:
        for number in range(20):
            await put(store, f"{number:02}", taskname="slow" if number % 2 else "task")
        store.set_policy(Policy(limits=(task_limit(concurrency=50),)))
        await relane(store, 3)
        store.set_policy(Policy())
        await relane(store, 7)
        assert names(await claim(store, 20)) == [f"{number:02}" for number in range(20)]


class CreepingClock(FixedClock):
    """A millisecond goes by with every look at it."""

    def now(self) -> Now:
        self.advance(0.001)
        return super().now()


@pytest.mark.parametrize("early_ms", range(6))
@pytest.mark.parametrize("looks", ["claimable", "claim"])
async def test_a_token_that_comes_while_somebody_looks_for_it_is_expected(
    tmp_path: Path, early_ms: int, looks: str
) -> None:
    clock = CreepingClock(mono_ms=5_000_000)
    policy = Policy(limits=(task_limit(rate=Rate(1, 1_000)),))
    async with open_inflight(tmp_path / "store.sqlite", clock, policy, inline=True) as store:
        await relane(store)
        clock.advance(10)
        await put(store, "a", taskname="slow")
        assert names(await claim(store)) == ["a"]
        await put(store, "b", taskname="slow")
        (limit,) = store._store.limits.rated
        assert limit.bucket is not None
        clock.mono_ms = limit.bucket.ready_at_ms() - early_ms
        found = store.claimable(None, ()) if looks == "claimable" else names(await claim(store))
        assert found or store.tokens_in_s() < 2, "nobody would look again"


# ---- whatever happens


@pytest.mark.parametrize("seed", range(4))
async def test_limits_hold_whatever_happens(opened: Opener, clock: FixedClock, seed: int) -> None:
    """Claims, ends, crashes, restarts and other limits in any order: no limit is ever exceeded."""
    rng = random.Random(seed)
    number = 0
    kinds = list(LeaseKind)[1:]

    def rules() -> tuple[LimitRule, ...]:
        every = (
            task_limit("slow", rng.randint(1, 3)),
            task_limit("rated", None, Rate(2, 1_000)),
            namespace_limit(rng.randint(3, 5), rng.choice([None, "shop"])),
            pool_limit("small", 4),
        )
        return tuple(rule for rule in every if rng.random() < 0.8)

    limits = rules()
    leases: list[Lease] = []
    for _ in range(5):
        async with opened(*limits) as store:
            for _ in range(40):
                for _ in range(rng.randint(0, 4)):
                    number += 1
                    await put(
                        store,
                        f"{number}",
                        taskname=rng.choice(["slow", "rated", "task"]),
                        application=rng.choice(["shop", "bank"]),
                        namespace=rng.choice(["ns", "ns", "other"]),
                    )
                if rng.random() < 0.1:
                    limits = rules()
                    store.set_policy(Policy(limits=limits))
                before = Counter(_held(store))
                kind = rng.choice(kinds)
                got = await claim(store, rng.randint(1, 6), kind, pool=rng.choice(["small", "large", ""]))
                leases += got
                if not store._relaning.is_due:
                    _check_limits(store, limits, before)
                if rng.random() < 0.7:
                    await relane(store, rng.choice([3, 100]))
                for lease in rng.sample(leases, min(len(leases), rng.randint(0, 4))):
                    what = rng.randrange(4)
                    if what == 0:
                        await store.hand_back([lease.ref])
                    elif what == 1:
                        await store.unclaim([lease.ref])
                    else:
                        await end(store, lease, status=rng.choice(list(ReportStatus)[:3]))
                clock.advance(rng.choice([0, 0, 0.2, 15]))
                await store.end_overdue(3)
                await store.end_overdue_claims(3)
                await store.settle([Settlement(row.id) for row in await store.leaving(5)])
                await store.forget(30_000, 1_000, 10)
            check(store)


def _held(store: Inflight) -> dict[tuple[str, str, str], int]:
    return {
        (application, namespace, taskname): count
        for application, namespace, taskname, count in store._store.db.execute(
            "SELECT application, namespace, inflight.taskname, count(*) FROM inflight JOIN lane USING (lane) "
            "WHERE status IN (4, 5) GROUP BY 1, 2, 3"
        )
    }


def _check_limits(
    store: Inflight, limits: tuple[LimitRule, ...], before: Counter[tuple[str, str, str]]
) -> None:
    """No more is held than a limit allows, unless it was so before."""
    now = Counter(_held(store))
    for rule in limits:
        if rule.concurrency is None or rule.kind is LimitKind.POOL:
            continue
        held, held_before = (
            sum(
                count
                for (application, namespace, taskname), count in counts.items()
                if namespace == rule.namespace
                and rule.application in (None, application)
                and rule.taskname in ("", taskname)
            )
            for counts in (now, before)
        )
        assert held <= max(rule.concurrency, held_before), rule
