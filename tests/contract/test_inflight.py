"""What the store of in-flight activations does, whether it writes inline or in a thread of its own."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from rows import arrival, check

from taskd.activation.lifecycle import Status
from taskd.clock import Now
from taskd.errors import StartupError, StoreError
from taskd.inflight import handouts
from taskd.inflight import sqlite as sqlite_module
from taskd.inflight.base import (
    ClaimRequest,
    Description,
    Inserted,
    Lease,
    LeaseKind,
    Policy,
    Ref,
    Report,
    ReportStatus,
    Settlement,
    Verdict,
)
from taskd.inflight.presence import Presence
from taskd.inflight.schema import SCHEMA_VERSION
from taskd.inflight.writer import Inflight, open_inflight
from taskd.testing.clock import START_WALL_MS, FixedClock
from taskd.wire.generated.sentry_protos.taskbroker.v1 import RetryState, TaskActivation

APPLIED, SUPERSEDED, UNKNOWN = Verdict.APPLIED, Verdict.SUPERSEDED, Verdict.UNKNOWN


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock(mono_ms=5_000_000)


@pytest.fixture(params=["inline", "threaded"])
def inline(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "inline")


Opener = Callable[..., AbstractAsyncContextManager[Inflight]]


@pytest.fixture
def opened(tmp_path: Path, clock: FixedClock, inline: bool) -> Opener:
    """Opens the test's one store file, again if asked again."""

    def open_(**policy: Any) -> AbstractAsyncContextManager[Inflight]:
        return open_inflight(tmp_path / "store.sqlite", clock, Policy(**policy), inline=inline)

    return open_


@pytest.fixture
async def store(opened: Opener) -> AsyncIterator[Inflight]:
    async with opened() as inflight:
        yield inflight
        check(inflight)


async def put(inflight: Inflight, *ids: str, **changes: Any) -> Inserted:
    return await inflight.insert([arrival(id_, **changes) for id_ in ids])


async def stream(inflight: Inflight, limit: int = 10, holder: str = "w1", **filters: Any) -> list[Lease]:
    return await inflight.claim(ClaimRequest(limit, LeaseKind.STREAM, holder=holder, **filters))


async def unary(inflight: Inflight, limit: int = 1, **filters: Any) -> list[Lease]:
    return await inflight.claim(ClaimRequest(limit, LeaseKind.UNARY, **filters))


async def one(leases: Awaitable[list[Lease]]) -> Lease:
    (lease,) = await leases
    return lease


async def say(inflight: Inflight, lease: Lease, status: ReportStatus, **more: Any) -> Verdict:
    (verdict,) = await inflight.report([Report(lease.id, lease.fence, status, **more)])
    return verdict


async def say_unary(inflight: Inflight, id_: str, status: ReportStatus, **more: Any) -> Verdict:
    (verdict,) = await inflight.report([Report(id_, None, status, **more)])
    return verdict


async def look(inflight: Inflight, id_: str) -> Description:
    (description,) = await inflight.describe([id_])
    return description


def ids(leases: list[Lease]) -> list[str]:
    return [lease.id for lease in leases]


COMPLETE, FAILURE, RETRY, CRASHED, INTERRUPTED = ReportStatus


# ---- arrivals


async def test_arrivals_are_stored_and_handed_out_as_they_came(store: Inflight) -> None:
    assert await put(store, "a", "b") == Inserted(pending=2)
    leases = await stream(store)
    assert [(lease.id, lease.activation, lease.deadline_ms) for lease in leases] == [
        ("a", b"a", 10_000),
        ("b", b"b", 10_000),
    ]
    assert store.counts() == Counter({Status.PROCESSING: 2})


async def test_a_known_id_is_passed_over_whatever_became_of_it(store: Inflight) -> None:
    await put(store, "a", "b")
    assert await put(store, "a", "c", "c") == Inserted(pending=1, duplicate=2)
    lease = await one(stream(store, 1))
    await say(store, lease, COMPLETE)
    assert await put(store, "a") == Inserted(duplicate=1)
    assert (await look(store, "a")).status is Status.GONE


async def test_a_delayed_one_waits_for_its_time_and_goes_to_the_end(
    store: Inflight, clock: FixedClock
) -> None:
    assert await put(store, "late", delay_s=60) == Inserted(delayed=1)
    await put(store, "now")
    assert ids(await stream(store)) == ["now"]
    clock.advance(59.999)
    assert await store.become_due(10) == 0
    await put(store, "first")
    clock.advance(0.001)
    assert await store.become_due(10) == 1
    assert ids(await stream(store)) == ["first", "late"]


async def test_a_delay_that_is_over_at_arrival_is_none(store: Inflight) -> None:
    assert await put(store, "a", delay_s=60, received_at_ms=START_WALL_MS - 60_000) == Inserted(pending=1)


async def test_due_rows_come_in_the_order_they_become_due(store: Inflight, clock: FixedClock) -> None:
    await put(store, "c", delay_s=3)
    await put(store, "a", delay_s=1)
    await put(store, "b", delay_s=2)
    clock.advance(5)
    assert await store.become_due(2) == 2
    assert await store.become_due(2) == 1
    assert ids(await stream(store)) == ["a", "b", "c"]


async def test_a_delay_is_shortened_to_the_longest_allowed(opened: Opener, clock: FixedClock) -> None:
    async with opened(max_delay_ms=10_000) as store:
        inserted = await put(store, "a", delay_s=3_600)
        assert inserted == Inserted(delayed=1, shortened=("a",))
        assert await put(store, "a", delay_s=3_600) == Inserted(duplicate=1)
        assert await put(store, "b", delay_s=10) == Inserted(delayed=1)
        await store.become_due(0)
        clock.advance(9)
        assert await store.become_due(10) == 0
        clock.advance(1)
        assert await store.become_due(10) == 2


async def test_expired_at_arrival(store: Inflight) -> None:
    old = {"received_at_ms": START_WALL_MS - 10_000, "expires_s": 10}
    assert await put(store, "dead-lettered", **old) == Inserted(expired=1)
    assert await put(store, "discarded", dead_letter=False, **old) == Inserted(expired=1)
    assert await stream(store) == []
    (leaving,) = await store.leaving(10)
    assert (leaving.id, leaving.status, leaving.reason) == ("dead-lettered", Status.EXPIRED, "expired")
    gone = await look(store, "discarded")
    assert (gone.status, gone.outcome, gone.reason) == (Status.GONE, "expired", "expired")
    assert await put(store, "dead-lettered", "discarded", **old) == Inserted(duplicate=2)


