"""What the store does with rows on their way to a worker by push, and with rows nobody serves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from rows import arrival, check

from taskd.activation.lifecycle import Status
from taskd.inflight.base import (
    ClaimRequest,
    Description,
    Lease,
    LeaseKind,
    Policy,
    Ref,
    Report,
    ReportStatus,
    Settlement,
    Verdict,
)
from taskd.inflight.known import KnownTasks
from taskd.inflight.writer import Inflight, open_inflight
from taskd.testing.clock import FixedClock

APPLIED, SUPERSEDED, UNKNOWN = Verdict.APPLIED, Verdict.SUPERSEDED, Verdict.UNKNOWN
CLAIM_MS, GRACE_MS, DEADLINE_S = 40_000, 3_000, 10

Opener = Callable[..., AbstractAsyncContextManager[Inflight]]


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock(mono_ms=5_000_000)


@pytest.fixture
def opened(tmp_path: Path, clock: FixedClock) -> Opener:
    """Opens the test's one store file, again if asked again."""

    def open_(**policy: Any) -> AbstractAsyncContextManager[Inflight]:
        return open_inflight(tmp_path / "store.sqlite", clock, Policy(**policy), inline=True)

    return open_


@pytest.fixture
async def store(opened: Opener) -> AsyncIterator[Inflight]:
    async with opened() as inflight:
        yield inflight
        check(inflight)


async def put(inflight: Inflight, *ids: str, **changes: Any) -> None:
    await inflight.insert([arrival(id_, **{"namespace": "ns", "taskname": "task", **changes}) for id_ in ids])


async def claim(inflight: Inflight, limit: int = 10, **filters: Any) -> list[Lease]:
    return await inflight.claim(ClaimRequest(limit, LeaseKind.PUSH, **filters))


async def look(inflight: Inflight, id_: str) -> Description:
    (description,) = await inflight.describe([id_])
    return description


async def say(inflight: Inflight, id_: str, status: ReportStatus = ReportStatus.COMPLETE) -> Verdict:
    (verdict,) = await inflight.report([Report(id_, None, status)])
    return verdict


async def test_a_claim_is_no_attempt_and_a_push_is_one(store: Inflight, clock: FixedClock) -> None:
    await put(store, "a", "b")
    a, b = await claim(store)
    assert (a.id, a.activation, a.deadline_ms) == ("a", b"a", 10_000)
    assert store.counts() == Counter({Status.CLAIMED: 2})
    assert await store.pushed([a.ref]) == [APPLIED]
    assert await store.unclaim([b.ref]) == [APPLIED]
    assert ((await look(store, "a")).attempts, (await look(store, "b")).attempts) == (1, 0)
    assert store.counts() == Counter({Status.PROCESSING: 1, Status.PENDING: 1})
    clock.advance(DEADLINE_S + GRACE_MS / 1000 - 0.001)
    assert await store.end_overdue(10) == 0
    clock.advance(0.001)
    assert await store.end_overdue(10) == 1
    assert (await look(store, "a")).status is Status.PENDING


@pytest.mark.parametrize("end", ["pushed", "unclaim", "maybe_pushed"])
async def test_only_the_newest_claim_can_end_it(store: Inflight, end: str) -> None:
    await put(store, "a", "done", "asked", at_most_once=False)
    (old, done, asked) = await claim(store)
    await store.unclaim([old.ref])
    (new,) = await claim(store)
    assert new.fence > old.fence
    await say(store, "done")
    await say(store, "asked", ReportStatus.RETRY)
    refs = [old.ref, done.ref, asked.ref, Ref("never heard of", 1)]
    assert await getattr(store, end)(refs) == [SUPERSEDED, UNKNOWN, SUPERSEDED, UNKNOWN]
    assert (await look(store, "a")).status is Status.CLAIMED
    assert (await look(store, "done")).outcome == "complete"
    assert (await look(store, "asked")).status is Status.RETRY


@pytest.mark.parametrize(
    ("status", "after"),
    [
        (ReportStatus.COMPLETE, Status.GONE),
        (ReportStatus.FAILURE, Status.FAILURE),
        (ReportStatus.RETRY, Status.RETRY),
    ],
)
async def test_a_report_counts_on_a_claimed_row_and_after_its_claim(
    store: Inflight, status: ReportStatus, after: Status
) -> None:
    await put(store, "claimed", "given back")
    _, given_back = await claim(store)
    await store.unclaim([given_back.ref])
    for id_ in ("claimed", "given back"):
        assert await say(store, id_, status) is APPLIED
        assert (await look(store, id_)).status is after
    assert (await look(store, "claimed")).attempts == 1


