"""What is done with many held rows at once is what would be done with each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rows import arrival, check

from taskd.activation.lifecycle import Event, Status
from taskd.activation.switches import Switch, SwitchKind
from taskd.inflight import handouts, held
from taskd.inflight.base import ClaimRequest, LeaseKind, Policy, Ref, Report, ReportStatus, Verdict
from taskd.inflight.sqlite import Changes
from taskd.inflight.writer import Inflight, open_inflight
from taskd.testing.clock import START_WALL_MS, FixedClock

APPLIED, SUPERSEDED, UNKNOWN = Verdict.APPLIED, Verdict.SUPERSEDED, Verdict.UNKNOWN
COMPLETE, FAILURE = ReportStatus.COMPLETE, ReportStatus.FAILURE


@asynccontextmanager
async def opened(folder: Path, clock: FixedClock, name: str = "store") -> AsyncIterator[Inflight]:
    async with open_inflight(folder / f"{name}.sqlite", clock, Policy(), inline=True) as inflight:
        yield inflight
        check(inflight)


async def hold(inflight: Inflight, *ids: str, holder: str = "w1") -> list[Ref]:
    await inflight.insert([arrival(id_, received_at_ms=START_WALL_MS - 1_000) for id_ in ids])
    return [lease.ref for lease in await claim(inflight, len(ids), holder)]


async def claim(
    inflight: Inflight, limit: int, holder: str = "w1", kind: LeaseKind = LeaseKind.STREAM
) -> Sequence[Any]:
    return await inflight.claim(ClaimRequest(limit, kind, holder=holder))


def reports(refs: Sequence[Ref], status: ReportStatus = COMPLETE) -> list[Report]:
    return [Report(ref.id, ref.fence, status) for ref in refs]


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock(mono_ms=50_000)


@pytest.fixture
async def store(tmp_path: Path, clock: FixedClock) -> AsyncIterator[Inflight]:
    async with opened(tmp_path, clock) as inflight:
        yield inflight


async def test_what_is_completed_together_leaves_the_tombstones_of_single_ones(store: Inflight) -> None:
    changes: list[Changes] = []
    refs = await hold(store, "a", "b", "c")
    await store.start(refs[:1])
    store.observers.append(changes.append)
    assert await store.report(reports(refs)) == [APPLIED] * 3
    assert [(d.status, d.outcome, d.attempts) for d in await store.describe(["a", "b", "c"])] == [
        (Status.GONE, "complete", 1)
    ] * 3
    (change,) = (change for change in changes if change.events)
    assert change.events == {(Event.COMPLETED, Status.COMPLETE): 3, (Event.SETTLED, Status.GONE): 3}
    assert change.durations_ms == {"received_to_started": [1_000] * 2, "received_to_finished": [1_000] * 3}
    row = store._store.db.execute("SELECT activation, record_key, holder, lease_end_mono_ms FROM inflight")
    assert set(row) == {(None, None, None, None)}


async def test_of_two_reports_of_one_lease_the_first_counts(store: Inflight) -> None:
    refs = await hold(store, "a", "b", "c")
    first, second, third = reports(refs)
    assert await store.report([first, first, second]) == [APPLIED, UNKNOWN, APPLIED]
    assert await store.report([third._replace(status=FAILURE), third]) == [APPLIED, SUPERSEDED]


async def test_what_is_plainly_complete_is_what_would_be_reported_of_each(store: Inflight) -> None:
    old, other = await hold(store, "a", "b")
    assert await store.complete([other, other, Ref("nobody", 1)]) == [APPLIED, UNKNOWN, UNKNOWN]
    await store.hand_back([old])
    (new,) = await claim(store, 1, "w2")
    assert await store.complete([old, new.ref]) == [SUPERSEDED, APPLIED]
    assert [d.outcome for d in await store.describe(["a", "b"])] == ["complete"] * 2


async def test_an_older_fence_is_superseded_among_others_that_count(store: Inflight) -> None:
    old, other = await hold(store, "a", "b")
    await store.hand_back([old])
    (new,) = await claim(store, 1, "w2")
    given = [*reports([old, other]), *reports([new.ref])]
    assert await store.report(given) == [SUPERSEDED, APPLIED, APPLIED]


async def test_a_row_that_a_switch_dropped_meanwhile_takes_no_neighbour_along(store: Inflight) -> None:
    refs = await hold(store, "a", "b")
    await store.insert([arrival("killed", taskname="other")])
    refs += [lease.ref for lease in await claim(store, 1)]
    await store.put_switch(Switch(SwitchKind.KILLSWITCH, "shop", "mail", "other"))
    await store.apply_switches(0, 100)
    assert await store.start(refs) == [APPLIED, APPLIED, UNKNOWN]
    assert await store.report(reports(refs)) == [APPLIED, APPLIED, UNKNOWN]


async def test_a_start_that_comes_again_is_looked_up(store: Inflight) -> None:
    (ref,) = await hold(store, "a")
    assert await store.start([ref, ref]) == [APPLIED, APPLIED]
    await store.cancel(["a"], "no need")
    assert await store.start([ref]) == [UNKNOWN]


async def test_the_deadline_runs_from_the_start_of_each(store: Inflight, clock: FixedClock) -> None:
    await store.insert([arrival("short", processing_deadline_s=1), arrival("long", processing_deadline_s=9)])
    refs = [lease.ref for lease in await claim(store, 2)]
    clock.mono_ms += 60_000
    assert await store.start(refs) == [APPLIED, APPLIED]
    clock.mono_ms += 5_000
    assert await store.end_overdue(10) == 1
    assert await store.report(reports(refs)) == [APPLIED, APPLIED]  # late, but nobody else has it


async def test_a_commit_that_failed_leaves_them_held(store: Inflight) -> None:
    refs = await hold(store, "a", "b")
    store._store.db.set_commit_hook(lambda: True)  # turns every COMMIT into a ROLLBACK
    with pytest.raises(Exception, match="Constraint"):
        await store.report(reports(refs))
    store._store.db.set_commit_hook(None)
    check(store)
    assert await store.report(reports(refs)) == [APPLIED, APPLIED]


async def test_more_than_are_remembered(store: Inflight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MAX_REMEMBERED", 2)
    refs = [*await hold(store, "a", "b", "c"), *await hold(store, "d")]
    assert await store.report(reports(refs)) == [APPLIED] * 4


async def test_unary_leases_that_complete_together_started_when_they_were_handed_out(
    store: Inflight, clock: FixedClock
) -> None:
    changes: list[Changes] = []
    await store.insert([arrival(id_) for id_ in ("a", "b", "stream")])
    began_ms = clock.wall_ms
    unary = [lease.id for lease in await claim(store, 2, kind=LeaseKind.UNARY)]
    streamed = [lease.id for lease in await claim(store, 1)]
    clock.wall_ms += 500
    store.observers.append(changes.append)
    said = [Report(id_, None, COMPLETE) for id_ in (*unary, *streamed)]
    assert await store.report(said) == [APPLIED, APPLIED, SUPERSEDED]  # a stream's result names its fence
    (change,) = changes
    assert change.durations_ms["received_to_finished"] == [500] * 2
    assert not change.durations_ms["received_to_started"]
    query = "SELECT started_at_ms, finished_at_ms, attempts FROM inflight WHERE status = 12"
    assert list(store._store.db.execute(query)) == [(began_ms, began_ms + 500, 1)] * 2


async def test_reports_and_claims_are_one_write(store: Inflight) -> None:
    changes: list[Changes] = []
    await store.insert([arrival(f"{n}") for n in range(6)])
    (first,) = await claim(store, 1, kind=LeaseKind.UNARY)
    store.observers.append(changes.append)
    wanted = ClaimRequest(2, LeaseKind.UNARY)
    other = ClaimRequest(9, LeaseKind.UNARY, application="nobody's")
    said = [Report(first.id, None, COMPLETE), Report("never heard of", None, COMPLETE)]
    verdicts, (found, nothing) = await store.report_and_claim(said, [wanted, other])
    assert verdicts == [APPLIED, UNKNOWN]
    assert [lease.id for lease in found.leases] == ["1", "2"]
    assert nothing.leases == []
    assert len(changes) == 1


async def test_claims_that_go_together_pass_over_no_more_than_one_claim_may(
    store: Inflight, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handouts, "MAX_EXPIRED_PER_CLAIM", 3)
    for number in range(10):
        late = [arrival(f"{number} {n}", expires_s=5, dead_letter=False) for n in range(3)]
        await store.insert([*late, arrival(f"good {number}")])
    clock.wall_ms += 60_000
    requests = [ClaimRequest(8, LeaseKind.UNARY), ClaimRequest(1, LeaseKind.UNARY, application="shop")]
    _, claims = await store.report_and_claim([], requests)
    assert store.counts()[Status.GONE] <= 2 * 3
    assert [claimed.cut_short for claimed in claims] == [True, True]
    for claimed, request in zip(claims, requests, strict=True):
        assert len(claimed.leases) < request.limit


async def test_in_trouble_reports_are_tried_and_nothing_is_claimed(store: Inflight) -> None:
    await store.insert([arrival("a"), arrival("b")])
    await claim(store, 1, kind=LeaseKind.UNARY)
    store._store.trouble = "the disk is full"
    said = [Report("a", None, COMPLETE)]
    verdicts, (found,) = await store.report_and_claim(said, [ClaimRequest(1, LeaseKind.UNARY)])
    assert (verdicts, found.leases) == ([APPLIED], [])


async def test_rows_beside_each_other_are_completed_by_the_statement_for_runs(
    store: Inflight, clock: FixedClock
) -> None:
    names = [f"{n}" for n in range(40)]
    refs = await hold(store, *names)
    clock.wall_ms += 1
    other = await hold(store, "other")  # beside the rest, under a fence that is not
    assert held._runs(store._leases._held._found([*refs, *other]) or []) == [
        held.Run(1, 40, 1, refs[0].fence - 1),
        held.Run(41, 41, 1, other[0].fence - 41),
    ]
    pick = Random(1)
    scattered = pick.sample(refs, 40)
    left = scattered.pop()
    assert await store.complete(scattered) == [APPLIED] * 39
    described = {d.id: d.status for d in await store.describe(names)}
    assert described.pop(left.id) is Status.PROCESSING, "one between the others that was not named"
    assert set(described.values()) == {Status.GONE}
    assert await store.complete([left, *other]) == [APPLIED] * 2


async def test_nothing_to_complete_is_complete(store: Inflight) -> None:
    assert await store.complete([]) == []


async def test_a_row_handed_out_again_spoils_no_run(store: Inflight) -> None:
    names = [f"{n}" for n in range(40)]
    refs = await hold(store, *names)
    await store.hand_back([refs[20]])
    (again,) = await claim(store, 1, "w2")
    store._leases._held.remember([((refs[20].id, refs[20].fence), (21, 1, refs[20].fence, 0, False))])
    assert await store.complete(refs) == [APPLIED] * 20 + [SUPERSEDED] + [APPLIED] * 19
    assert await store.complete([again.ref]) == [APPLIED]


@pytest.mark.parametrize("seed", range(6))
async def test_together_or_one_by_one_is_the_same(tmp_path: Path, clock: FixedClock, seed: int) -> None:
    pick = Random(seed)
    async with opened(tmp_path, clock) as quick, opened(tmp_path, clock, "slow") as slow:
        slow._leases._held.remember = lambda rows: None  # type: ignore[method-assign]
        held: list[Ref] = []
        for step in range(60):
            clock.mono_ms += pick.choice([0, 10, 4_000])
            clock.wall_ms += 10
            some = [ref for ref in held if pick.random() < 0.4]
            act = pick.choice(
                ["insert", "claim", "start", "report", "back", "overdue", "reconcile", "cancel"]
            )
            results = []
            for store in (quick, slow):
                match act:
                    case "insert":
                        once = step % 3 == 0
                        names = [f"{step}.{n}" for n in range(5)]
                        new = [arrival(n, at_most_once=once, namespace=f"n{step % 2}") for n in names]
                        results.append(repr(await store.insert(new)))
                    case "claim":
                        kind = LeaseKind.STREAM if step % 3 else LeaseKind.UNARY
                        leases = await claim(store, 6, "w1" if step % 2 else "w2", kind)
                        results.append([lease.ref for lease in leases])
                    case "start":
                        results.append(await store.start(some))
                    case "report":
                        statuses = Random(step).choices([*ReportStatus, *[COMPLETE] * 20], k=len(some))
                        by_id = Random(-step).choices([True, False], k=len(some))
                        said = [
                            Report(r.id, None if named else r.fence, s)
                            for r, s, named in zip(some, statuses, by_id, strict=True)
                        ]
                        results.append(await store.report(said))
                    case "back":
                        results.append(await store.hand_back(some[:2]))
                    case "overdue":
                        results.append(await store.end_overdue(3))
                    case "reconcile":
                        results.append(await store.reconcile("w1", held[-4:]) if step % 4 == 0 else 0)
                    case "cancel":
                        results.append(await store.cancel([ref.id for ref in some[:1]], "why"))
            assert results[0] == results[1]
            if act == "claim":
                held += results[0]
            assert rows(quick) == rows(slow)


def rows(inflight: Inflight) -> list[Any]:
    """What anybody reads of them; that a tombstone's lease was counted and started is read by nobody."""
    columns = (
        "id, status, lane, seq, activation, attempts, fence, holder, started_at_ms, lease_end_mono_ms, "
        "reason, error, outcome, finished_at_ms, iif(status = 12, 0, counted), iif(status = 12, 0, started)"
    )
    return list(inflight._store.db.execute(f"SELECT {columns} FROM inflight ORDER BY row"))