async def test_undecodable_records_are_kept_for_their_dead_letter(store: Inflight) -> None:
    bad = arrival("raw", undecodable="no id", application="", namespace="", activation=b"\xff", offset=7)
    assert await store.insert([bad]) == Inserted(undecodable=1)
    (leaving,) = await store.leaving(10)
    assert (leaving.status, leaving.reason, leaving.error) == (Status.FAILURE, "undecodable", "no id")
    assert (leaving.activation, leaving.record_key, leaving.offset) == (b"\xff", b"key", 7)
    await store.settle([Settlement("raw", dead_lettered=True)])
    assert (await look(store, "raw")).dead_lettered


@pytest.mark.parametrize("ahead_ms", [None, 300_001])
async def test_received_in_no_time_or_far_ahead_counts_as_now(
    store: Inflight, clock: FixedClock, ahead_ms: int | None
) -> None:
    received = None if ahead_ms is None else START_WALL_MS + ahead_ms
    await put(store, "a", received_at_ms=received, expires_s=5)
    assert (await look(store, "a")).received_at_ms == START_WALL_MS
    clock.advance(5)
    assert await store.expire(10) == 1


async def test_longest_durations_and_numbers_fit(store: Inflight) -> None:
    century_s = 100 * 366 * 86_400
    changes = {
        "received_at_ms": START_WALL_MS + 300_000,
        "expires_s": century_s,
        "processing_deadline_s": century_s,
        "attempts": 2**32 - 1,
        "partition": 2**31 - 1,
        "offset": 2**63 - 1,
    }
    assert await put(store, "a\0b", "ü" * 500, **changes) == Inserted(pending=2)
    assert await put(store, "d", delay_s=century_s, **changes) == Inserted(delayed=1, beyond_expiry=("d",))
    assert len(await unary(store, 10)) == 2


async def test_deadline_defaults_and_cap(opened: Opener) -> None:
    async with opened(max_processing_deadline_ms=20_000) as store:
        await put(store, "none", processing_deadline_s=0)
        await put(store, "long", processing_deadline_s=3_600)
        assert [lease.deadline_ms for lease in await stream(store)] == [10_000, 20_000]


# ---- claims


async def test_claims_follow_the_order_of_arrival(store: Inflight) -> None:
    await put(store, *(f"{n:03}" for n in range(10)))
    assert ids(await stream(store, 3)) == ["000", "001", "002"]
    assert ids(await stream(store, 3)) == ["003", "004", "005"]


async def test_lanes_take_turns_within_a_claim_and_between_claims(store: Inflight) -> None:
    for namespace in ("a", "b", "c"):
        await put(store, *(f"{namespace}{n}" for n in range(4)), namespace=namespace)
    assert ids(await stream(store, 6)) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    singles = [(await one(stream(store, 1))).id for _ in range(6)]
    assert singles == ["a2", "b2", "c2", "a3", "b3", "c3"]


async def test_one_full_lane_gives_what_others_do_not(store: Inflight) -> None:
    await put(store, "a0", namespace="a")
    await put(store, *(f"b{n}" for n in range(9)), namespace="b")
    assert ids(await stream(store, 8)) == ["a0", *(f"b{n}" for n in range(7))]


async def test_filters(store: Inflight) -> None:
    await put(store, "none", application="", namespace="x")
    await put(store, "shop", application="shop", namespace="x")
    await put(store, "other", application="shop", namespace="y")

    async def found(**filters: Any) -> set[str]:
        found = store.claimable(filters.get("application"), filters.get("namespaces", ()))
        leases = await stream(store, **filters)
        assert found is bool(leases)
        await store.hand_back([lease.ref for lease in leases])
        return set(ids(leases))

    assert await found() == {"none", "shop", "other"}
    assert await found(application="") == {"none"}
    assert await found(application="shop") == {"shop", "other"}
    assert await found(application="sho") == set()
    assert await found(namespaces=("x",)) == {"none", "shop"}
    assert await found(application="shop", namespaces=("y", "z")) == {"other"}
    assert await found(application="", namespaces=("y",)) == set()


async def test_fences_grow_and_never_fall_behind_the_wall_clock(store: Inflight, clock: FixedClock) -> None:
    await put(store, "a")
    fences = []
    for _ in range(3):
        lease = await one(stream(store))
        fences.append(lease.fence)
        await store.hand_back([lease.ref])
    assert fences == [START_WALL_MS * 1000, START_WALL_MS * 1000 + 1, START_WALL_MS * 1000 + 2]
    clock.wall_ms -= 3_600_000
    assert (await one(stream(store))).fence == START_WALL_MS * 1000 + 3


async def test_a_claim_is_bound_in_bytes(store: Inflight) -> None:
    await put(store, "big", activation=b"x" * 1_000)
    await put(store, *"abc", activation=b"x" * 40)
    assert ids(await stream(store, max_bytes=100)) == ["big"]
    assert ids(await stream(store, max_bytes=100)) == ["a", "b"]
    assert ids(await stream(store, max_bytes=100)) == ["c"]


async def test_a_large_one_does_not_starve_behind_other_lanes(store: Inflight) -> None:
    await put(store, "big", activation=b"x" * 1_000, namespace="large")
    await put(store, *(f"s{n}" for n in range(6)), activation=b"x" * 40, namespace="small")
    await put(store, *(f"t{n}" for n in range(6)), activation=b"x" * 40, namespace="tiny")
    seen = [ids(await stream(store, 2, max_bytes=100)) for _ in range(4)]
    assert ["big"] in [batch[:1] for batch in seen]


async def test_expired_rows_are_never_handed_out(store: Inflight, clock: FixedClock) -> None:
    await put(store, *(f"x{n}" for n in range(5)), expires_s=10)
    await put(store, "y", dead_letter=False, expires_s=10)
    await put(store, "live", expires_s=11)
    clock.advance(10)
    leases = await stream(store, 2)
    assert [(lease.id, lease.expires_in_ms) for lease in leases] == [("live", 1_000)]
    assert store.counts() == Counter({Status.EXPIRED: 5, Status.GONE: 1, Status.PROCESSING: 1})


