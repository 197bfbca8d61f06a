"""Heartbeats in the store: a task's own sign of life moves its deadline, though not for ever."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import arrival

from taskd.activation.lifecycle import Status
from taskd.inflight import heartbeats as heartbeats_module
from taskd.inflight.arrivals import Arrivals
from taskd.inflight.base import (
    ClaimRequest,
    Description,
    Lease,
    LeaseKind,
    Policy,
    Ref,
    Report,
    ReportStatus,
    Verdict,
)
from taskd.inflight.departures import Departures
from taskd.inflight.handouts import Handouts
from taskd.inflight.heartbeats import Extending, Heartbeat
from taskd.inflight.held import HeldRows
from taskd.inflight.leases import Leases
from taskd.inflight.sqlite import SqliteStore
from taskd.inflight.writer import Inflight, open_inflight
from taskd.testing.clock import FixedClock

APPLIED, SUPERSEDED, UNKNOWN = Verdict.APPLIED, Verdict.SUPERSEDED, Verdict.UNKNOWN
DEADLINE_MS, GRACE_MS = 10_000, 3_000

Opener = Callable[..., AbstractAsyncContextManager[Inflight]]


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture(params=["inline", "threaded"])
def opened(tmp_path: Path, clock: FixedClock, request: pytest.FixtureRequest) -> Opener:
    def open_(**policy: Any) -> AbstractAsyncContextManager[Inflight]:
        inline = request.param == "inline"
        return open_inflight(tmp_path / "store.sqlite", clock, Policy(**policy), inline=inline)

    return open_


@pytest.fixture
async def store(opened: Opener) -> AsyncIterator[Inflight]:
    async with opened() as inflight:
        yield inflight


async def handed_out(store: Inflight, id_: str = "a", *, started: bool = True, **changes: Any) -> Lease:
    await store.insert([arrival(id_, **changes)])
    (lease,) = await store.claim(ClaimRequest(1, LeaseKind.STREAM, holder="w1"))
    if started:
        assert await store.start([lease.ref]) == [APPLIED]
    return lease


async def left_ms(store: Inflight, id_: str = "a") -> int | None:
    return (await look(store, id_)).deadline_in_ms


async def look(store: Inflight, id_: str = "a") -> Description:
    (found,) = await store.describe([id_])
    return found


async def test_a_heartbeat_begins_the_deadline_anew(store: Inflight, clock: FixedClock) -> None:
    lease = await handed_out(store)
    clock.advance(9)
    assert await left_ms(store) == DEADLINE_MS + GRACE_MS - 9_000
    assert await store.heartbeat([Heartbeat(lease.ref)]) == [APPLIED]
    assert await left_ms(store) == DEADLINE_MS + GRACE_MS
    clock.advance(12.9)
    assert await store.end_overdue(10) == 0
    clock.advance(0.1)
    assert await store.end_overdue(10) == 1
    assert (await look(store)).status is Status.PENDING


async def test_heartbeats_never_lead_past_the_longest_deadline(opened: Opener, clock: FixedClock) -> None:
    async with opened(max_processing_deadline_ms=25_000) as store:
        lease = await handed_out(store)
        for _ in range(27):
            clock.advance(1)
            assert await store.end_overdue(10) == 0
            assert await store.heartbeat([Heartbeat(lease.ref)]) == [APPLIED]
        clock.advance(1)  # 25 s and the grace of 3 s since its START
        assert await store.end_overdue(10) == 1
        assert await store.heartbeat([Heartbeat(lease.ref)]) == [SUPERSEDED]


async def test_a_step_of_the_wall_clock_moves_no_deadline(opened: Opener, clock: FixedClock) -> None:
    async with opened(max_processing_deadline_ms=15_000) as store:
        lease = await handed_out(store)
        clock.wall_ms += -86_400_000
        clock.advance(9)
        await store.heartbeat([Heartbeat(lease.ref)])
        assert await left_ms(store) == 15_000 + GRACE_MS - 9_000
        clock.wall_ms += 2 * 86_400_000
        await store.heartbeat([Heartbeat(lease.ref)])
        assert await left_ms(store) == 15_000 + GRACE_MS - 9_000


async def test_a_heartbeat_before_its_start_is_a_start(store: Inflight, clock: FixedClock) -> None:
    lease = await handed_out(store, started=False)
    assert await left_ms(store) is None
    assert await store.heartbeat([Heartbeat(lease.ref)]) == [APPLIED]
    found = await look(store)
    assert (found.attempts, found.deadline_in_ms) == (1, DEADLINE_MS + GRACE_MS)
    assert await store.start([lease.ref]) == [APPLIED]
    assert (await look(store)).attempts == 1


async def test_who_lost_its_lease_is_told_and_moves_nothing(store: Inflight, clock: FixedClock) -> None:
    older = await handed_out(store)
    clock.advance(13)
    assert await store.end_overdue(10) == 1
    (newer,) = await store.claim(ClaimRequest(1, LeaseKind.STREAM, holder="w2"))
    await store.start([newer.ref])
    clock.advance(4)
    beats = [Heartbeat(older.ref, 999, "late"), Heartbeat(Ref("nobody", 1), 1, "who?")]
    assert await store.heartbeat(beats) == [SUPERSEDED, UNKNOWN]
    found = await look(store)
    assert (found.worker, found.permille, found.deadline_in_ms) == (
        "w2",
        None,
        DEADLINE_MS + GRACE_MS - 4_000,
    )


async def test_operators_see_how_far_it_is(store: Inflight, clock: FixedClock) -> None:
    lease = await handed_out(store)
    found = await look(store)
    assert (found.permille, found.message, found.heartbeat_age_ms) == (None, "", None)
    assert (found.worker, found.fence, found.started_at_ms) == ("w1", lease.fence, clock.now().wall_ms)
    clock.advance(1)
    await store.heartbeat([Heartbeat(lease.ref, 250, "row 1 of 4")])
    clock.advance(2)
    found = await look(store)
    assert (found.permille, found.message, found.heartbeat_age_ms) == (250, "row 1 of 4", 2_000)
    await store.heartbeat([Heartbeat(lease.ref)])
    found = await look(store)
    assert (found.permille, found.message, found.heartbeat_age_ms) == (250, "row 1 of 4", 0)


async def test_what_a_run_said_is_gone_with_it(store: Inflight, clock: FixedClock) -> None:
    lease = await handed_out(store)
    await store.heartbeat([Heartbeat(lease.ref, 900, "nearly done")])
    await store.report([Report("a", lease.fence, ReportStatus.CRASHED, error="died")])
    found = await look(store)
    assert (found.status, found.permille, found.worker, found.started_at_ms) == (Status.PENDING, None, "", 0)
    (again,) = await store.claim(ClaimRequest(1, LeaseKind.STREAM, holder="w1"))
    await store.heartbeat([Heartbeat(again.ref, message="from the beginning")])
    assert ((await look(store)).permille, (await look(store)).message) == (None, "from the beginning")
    await store.report([Report("a", again.fence, ReportStatus.COMPLETE)])
    found = await look(store)
    assert (found.status, found.message, found.deadline_in_ms) == (Status.GONE, "", None)
    assert store._progress._kept == {}


async def test_progress_is_kept_of_so_many_only(
    store: Inflight, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats_module, "MAX_KEPT", 2)
    leases = [await handed_out(store, id_) for id_ in "abc"]
    for index in (0, 1, 0, 2):  # b is silent for longest
        await store.heartbeat([Heartbeat(leases[index].ref, 1)])
    assert [(await look(store, id_)).permille for id_ in "abc"] == [1, None, 1]


async def test_after_a_restart_the_deadline_and_its_limit_begin_anew(
    opened: Opener, clock: FixedClock
) -> None:
    async with opened(max_processing_deadline_ms=15_000) as store:
        lease = await handed_out(store)
        clock.advance(9)
        await store.heartbeat([Heartbeat(lease.ref)])
    clock.advance(100)
    async with opened(max_processing_deadline_ms=15_000) as store:
        assert await left_ms(store) == DEADLINE_MS + GRACE_MS
        clock.advance(9)
        await store.heartbeat([Heartbeat(lease.ref)])
        assert await left_ms(store) == 15_000 + GRACE_MS - 9_000


@settings(max_examples=60, deadline=None)
@given(
    steps_ms=st.lists(st.integers(0, 12_000), min_size=1, max_size=12),
    cap_ms=st.none() | st.integers(1_000, 40_000),
)
def test_a_lease_ends_a_deadline_after_its_last_heartbeat_or_at_the_limit(
    tmp_path_factory: pytest.TempPathFactory, steps_ms: list[int], cap_ms: int | None
) -> None:
    clock = FixedClock()
    folder = tmp_path_factory.mktemp("store")
    core = SqliteStore(folder / "s.sqlite", clock.now(), Policy(max_processing_deadline_ms=cap_ms))
    held, departures = HeldRows(core), Departures(core)
    leases = Leases(core, departures, held)
    extending = Extending(core, leases)
    Arrivals(core, departures).insert([arrival("a")], clock.now())
    request = ClaimRequest(1, LeaseKind.STREAM, holder="w")
    (lease,) = Handouts(core, departures, held).claim(request, clock.now())
    leases.start([lease.ref], clock.now())
    start_ms = clock.now().mono_ms
    deadline_ms = min(DEADLINE_MS, cap_ms or DEADLINE_MS)
    end_ms = start_ms + deadline_ms
    for step_ms in steps_ms:
        clock.advance(step_ms / 1000)
        now = clock.now()
        extending.extend([lease.ref], now)
        end_ms = max(end_ms, now.mono_ms + deadline_ms)
        end_ms = end_ms if cap_ms is None else min(end_ms, start_ms + cap_ms)
        (stored,) = core.db.execute("SELECT lease_end_mono_ms FROM inflight").fetchone()
        assert stored == end_ms + GRACE_MS
    core.close()