async def test_a_claim_ends_by_itself_at_most_once_as_a_start(store: Inflight, clock: FixedClock) -> None:
    await put(store, "usual")
    await put(store, "once", at_most_once=True)
    await claim(store)
    clock.advance(CLAIM_MS / 1000 - 0.001)
    assert await store.end_overdue_claims(10) == 0
    clock.advance(0.001)
    assert await store.end_overdue_claims(1) == 1
    assert await store.end_overdue_claims(10) == 1
    usual, once = await look(store, "usual"), await look(store, "once")
    assert (usual.status, usual.attempts) == (Status.PENDING, 0)
    assert (once.status, once.attempts) == (Status.PROCESSING, 1)
    clock.advance(DEADLINE_S + GRACE_MS / 1000)
    await store.end_overdue(10)
    once = await look(store, "once")
    assert (once.status, once.reason) == (Status.FAILURE, "at_most_once")


async def test_claims_begin_again_at_full_length_when_the_broker_does(
    opened: Opener, clock: FixedClock
) -> None:
    async with opened() as store:
        await put(store, "a")
        await claim(store)
    clock.advance(CLAIM_MS / 1000 - 1)
    clock.mono_ms = 7_000  # the machine was started anew
    async with opened() as store:
        assert store.counts() == Counter({Status.CLAIMED: 1})
        clock.advance(CLAIM_MS / 1000 - 0.001)
        assert await store.end_overdue_claims(10) == 0
        clock.advance(0.001)
        assert await store.end_overdue_claims(10) == 1


async def test_a_claim_occupies_a_strict_order_namespace(opened: Opener) -> None:
    async with opened(strict_order_namespaces=frozenset({"ns"})) as store:
        await put(store, "a", "b")
        (a,) = await claim(store)
        assert await claim(store) == []
        await store.unclaim([a.ref])
        (again,) = await claim(store)
        assert again.id == "a"


async def test_what_expired_is_not_claimed(store: Inflight, clock: FixedClock) -> None:
    await put(store, "late", expires_s=5)
    clock.advance(5)
    assert await claim(store) == []
    assert (await look(store, "late")).status is Status.EXPIRED


async def test_parked_rows_are_nobodys_until_they_come_back_in_their_order(
    store: Inflight, clock: FixedClock
) -> None:
    await put(store, "s1")
    await put(store, "b1", "b2", "b3", application="bank")
    await put(store, "b4", application="bank", expires_s=5)
    assert await store.sort_parked({"shop"}, 3) == 3
    assert await store.sort_parked({"shop"}, 3) == 1
    assert await store.sort_parked({"shop"}, 3) == 0
    assert not store.claimable("bank", ())
    assert [lease.id for lease in await claim(store)] == ["s1"]
    clock.advance(5)
    assert await store.expire(10) == 1
    await put(store, "b5", application="bank")
    assert await store.sort_parked({"shop", "bank"}, 2) == 2
    assert await store.bring_back(KnownTasks(everything=True), 10) == 1
    assert [lease.id for lease in await claim(store)] == ["b1", "b2", "b3", "b5"]


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_nothing_finished_comes_back(
    opened: Opener, clock: FixedClock, seed: int
) -> None:
    """Reports, ends of calls and ends of claims in any order; every row ends once."""
    rng = random.Random(seed)
    ends = ("pushed", "unclaim", "maybe_pushed")
    ids = [f"{number}" for number in range(30)]
    finished: set[str] = set()
    starts: Counter[str] = Counter()
    leases: list[Lease] = []
    async with opened() as store:
        for id_ in ids:
            await put(store, id_, at_most_once=id_ in ids[::3], dead_letter=rng.random() < 0.5)
        for _ in range(400):
            await store.sort_parked({"shop"} if rng.random() < 0.8 else (), 10)
            claimed = await claim(store, rng.randint(1, 4))
            assert not finished & {lease.id for lease in claimed}
            leases += claimed
            for lease in rng.sample(leases, min(3, len(leases))):
                if rng.random() < 0.4:
                    if await say(store, lease.id, rng.choice(list(ReportStatus)[:3])) is APPLIED:
                        assert lease.id not in finished
                        finished.add(lease.id)
                    continue
                end = rng.choice(ends)
                (verdict,) = await getattr(store, end)([lease.ref])
                assert not (lease.id in finished and verdict is APPLIED)
                starts[lease.id] += end == "pushed" and verdict is APPLIED
            clock.advance(rng.choice([0, 0.1, 5, 20]))
            await store.end_overdue(5)
            await store.end_overdue_claims(5)
            rows = await store.leaving(5)
            await store.settle([Settlement(row.id) for row in rows])
            finished |= {row.id for row in rows}
        check(store)
        assert all(starts[id_] <= 1 for id_ in ids[::3])
        ended = {Status.GONE, Status.RETRY, Status.FAILURE}
        assert {id_ for id_ in ids if (await look(store, id_)).status in ended} >= finished