async def test_expiry_rests_after_a_step_of_the_clock(store: Inflight, clock: FixedClock) -> None:
    await put(store, "a", expires_s=10)
    clock.wall_ms += 3_600_000
    clock.may_expire = False
    assert await store.expire(10) == 0
    lease = await one(stream(store))
    assert lease.expires_in_ms is None  # else its worker would give it back at once, again and again


async def test_expire_takes_waiting_and_delayed_rows(store: Inflight, clock: FixedClock) -> None:
    await put(store, "waits", expires_s=10)
    await put(store, "delayed", expires_s=10, delay_s=60)
    await put(store, "runs", expires_s=10, namespace="other")
    await one(stream(store, namespaces=("other",)))
    clock.advance(10)
    assert await store.expire(1) == 1
    assert await store.expire(10) == 1
    assert store.counts() == Counter({Status.EXPIRED: 2, Status.PROCESSING: 1})


# ---- attempts


async def test_stream_counts_at_start(store: Inflight) -> None:
    await put(store, "a")
    lease = await one(stream(store))
    assert (await look(store, "a")).attempts == 0
    assert await store.start([lease.ref, lease.ref]) == [APPLIED, APPLIED]
    assert (await look(store, "a")).attempts == 1


async def test_unary_counts_at_hand_out(store: Inflight) -> None:
    await put(store, "a")
    await one(unary(store))
    assert (await look(store, "a")).attempts == 1


async def test_at_most_once_counts_at_hand_out(store: Inflight) -> None:
    await put(store, "a", at_most_once=True)
    lease = await one(stream(store))
    assert (await look(store, "a")).attempts == 1
    await store.start([lease.ref])
    assert (await look(store, "a")).attempts == 1


@pytest.mark.parametrize("at_most_once", [False, True])
async def test_a_hand_back_undoes_the_attempt(store: Inflight, at_most_once: bool) -> None:
    await put(store, "a", "b", at_most_once=at_most_once)
    for claim in (stream, unary, stream):
        lease = await one(claim(store, 1))
        assert await store.hand_back([lease.ref]) == [APPLIED]
        assert await store.hand_back([lease.ref]) == [SUPERSEDED]
        assert (await look(store, "a")).attempts == 0
    assert ids(await stream(store)) == ["a", "b"]  # it kept its place


async def test_what_started_is_not_handed_back(store: Inflight) -> None:
    await put(store, "a")
    lease = await one(stream(store))
    await store.start([lease.ref])
    assert await store.hand_back([lease.ref]) == [SUPERSEDED]
    assert store.counts() == Counter({Status.PROCESSING: 1})


async def test_a_result_without_start_counts_as_one(store: Inflight) -> None:
    await put(store, "a")
    await say(store, await one(stream(store)), RETRY)
    assert (await store.leaving(1))[0].attempts == 1


async def test_a_late_start_is_refused(store: Inflight) -> None:
    await put(store, "a")
    lease = await one(stream(store))
    await store.hand_back([lease.ref])
    newer = await one(stream(store))
    assert await store.start([lease.ref, newer.ref, Ref("nobody", 1)]) == [SUPERSEDED, APPLIED, UNKNOWN]


# ---- reports


async def test_complete(store: Inflight, clock: FixedClock) -> None:
    await put(store, "a")
    lease = await one(stream(store))
    clock.advance(2)
    assert await say(store, lease, COMPLETE) is APPLIED
    assert await look(store, "a") == Description(
        "a",
        Status.GONE,
        "complete",
        attempts=1,
        received_at_ms=START_WALL_MS,
        finished_at_ms=START_WALL_MS + 2_000,
    )
    assert await say(store, lease, COMPLETE) is UNKNOWN
    assert await say(store, Lease("nobody", 1, b"", 1, None), COMPLETE) is UNKNOWN


async def test_failure_is_kept_for_its_dead_letter_or_discarded(store: Inflight) -> None:
    await put(store, "a", namespace="x", attempts=2)
    await put(store, "b", namespace="y", dead_letter=False)
    for lease in await stream(store):
        await say(store, lease, FAILURE, reason="timeout", error="took too long")
    (leaving,) = await store.leaving(10)
    assert (leaving.id, leaving.status, leaving.reason, leaving.error, leaving.retry_attempts) == (
        "a", Status.FAILURE, "timeout", "took too long", 2
    )  # fmt: skip
    gone = await look(store, "b")
    assert (gone.status, gone.outcome, gone.reason, gone.error) == (
        Status.GONE, "failed", "timeout", "took too long"
    )  # fmt: skip


async def test_retry_settle_and_continued_as(store: Inflight) -> None:
    await put(store, "a", attempts=3)
    lease = await one(stream(store))
    await say(store, lease, RETRY, max_attempts=2**32 - 1, delay_on_retry_s=30)
    (leaving,) = await store.leaving(10)
    assert (leaving.status, leaving.retry_attempts, leaving.max_attempts, leaving.delay_on_retry_s) == (
        Status.RETRY, 3, 2**32 - 1, 30
    )  # fmt: skip
    assert (leaving.activation, leaving.namespace, leaving.topic) == (b"a", "mail", "taskd")
    await store.settle([Settlement("a", continued_as="a2")])
    gone = await look(store, "a")
    assert (gone.status, gone.outcome, gone.continued_as) == (Status.GONE, "retried", "a2")
    await store.settle([Settlement("a", continued_as="a3"), Settlement("nobody")])  # twice is harmless
    assert (await look(store, "a")).continued_as == "a2"
    assert await store.leaving(10) == []


@pytest.mark.parametrize(
    ("state", "reported", "stopped"),
    [
        ({"attempts": 5, "max_attempts": 3}, None, False),
        ({"attempts": 6, "max_attempts": 3}, None, True),
        ({"attempts": 6, "max_attempts": 3}, 4, False),
        ({"attempts": 7, "max_attempts": 3}, 4, True),
        ({"attempts": 1_000}, None, False),
        ({"attempts": 2**32 - 1, "max_attempts": 2**32 - 1}, None, False),
    ],
)
async def test_a_loop_of_retries_is_stopped_when_that_is_wanted(
    opened: Opener, state: dict[str, int], reported: int | None, stopped: bool
) -> None:
    """Three beyond max_attempts may be another way of counting."""
    activation = bytes(TaskActivation(id="a", taskname="t", retry_state=RetryState(**state)))
    async with opened(enforce_max_attempts=True) as store:
        await put(store, "a", attempts=state["attempts"], dead_letter=False, activation=activation)
        await say(store, await one(unary(store)), RETRY, max_attempts=reported)
        (leaving,) = await store.leaving(10)
        assert leaving.status is (Status.FAILURE if stopped else Status.RETRY)
        assert leaving.reason == ("max_attempts" if stopped else "retry")
        check(store)
    async with opened(enforce_max_attempts=False) as store:
        await put(store, "b", activation=activation.replace(b"\x0a\x01a", b"\x0a\x01b"), dead_letter=False)
        await say(store, await one(unary(store)), RETRY)
        assert (await store.leaving(10))[-1].status is Status.RETRY


async def test_what_is_not_leaving_cannot_be_settled(store: Inflight) -> None:
    await put(store, "a")
    with pytest.raises(Exception, match="an activation that is pending; what can"):
        await store.settle([Settlement("a")])
    assert store.counts() == Counter({Status.PENDING: 1})


async def test_a_superseded_fence_is_ignored(store: Inflight) -> None:
    await put(store, "a")
    old = await one(stream(store, holder="w1"))
    await store.reconcile("w1", [])
    new = await one(stream(store, holder="w2"))
    assert await say(store, old, COMPLETE) is SUPERSEDED
    assert await store.hand_back([old.ref]) == [SUPERSEDED]
    assert await say(store, new, COMPLETE) is APPLIED


@pytest.mark.parametrize("status", [COMPLETE, FAILURE, RETRY, CRASHED])
async def test_a_late_result_counts_while_nobody_else_has_the_row(
    store: Inflight, status: ReportStatus
) -> None:
    await put(store, "a")
    lease = await one(stream(store))
    await store.reconcile("w1", [])
    assert store.counts() == Counter({Status.PENDING: 1})
    assert await say(store, lease, status) is APPLIED
    kept = status is CRASHED  # it waits already, which is all a crash asks for
    assert store.claimable(None, ()) is kept


async def test_unary_status_counts_when_the_newest_lease_is_unary(store: Inflight, clock: FixedClock) -> None:
    await put(store, "a", "b", "c")
    assert await say_unary(store, "a", COMPLETE) is SUPERSEDED  # never handed out
    for _ in range(2):
        await unary(store)
    await stream(store)
    assert await say_unary(store, "a", COMPLETE) is APPLIED
    assert await say_unary(store, "c", COMPLETE) is SUPERSEDED  # a stream's
    clock.advance(13)
    assert await store.end_overdue(10) == 1
    assert await say_unary(store, "b", RETRY) is APPLIED  # pending again, nobody else was given it
    assert await say_unary(store, "nobody", COMPLETE) is UNKNOWN
    assert await say_unary(store, "a", COMPLETE) is UNKNOWN


async def test_a_stream_after_a_unary_lease_supersedes_it(store: Inflight, clock: FixedClock) -> None:
    await put(store, "a")
    await unary(store)
    clock.advance(13)
    await store.end_overdue(10)
    lease = await one(stream(store))
    assert await say_unary(store, "a", COMPLETE) is SUPERSEDED
    assert await say(store, lease, COMPLETE) is APPLIED


async def test_crashes_decide_by_the_attempts_made(opened: Opener) -> None:
    async with opened(max_processing_attempts=2) as store:
        await put(store, "a")
        assert await say(store, await one(stream(store)), CRASHED, error="SIGSEGV") is APPLIED
        assert store.counts() == Counter({Status.PENDING: 1})
        await say(store, await one(stream(store)), CRASHED, error="SIGSEGV")
        (leaving,) = await store.leaving(1)
        assert (leaving.reason, leaving.error, leaving.attempts) == ("poison", "SIGSEGV", 2)
        check(store)


async def test_what_ends_its_process_again_and_again_is_poison(opened: Opener) -> None:
    async with opened(max_processing_attempts=9, max_crashes=2) as store:
        await put(store, "a", dead_letter=True)
        await say(store, await one(stream(store)), CRASHED, error="SIGSEGV")
        await say(store, await one(stream(store)), INTERRUPTED)
        assert store.counts() == Counter({Status.PENDING: 1}), "only crashes count"
        await say(store, await one(stream(store)), CRASHED, error="out of memory")
        (leaving,) = await store.leaving(1)
        assert (leaving.status, leaving.reason, leaving.error) == (Status.FAILURE, "poison", "out of memory")
        check(store)


async def test_what_was_interrupted_waits_again_and_the_attempt_does_not_count(opened: Opener) -> None:
    async with opened(max_processing_attempts=1) as store:
        await put(store, "a")
        lease = await one(stream(store))
        await store.start([lease.ref])
        for _ in range(2):
            assert await say(store, lease, INTERRUPTED, error="its neighbour blocked the loop") is APPLIED
            assert store.counts() == Counter({Status.PENDING: 1})
            assert (await look(store, "a")).attempts == 0
            lease = await one(stream(store))
        await say(store, lease, CRASHED)
        assert store.counts() == Counter({Status.FAILURE: 1})
        check(store)


async def test_at_most_once_is_not_run_again_after_an_interruption(store: Inflight) -> None:
    await put(store, "a", at_most_once=True)
    lease = await one(stream(store))
    await say(store, lease, INTERRUPTED)
    (leaving,) = await store.leaving(1)
    assert leaving.reason == "at_most_once"


async def test_long_texts_are_cut(store: Inflight) -> None:
    await put(store, "a")
    await say(store, await one(stream(store)), FAILURE, reason="r" * 10_000, error="e" * 10_000_000)
    (leaving,) = await store.leaving(1)
    assert (len(leaving.reason), len(leaving.error)) == (64, 4_096)


async def test_reports_of_one_call_are_applied_in_turn(store: Inflight) -> None:
    await put(store, "a", "b")
    a, b = await stream(store)
    verdicts = await store.report(
        [
            Report("a", a.fence, COMPLETE),
            Report("b", b.fence + 1, COMPLETE),
            Report("a", a.fence, FAILURE),
            Report("b", b.fence, FAILURE),
        ]
    )
    assert verdicts == [APPLIED, SUPERSEDED, UNKNOWN, APPLIED]


# ---- leases end


async def test_a_unary_lease_ends_by_its_deadline(opened: Opener, clock: FixedClock) -> None:
    async with opened(max_processing_attempts=2) as store:
        await put(store, "a")
        for attempts in (1, 2):
            await unary(store)
            clock.advance(12.999)
            assert await store.end_overdue(10) == 0
            clock.advance(0.001)
            assert await store.end_overdue(10) == 1
            assert (await look(store, "a")).attempts == attempts
        (leaving,) = await store.leaving(1)
        assert (leaving.status, leaving.reason) == (Status.FAILURE, "deadline")
        check(store)


async def test_a_stream_lease_ends_a_deadline_after_its_start(store: Inflight, clock: FixedClock) -> None:
    await put(store, "a")
    lease = await one(stream(store))
    clock.advance(3_600)  # waits at its worker, whose heartbeats keep it
    assert await store.end_overdue(10) == 0
    await store.start([lease.ref])
    clock.advance(12)
    assert await store.start([lease.ref]) == [APPLIED]  # said again, it moves nothing
    clock.advance(1)
    assert await store.end_overdue(10) == 1
    assert store.counts() == Counter({Status.PENDING: 1})


async def test_many_overdue_are_ended_in_slices(store: Inflight, clock: FixedClock) -> None:
    await put(store, *(f"{n}" for n in range(5)))
    await unary(store, 5)
    clock.advance(60)
    assert [await store.end_overdue(2) for _ in range(4)] == [2, 2, 1, 0]


@pytest.mark.parametrize("how", ["deadline", "silence", "crash"])
async def test_at_most_once_never_waits_again(store: Inflight, clock: FixedClock, how: str) -> None:
    await put(store, "a", at_most_once=True)
    lease = await one(stream(store))
    if how == "deadline":
        clock.advance(13)
        assert await store.end_overdue(10) == 1
    elif how == "silence":
        assert await store.reconcile("w1", []) == 1
    else:
        await say(store, lease, CRASHED)
    (leaving,) = await store.leaving(1)
    assert (leaving.status, leaving.reason) == (Status.FAILURE, "at_most_once")
    assert await say(store, lease, COMPLETE) is SUPERSEDED


async def test_reconcile_ends_what_the_worker_does_not_name(store: Inflight) -> None:
    await put(store, *"abcd")
    a, b, c = await stream(store, 3, holder="w1")
    (d,) = await stream(store, 1, holder="w2")
    await store.start([b.ref])
    assert set(await store.holders()) == {"w1", "w2"}
    assert set(await store.held_ids(10)) == set("abcd")
    assert await store.reconcile("w1", [a.ref, Ref("c", c.fence - 1), d.ref]) == 2
    assert store.counts() == Counter({Status.PROCESSING: 2, Status.PENDING: 2})
    assert (await look(store, "b")).attempts == 1  # it had started
    assert (await look(store, "c")).attempts == 0
    assert set(await store.held_ids(10)) == {"a", "d"}
    assert await store.reconcile("nobody", []) == 0


def test_presence(clock: FixedClock) -> None:
    presence = Presence(clock)
    clock.advance(20)
    presence.seen("w1")
    clock.advance(10)
    assert presence.silent(["w1", "never-seen"], 30_000) == ["never-seen"]
    clock.advance(20)
    assert presence.silent(["w1"], 30_000) == ["w1"]


# ---- on the way out


async def test_stuck_rows_are_kept_out_of_the_way(store: Inflight) -> None:
    await put(store, "a", "b")
    for lease in await stream(store):
        await say(store, lease, FAILURE)
    await store.stick("a", "too large for the log")
    assert [row.id for row in await store.leaving(10)] == ["b"]
    stuck = await look(store, "a")
    assert (stuck.status, stuck.error) == (Status.FAILURE, "too large for the log")
    assert await put(store, "a") == Inserted(duplicate=1)


async def test_leaving_is_in_order_and_bounded(store: Inflight) -> None:
    await put(store, *"abc")
    for lease in reversed(await stream(store)):
        await say(store, lease, RETRY)
    assert [row.id for row in await store.leaving(2)] == ["a", "b"]


async def finish(inflight: Inflight, *ids_: str) -> None:
    await put(inflight, *ids_)
    for lease in await stream(inflight, len(ids_)):
        await say(inflight, lease, COMPLETE)


async def test_tombstones_are_forgotten_by_age(store: Inflight, clock: FixedClock) -> None:
    await finish(store, "a", "b", "c")
    clock.advance(60)
    await finish(store, "d")
    await put(store, "waits")
    clock.advance(540)
    assert await store.forget(600_000, 100, 2) == 2
    assert await store.forget(600_000, 100, 2) == 1
    assert await store.forget(600_000, 100, 2) == 0
    assert store.counts() == Counter({Status.GONE: 1, Status.PENDING: 1})
    assert await put(store, "a", "d") == Inserted(pending=1, duplicate=1)


async def test_tombstones_are_forgotten_by_count_oldest_first(store: Inflight, clock: FixedClock) -> None:
    for id_ in "abcde":
        await finish(store, id_)
        clock.advance(1)
    assert await store.forget(600_000, 2, 2) == 2
    assert await store.forget(600_000, 2, 2) == 1
    assert await store.forget(600_000, 2, 2) == 0
    assert (await look(store, "c")).status is None
    assert (await look(store, "d")).status is Status.GONE


async def test_room_of_what_left_is_free_again(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "KEPT_FREE_PAGES", 10)
    async with opened() as store:
        await put(store, *(f"{n}" for n in range(50)), activation=b"x" * 40_000)
        full_bytes = store.size_bytes()
        assert full_bytes > 50 * 40_000
        pages = store._store.db.pragma("page_count")
        for lease in await stream(store, 50):
            await say(store, lease, COMPLETE)
        assert store.size_bytes() < full_bytes / 4
        await store.forget(0, 0, 100)
        freed = [await store.shrink(100)]
        while freed[-1]:
            freed.append(await store.shrink(100))
        assert max(freed) == 100  # never much at once, so that no transaction is long
        assert store._store.db.pragma("page_count") < pages / 4
        check(store)


async def test_lanes_without_rows_are_forgotten(opened: Opener) -> None:
    async with opened() as store:
        for number in range(5):
            await put(store, f"{number}", namespace=f"made-up-{number}")
        await put(store, "kept", namespace="kept")
        for lease in await stream(store, 5):
            await say(store, lease, COMPLETE)
        assert await put(store, "0", "1", namespace="other, with ids that are known") == Inserted(duplicate=2)
        core = store._store
        assert len(core.lanes) == 6
        assert await store.forget(0, 0, 3) == 3
        assert await store.forget(0, 0, 3) == 2
        assert [lane.namespace for lane in core.lanes.values()] == ["kept"]
        assert core.run("lanes").fetchall() == [(6, "shop", "kept", "")]
        await put(store, "again", namespace="made-up-0")
        assert sorted(ids(await stream(store))) == ["again", "kept"]
        check(store)
        core.db.execute(
            "INSERT INTO lane (lane, application, namespace) VALUES (77, 'app', 'left by an older version')"
        )
    async with opened() as store:
        assert len(store._store.lanes) == 2
        check(store)


async def test_a_lease_is_lost_also_while_the_dead_letter_of_its_row_waits_for_the_log(
    store: Inflight,
) -> None:
    await put(store, "a", at_most_once=True)
    await put(store, "b")
    refs = [lease.ref for lease in await stream(store)]
    await store.reconcile("w1", ())
    assert (await look(store, "a")).status is Status.FAILURE
    assert await store.lost(refs) == refs[:1], "b waits: what its worker reports of it still counts"


async def test_a_lane_dropped_in_a_write_that_is_undone_is_there_again(store: Inflight) -> None:
    await put(store, "a", namespace="lane")
    await say(store, await one(stream(store)), COMPLETE)
    core, now = store._store, store._clock.now()

    def forgets_and_fails() -> None:
        store._departures.forget(now.wall_ms, 0, 10)
        store._arrivals.insert([arrival("b", namespace="lane")], now)
        store._departures.stick("b", "")
        raise ValueError("changed its mind")

    (result,) = core.apply([forgets_and_fails])
    with pytest.raises(ValueError, match="changed its mind"):
        result.unwrap()
    check(store)
    assert store.counts() == Counter({Status.GONE: 1})
    await put(store, "c", namespace="lane")
    assert len(core.lanes) == 1
    assert ids(await stream(store)) == ["c"]


async def test_a_claim_expires_a_bounded_number_of_rows(
    store: Inflight, clock: FixedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handouts, "MAX_EXPIRED_PER_CLAIM", 10)
    await put(store, *(f"{n}" for n in range(95)), expires_s=1, dead_letter=False)
    await put(store, "fresh")
    clock.advance(2)
    sizes: list[int] = []
    store.observers.append(lambda changes: sizes.append(sum(changes.events.values())))
    assert ids(await stream(store, 4)) == ["fresh"]
    await trio.testing.wait_all_tasks_blocked()
    assert max(sizes) <= 2 * (10 + 4) + 1  # each is expired and gone
    assert len(sizes) >= 8


# ---- order


async def test_strict_order_has_one_live_lease(opened: Opener, clock: FixedClock) -> None:
    async with opened(strict_order_namespaces=frozenset({"ledger"})) as store:
        await put(store, *"abc", namespace="ledger")
        await put(store, "other")
        wake = store.watch_claimable()
        leases = await stream(store)
        assert sorted(ids(leases)) == ["a", "other"]
        a = leases[ids(leases).index("a")]
        assert await unary(store) == []
        assert await stream(store) == []
        await store.reconcile("w1", [])
        assert ids(await stream(store, namespaces=("ledger",))) == ["a"]  # it kept its place
        await _settled(store)
        wake = store.watch_claimable()
        (verdict,) = await store.report([Report("a", a.fence, COMPLETE)])
        assert verdict is SUPERSEDED
        await store.reconcile("w1", [])
        lease = await one(stream(store, namespaces=("ledger",)))
        await say(store, lease, COMPLETE)
        with trio.fail_after(5):
            await wake.wait()  # the next may go
        assert ids(await stream(store, namespaces=("ledger",))) == ["b"]
        check(store)


async def test_an_expired_row_does_not_hold_up_a_strict_order(opened: Opener, clock: FixedClock) -> None:
    async with opened(strict_order_namespaces=frozenset({"mail"})) as store:
        await put(store, "a", "b", expires_s=1)
        await put(store, "c", "d")
        clock.advance(1)
        assert ids(await stream(store)) == ["c"]


async def _settled(inflight: Inflight) -> None:
    """What commits still have to announce is announced."""
    await inflight.describe(["nobody"])
    await trio.testing.wait_all_tasks_blocked()


# ---- wake-ups


async def test_commits_wake_who_watches(store: Inflight) -> None:
    pending, gone, anything = store.watch_claimable(), store.watch(Status.GONE), store.watch_all()
    await put(store, "a")
    with trio.fail_after(5):
        await pending.wait()
        await anything.wait()
    lease = await one(stream(store))
    await say(store, lease, COMPLETE)
    with trio.fail_after(5):
        await gone.wait()
    await _settled(store)
    for wake, expected in ((pending, False), (anything, True)):
        assert wake._event.is_set() is expected
    await anything.wait()
    store.unwatch(anything)
    await put(store, "b")
    await _settled(store)
    assert not anything._event.is_set()


async def test_a_claim_that_is_undone_wakes_who_saw_its_rows_gone(store: Inflight) -> None:
    """The counters move before the commit: a session that looks in between finds nothing to claim."""
    await put(store, "a")
    wake = store.watch_claimable()
    core = store._store
    seen: list[bool] = []

    def refuse() -> bool:
        seen.append(store.claimable(None, ()))
        return True  # turns the COMMIT into a ROLLBACK

    core.db.set_commit_hook(refuse)
    with pytest.raises(StoreError):
        await stream(store)
    core.db.set_commit_hook(None)
    assert seen == [False]
    assert store.claimable(None, ())
    with trio.fail_after(5):
        await wake.wait()


async def test_an_observer_that_fails_harms_nobody(store: Inflight) -> None:
    def failing(changes: object) -> None:
        raise RuntimeError("no metrics today")

    seen: list[object] = []
    store.observers += [failing, seen.append]
    assert await put(store, "a") == Inserted(pending=1)
    await _settled(store)
    assert seen


# ---- what survives


async def test_everything_is_there_after_reopening(opened: Opener, clock: FixedClock) -> None:
    async with opened() as store:
        store_id = store.store_id
        await put(store, "a", "b", "c")
        await put(store, "later", delay_s=60)
        lease, *_ = await stream(store, 2)
        await say(store, lease, COMPLETE)
        depths = store.depths()
    clock.wall_ms -= 10_000  # a restored copy, or a clock set back
    async with opened() as store:
        assert store.store_id == store_id
        assert sorted(map(repr, store.depths())) == sorted(map(repr, depths))
        await put(store, "d")
        leases = await stream(store)
        assert ids(leases) == ["c", "d"]
        assert all(new.fence > lease.fence + 1 for new in leases)
        check(store)


async def test_leases_restart_at_full_length(opened: Opener, clock: FixedClock) -> None:
    async with opened() as store:
        await put(store, *"abc")
        a, b = await stream(store, 2)
        await store.start([a.ref])
        await unary(store)
    clock.mono_ms = 1_000  # the machine was booted again
    async with opened() as store:
        clock.advance(12.999)
        assert await store.end_overdue(10) == 0
        clock.advance(0.001)
        assert await store.end_overdue(10) == 2
        assert await say(store, b, COMPLETE) is APPLIED  # and its worker reports to the new process
        check(store)


async def test_a_newer_schema_is_refused(opened: Opener, tmp_path: Path) -> None:
    async with opened() as store:
        store._store.db.pragma("user_version", SCHEMA_VERSION + 1)
        store._store.db.execute(
            "UPDATE meta SET value = ? WHERE name = 'min_reader_version'", (f"{SCHEMA_VERSION + 1}",)
        )
    with pytest.raises(StartupError, match=f"schema version {SCHEMA_VERSION + 1}") as refused:
        async with opened():
            pass
    assert refused.value.exit_code == 73


async def test_a_file_that_is_no_store_is_refused(opened: Opener, tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").write_bytes(b"certainly not a database" * 100)
    with pytest.raises(StartupError, match=re.escape("store.sqlite")) as refused:
        async with opened():
            pass
    assert refused.value.exit_code == 73


async def test_a_damaged_store_is_refused(opened: Opener, tmp_path: Path) -> None:
    async with opened() as store:
        store._store.db.execute("DROP TABLE meta")
    with pytest.raises(StartupError, match="cannot be used as a store"):
        async with opened():
            pass


# ---- failures


async def test_a_failing_write_harms_no_neighbour(store: Inflight, inline: bool) -> None:
    """One savepoint for each: neighbours in one transaction do not even notice."""
    await put(store, "held")
    await stream(store)
    core = store._store

    def poison(now: Now) -> None:
        store._arrivals.insert([arrival("undone", namespace="new"), arrival("held2")], now)
        raise ValueError("changed its mind")

    def breaks_sql(now: Now) -> None:
        store._arrivals.insert([arrival("undone2")], now)
        core.db.execute("INSERT INTO lane (application, namespace) VALUES ('shop', 'mail')")

    results = core.apply(
        [
            lambda: store._arrivals.insert([arrival("before")], store._clock.now()),
            lambda: poison(store._clock.now()),
            lambda: breaks_sql(store._clock.now()),
            lambda: store._arrivals.insert([arrival("after", namespace="new2")], store._clock.now()),
        ]
    )
    assert results[0].unwrap() == results[3].unwrap() == Inserted(pending=1)
    with pytest.raises(ValueError, match="changed its mind"):
        results[1].unwrap()
    with pytest.raises(StoreError, match="ConstraintError"):
        results[2].unwrap()
    assert store.counts() == Counter({Status.PROCESSING: 1, Status.PENDING: 2})
    check(store)
    assert sorted(ids(await stream(store))) == ["after", "before"]
    assert await put(store, "undone", namespace="new3") == Inserted(pending=1)
    assert ids(await stream(store)) == ["undone"]


async def test_writes_gathered_by_many_callers(store: Inflight) -> None:
    results: dict[str, object] = {}

    async def caller(id_: str) -> None:
        try:
            results[id_] = await (
                store.settle([Settlement("waiting")]) if id_.startswith("bad") else put(store, id_)
            )
        except Exception as error:
            results[id_] = error

    await put(store, "waiting")
    async with trio.open_nursery() as nursery:
        for n in range(50):
            nursery.start_soon(caller, f"good{n}")
            nursery.start_soon(caller, f"bad{n}")
    assert sum(isinstance(result, Exception) for result in results.values()) == 50
    assert store.counts() == Counter({Status.PENDING: 51})


@pytest.mark.parametrize("when", ["commit", "counters"])
async def test_a_failing_transaction_leaves_no_trace(
    store: Inflight, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, "a", "b")
    lease, *_ = await stream(store)
    before = store.depths()
    core = store._store
    with monkeypatch.context() as broken:
        if when == "commit":
            core.db.set_commit_hook(lambda: True)  # turns every COMMIT into a ROLLBACK
        else:
            broken.setitem(core.queries, "write_depth", "INSERT INTO nowhere VALUES (?, ?, ?)")
        with pytest.raises(StoreError):
            await put(store, "c", namespace="new")
        with pytest.raises(StoreError):
            await say(store, lease, COMPLETE)
        core.db.set_commit_hook(None)
    assert store.depths() == before
    check(store)
    assert await put(store, "c", namespace="new2") == Inserted(pending=1)
    assert await say(store, lease, COMPLETE) is APPLIED
    assert ids(await stream(store)) == ["c"]


async def test_a_full_disk_is_a_store_error_until_there_is_room(store: Inflight) -> None:
    db = store._store.db
    await put(store, "a")
    db.execute(f"PRAGMA max_page_count = {db.pragma('page_count') + 2}")
    with pytest.raises(StoreError, match="FullError"):
        await put(store, *(f"{n}" for n in range(50)), activation=b"x" * 4_000)
    check(store)
    assert store.counts() == Counter({Status.PENDING: 1})
    db.execute("PRAGMA max_page_count = 1000000")
    await store.probe()
    assert await put(store, *(f"{n}" for n in range(50)), activation=b"x" * 4_000) == Inserted(pending=50)


async def test_a_cancelled_caller_has_written_or_not_but_knows(store: Inflight) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await put(store, "never submitted")
    assert store.counts() == Counter()
    wake = store.watch_all()
    answered = None
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def cancel_after_the_commit() -> None:
            await wake.wait()
            scope.cancel()

        with trio.CancelScope() as scope:
            answered = await put(store, "a")  # submitted, hence committed, hence answered
    assert answered == Inserted(pending=1)
    assert ids(await stream(store)) == ["a"]


# ---- invariants under a random walk


class Walk:
    """Random operations on a small world; a failing seed repeats by its number."""

    def __init__(self, store: Inflight, clock: FixedClock, seed: int) -> None:
        self.store, self.clock, self.random = store, clock, random.Random(seed)
        self.leases: list[Lease] = []
        self.newest: dict[str, int] = {}
        self.made = 0

    async def step(self) -> None:
        operations = [
            self.insert, self.insert, self.claim, self.claim, self.claim, self.start, self.report,
            self.report, self.hand_back, self.reconcile, self.upkeep, self.publish, self.forget, self.time,
        ]  # fmt: skip
        await self.random.choice(operations)()

    async def insert(self) -> None:
        pick = self.random
        batch = []
        for _ in range(pick.randrange(1, 6)):
            self.made += pick.random() < 0.9
            batch.append(
                arrival(
                    f"i{self.made}",
                    namespace=pick.choice(["a", "b", "strict"]),
                    application=pick.choice(["", "shop"]),
                    received_at_ms=pick.choice([None, self.clock.wall_ms, self.clock.wall_ms - 20_000]),
                    delay_s=pick.choice([None, None, 5]),
                    expires_s=pick.choice([None, None, 15, 30]),
                    dead_letter=pick.random() < 0.5,
                    at_most_once=pick.random() < 0.2,
                    undecodable="broken" if pick.random() < 0.05 else "",
                )
            )
        await self.store.insert(batch)

    async def claim(self) -> None:
        pick = self.random
        request = ClaimRequest(
            pick.randrange(1, 5),
            pick.choice([LeaseKind.UNARY, LeaseKind.STREAM]),
            application=pick.choice([None, "", "shop"]),
            namespaces=pick.choice([(), ("a",), ("b", "strict")]),
        )
        if request.kind is LeaseKind.STREAM:
            request = replace(request, holder=pick.choice(["w1", "w2"]))
        for lease in await self.store.claim(request):
            assert lease.fence > max(self.newest.values(), default=0)
            assert lease.expires_in_ms is None or lease.expires_in_ms > 0
            self.newest[lease.id] = lease.fence
            self.leases.append(lease)

    def some(self) -> list[Lease]:
        return self.random.sample(self.leases, min(len(self.leases), self.random.randrange(4)))

    async def start(self) -> None:
        some = self.some()
        for lease, verdict in zip(some, await self.store.start([x.ref for x in some]), strict=True):
            self.never_superseded(lease, verdict)

    async def report(self) -> None:
        some = self.some()
        reports = [
            Report(
                lease.id,
                self.random.choice([lease.fence, lease.fence, None]),
                self.random.choice(list(ReportStatus)),
                delay_on_retry_s=self.random.choice([None, 1]),
            )
            for lease in some
        ]
        verdicts = await self.store.report(reports)
        for lease, report, verdict in zip(some, reports, verdicts, strict=True):
            if report.fence is not None:
                self.never_superseded(lease, verdict)

    async def hand_back(self) -> None:
        some = self.some()
        for lease, verdict in zip(some, await self.store.hand_back([x.ref for x in some]), strict=True):
            self.never_superseded(lease, verdict)

    def never_superseded(self, lease: Lease, verdict: Verdict) -> None:
        if self.newest[lease.id] != lease.fence:
            assert verdict is not APPLIED

    async def reconcile(self) -> None:
        await self.store.reconcile(self.random.choice(["w1", "w2"]), [lease.ref for lease in self.some()])

    async def upkeep(self) -> None:
        for duty in (self.store.become_due, self.store.expire, self.store.end_overdue):
            assert await duty(3) <= 3

    async def publish(self) -> None:
        rows = await self.store.leaving(4)
        if rows and self.random.random() < 0.1:
            await self.store.stick(rows.pop().id, "too large")
        await self.store.settle(
            [Settlement(row.id, dead_lettered=row.status is not Status.RETRY) for row in rows]
        )

    async def forget(self) -> None:
        await self.store.forget(60_000, 20, 5)

    async def time(self) -> None:
        self.clock.advance(self.random.choice([0.1, 1, 8]))

    def check(self) -> None:
        check(self.store)
        db = self.store._store.db
        live = db.execute(
            "SELECT lane.namespace, count(*) FROM inflight JOIN lane USING (lane) WHERE status = 5 "
            "AND namespace = 'strict' GROUP BY lane"
        ).fetchall()
        assert {count for _, count in live} <= {1}
        for id_, fence, attempts in db.execute("SELECT id, fence, attempts FROM inflight WHERE status = 5"):
            assert fence == self.newest[str(id_)]
            assert attempts in range(4)
        assert not db.execute("SELECT id FROM inflight WHERE attempts < 0").fetchall()
        assert not db.execute("SELECT id FROM inflight WHERE status != 5 AND holder IS NOT NULL").fetchall()
        assert not db.execute(
            "SELECT id FROM inflight WHERE status = 5 AND (holder IS NULL) AND lease_end_mono_ms IS NULL"
        ).fetchall()  # a lease that nothing ends


@pytest.mark.parametrize("seed", range(15))
async def test_random_walk(opened: Opener, clock: FixedClock, seed: int) -> None:
    policy = {"max_processing_attempts": 3, "strict_order_namespaces": frozenset({"strict"})}
    async with opened(**policy) as store:
        walk = Walk(store, clock, seed)
        for number in range(150):
            await walk.step()
            if number % 10 == 0:
                walk.check()
        walk.check()
    async with opened(**policy) as store:
        check(store)


async def test_depths_by_partition_are_those_of_what_is_not_finished(store: Inflight) -> None:
    await put(store, "a", "b", partition=1)
    await put(store, "c", topic="other")
    (lease,) = await stream(store, 1)
    await say(store, lease, COMPLETE)
    await stream(store, 1)
    assert await store.depths_by_partition() == {
        ("taskd", 1, Status.PROCESSING): 1,
        ("other", 0, Status.PENDING): 1,
    }


async def test_what_leaves_is_read_in_rounds_that_fit_into_memory(store: Inflight) -> None:
    large = b"x" * 9_000_000
    await put(store, "a", "b", "c", activation=large)
    for lease in await stream(store, 1) + await stream(store, 1) + await stream(store, 1):
        await say(store, lease, FAILURE)
    published = []
    while rows := await store.leaving(100):
        assert len(rows) == 1  # two of them are beyond what one round reads
        published += [row.id for row in rows]
        await store.settle([Settlement(row.id, dead_lettered=True) for row in rows])
    assert published == ["a", "b", "c"]
