"""Switches in the store: rows, the board beside them, and what they do to activations there."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from rows import arrival

from taskd.activation.lifecycle import Status
from taskd.activation.switches import Condition, Switch, SwitchKind, SwitchSource
from taskd.errors import StoreError
from taskd.inflight import gated
from taskd.inflight import switches as switches_module
from taskd.inflight.base import ClaimRequest, Inserted, Lease, LeaseKind, Policy, Ref, Settlement
from taskd.inflight.switches import DemotedTo, Replaced, Switches
from taskd.inflight.writer import Inflight, open_inflight
from taskd.testing.clock import FixedClock
from taskd.wire.generated.sentry_protos.taskbroker.v1 import TaskActivation

PAUSE, KILL, DEMOTE = SwitchKind


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture
async def store(tmp_path: Path, clock: FixedClock) -> AsyncIterator[Inflight]:
    policy = Policy(strict_order_namespaces=frozenset({"strict"}))
    async with open_inflight(tmp_path / "store.sqlite", clock, policy, inline=True) as inflight:
        yield inflight
        recounted = {(d.application, d.namespace, d.status): d.count for d in inflight._store.recount()}
        assert recounted == {(d.application, d.namespace, d.status): d.count for d in inflight.depths()}


async def put(store: Inflight, *ids: str, args: list[Any] | None = None, **fields: Any) -> Inserted:
    parameters = msgpack.packb({"args": args or [], "kwargs": {}})
    taskname = fields.get("taskname", "send")

    def activation(id_: str) -> bytes:
        return bytes(TaskActivation(id=id_, taskname=taskname, parameters_bytes=parameters))

    return await store.insert(
        [arrival(id_, received_at_ms=None, activation=activation(id_), **fields) for id_ in ids]
    )


async def claim(store: Inflight, limit: int = 10) -> list[Lease]:
    return await store.claim(ClaimRequest(limit, LeaseKind.STREAM, holder="w"))


async def claimed(store: Inflight, limit: int = 10) -> list[str]:
    return [lease.id for lease in await claim(store, limit)]


async def apply_all(store: Inflight, limit: int = 3) -> tuple[int, int]:
    """Rounds of `limit` rows until the end; what was dropped and forwarded."""
    row: int | None = 0
    dropped = forwarded = 0
    while row is not None:
        looked = await store.apply_switches(row, limit)
        assert looked.rows <= limit
        row, dropped, forwarded = looked.last_row, dropped + looked.dropped, forwarded + looked.forwarded
    return dropped, forwarded


# ---- the table


async def test_switches_are_there_again_after_a_restart(tmp_path: Path, clock: FixedClock) -> None:
    orders = [
        Switch(
            PAUSE, application="", namespace="mail", reason="why", author="ann", until_ms=clock.wall_ms + 1
        ),
        Switch(KILL, taskname="send", conditions=(Condition(0, 1), Condition("x", [1.0, {"a": None}]))),
        Switch(DEMOTE, namespace="slow", source=SwitchSource.FILE),
    ]
    path = tmp_path / "store.sqlite"
    async with open_inflight(path, clock, Policy(), inline=True) as store:
        stored = tuple([await store.put_switch(order) for order in orders])
        assert store.board.switches == stored
        assert [switch.number for switch in stored] == [1, 2, 3]
        assert {switch.created_at_ms for switch in stored} == {clock.wall_ms}
    async with open_inflight(path, clock, Policy(), inline=True) as store:
        assert store.board.switches == stored


async def test_an_order_for_the_same_subject_replaces_the_older(store: Inflight) -> None:
    await store.put_switch(Switch(PAUSE, application="shop", reason="one"))
    await store.put_switch(Switch(PAUSE, application="shop", namespace="mail"))
    await store.put_switch(Switch(PAUSE, application="shop", reason="two"))
    assert [(s.reason, s.namespace) for s in store.board.switches] == [("", "mail"), ("two", None)]
    taken = await store.remove_switches([switch.number for switch in store.board.switches] + [99])
    assert len(taken) == 2
    assert store.board.switches == ()


async def test_a_file_owns_its_switches_and_no_others(store: Inflight, clock: FixedClock) -> None:
    mine = await store.put_switch(Switch(KILL, taskname="send"))
    a, b, c = (Switch(KILL, taskname=name, source=SwitchSource.FILE) for name in ("send", "b", "c"))
    first = await store.replace_switches(SwitchSource.FILE, [a, b])
    assert [switch.taskname for switch in first.added] == ["send", "b"]
    clock.advance(60)
    second = await store.replace_switches(SwitchSource.FILE, [b, c])
    assert [[s.taskname for s in part] for part in (second.added, second.removed)] == [["c"], ["send"]]
    kept = {s.taskname: s.created_at_ms for s in store.board.switches if s.source is SwitchSource.FILE}
    assert kept == {"b": clock.wall_ms - 60_000, "c": clock.wall_ms}  # b is the one it was
    assert mine in store.board.switches
    assert await store.replace_switches(SwitchSource.FILE, [b, c]) == Replaced()


async def test_a_switch_ends_at_its_time_unless_the_clock_was_set(store: Inflight, clock: FixedClock) -> None:
    await store.put_switch(Switch(PAUSE, application="shop", until_ms=clock.wall_ms + 60_000))
    await store.put_switch(Switch(PAUSE, application="bank"))
    clock.advance(59.999)
    assert await store.end_switches() == ()
    clock.advance(0.001)
    clock.may_expire = False
    assert await store.end_switches() == ()
    clock.may_expire = True
    assert [switch.application for switch in await store.end_switches()] == ["shop"]
    assert [switch.application for switch in store.board.switches] == ["bank"]


async def test_the_board_goes_back_with_a_transaction_that_fails(store: Inflight) -> None:
    await put(store, "a")
    await store.put_switch(Switch(PAUSE, taskname="other"))
    before = store.board
    store._store.db.set_commit_hook(lambda: True)  # turns every COMMIT into a ROLLBACK
    with pytest.raises(StoreError):
        await store.put_switch(Switch(PAUSE, application="shop"))
    store._store.db.set_commit_hook(None)
    assert store.board is before
    assert await claimed(store) == ["a"]


async def test_where_demoted_rows_go_goes_back_with_a_transaction_that_fails(
    store: Inflight, clock: FixedClock
) -> None:
    before, wanted = store.demoted_to, DemotedTo("elsewhere", "host:9092")
    store._store.db.set_commit_hook(lambda: True)
    with pytest.raises(StoreError):
        await store.replace_switches(SwitchSource.FILE, [], wanted)
    store._store.db.set_commit_hook(None)
    assert store.demoted_to == before
    await store.replace_switches(SwitchSource.FILE, [], wanted)  # not taken for what is there already
    assert Switches(store._store, store._departures).demoted_to == wanted


# ---- pause


@pytest.mark.parametrize(
    "paused",
    [
        Switch(PAUSE, application="shop"),
        Switch(PAUSE, namespace="mail"),
        Switch(PAUSE, taskname="send"),
        Switch(PAUSE, application="shop", namespace="mail", taskname="send"),
    ],
)
async def test_what_is_paused_waits_and_the_rest_goes_on(store: Inflight, paused: Switch) -> None:
    await put(store, "a", "b")
    await put(store, "x", application="bank", namespace="chat", taskname="talk")
    stored = await store.put_switch(paused)
    if paused.taskname is None:
        assert not store.claimable("shop", ())
    assert await claimed(store) == ["x"]
    assert store.counts()[Status.PENDING] == 2  # a gate, not a state
    wake = store.watch_claimable()
    await store.remove_switches([stored.number])
    await wake.wait()  # no row moved, and yet there is something to claim
    assert await claimed(store) == ["a", "b"]


@pytest.mark.parametrize(
    "other",
    [
        Switch(PAUSE, application="bank"),
        Switch(PAUSE, application=""),
        Switch(PAUSE, application="shop", namespace="chat"),
        Switch(PAUSE, namespace="mail", taskname="sen"),
    ],
)
async def test_a_selector_must_fit_in_all_its_parts(store: Inflight, other: Switch) -> None:
    await put(store, "a")
    await store.put_switch(other)
    assert await claimed(store) == ["a"]


async def test_a_paused_task_lets_its_neighbours_pass_in_order(store: Inflight) -> None:
    for number in range(6):
        await put(store, f"{number}", taskname="send" if number % 2 else "paused")
    pause = await store.put_switch(Switch(PAUSE, taskname="paused"))
    assert await claimed(store, 2) == ["1", "3"]
    assert await claimed(store) == ["5"]
    assert await claimed(store) == []
    await store.remove_switches([pause.number])
    assert await claimed(store) == ["0", "2", "4"]


async def test_in_a_strict_order_namespace_nothing_overtakes_a_paused_task(store: Inflight) -> None:
    await put(store, "a", namespace="strict", taskname="paused")
    await put(store, "b", namespace="strict")
    pause = await store.put_switch(Switch(PAUSE, taskname="paused"))
    assert await claimed(store) == []
    await store.remove_switches([pause.number])
    assert await claimed(store) == ["a"]


async def test_paused_rows_are_passed_over_once_and_in_bounded_steps(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated, "SCAN_CHUNK", 10)
    monkeypatch.setattr(gated, "SCAN_ROWS", 100)
    await put(store, *(f"p{number}" for number in range(250)), taskname="paused")
    await put(store, "a", "b")
    await store.put_switch(Switch(PAUSE, taskname="paused"))
    looked: list[int] = []
    run = store._store.run

    def counting(name: str, *values: Any) -> Any:
        rows = run(name, *values)
        if name != "tasks_in_lane":
            return rows
        found = rows.fetchall()
        looked.append(len(found))
        return type("Found", (), {"fetchall": lambda self: found})()

    monkeypatch.setattr(store._store, "run", counting)
    submit, transactions = store._submit, 0

    async def counted(write: Any) -> Any:
        nonlocal transactions
        transactions += 1
        before = len(looked)
        result = await submit(write)
        assert sum(looked[before:]) <= 100
        return result

    monkeypatch.setattr(store, "_submit", counted)
    assert await claimed(store, 1) == ["a"]
    assert (transactions, sum(looked)) == (3, 252)
    looked.clear()
    assert await claimed(store, 1) == ["b"]
    assert sum(looked) == 1  # no paused one again
    assert await claimed(store, 1) == []


async def test_an_expired_row_hides_nothing_behind_it(store: Inflight, clock: FixedClock) -> None:
    await store.put_switch(Switch(PAUSE, taskname="paused"))
    await put(store, "late", expires_s=1)
    await put(store, "a")
    clock.advance(2)
    assert await claimed(store, 1) == ["a"]


async def test_what_comes_back_to_its_place_is_found_there(store: Inflight) -> None:
    await put(store, "a")
    await put(store, "p", taskname="paused")
    await put(store, "b")
    await store.put_switch(Switch(PAUSE, taskname="paused"))
    a, b = await claim(store)
    assert await claimed(store) == []
    await store.hand_back([Ref(a.id, a.fence)])
    assert await claimed(store) == ["a"]
    await store.hand_back([Ref(b.id, b.fence)])
    assert await claimed(store) == ["b"]


async def test_a_claim_that_was_undone_is_found_again(store: Inflight) -> None:
    await put(store, "a")
    await put(store, "p", taskname="paused")
    await store.put_switch(Switch(PAUSE, taskname="paused"))
    store._store.db.set_commit_hook(lambda: True)
    with pytest.raises(StoreError):
        await claim(store)
    store._store.db.set_commit_hook(None)
    assert await claimed(store) == ["a"]


async def test_what_is_paused_expires(store: Inflight, clock: FixedClock) -> None:
    await put(store, "a", expires_s=10)
    await store.put_switch(Switch(PAUSE, application="shop"))
    clock.advance(10)
    assert await store.expire(10) == 1


# ---- killswitch


async def test_a_killed_task_is_dropped_as_it_arrives_and_remembered(store: Inflight) -> None:
    await store.put_switch(Switch(KILL, taskname="send"))
    assert await put(store, "a", delay_s=60) == Inserted(dropped=1)
    assert await put(store, "a") == Inserted(duplicate=1)
    assert await put(store, "b", taskname="other") == Inserted(pending=1)
    (found,) = await store.describe(["a"])
    assert (found.status, found.outcome, found.reason) == (Status.GONE, "dropped", "killswitch")


async def test_killed_comes_before_expired(store: Inflight, clock: FixedClock) -> None:
    await store.put_switch(Switch(KILL, taskname="send"))
    assert await put(store, "a", expires_s=0) == Inserted(dropped=1)


async def test_expired_comes_before_demoted(store: Inflight) -> None:
    await store.put_switch(Switch(DEMOTE, namespace="mail"))
    assert await put(store, "a", expires_s=0) == Inserted(expired=1)


async def test_stored_rows_are_dropped_in_bounded_rounds(store: Inflight) -> None:
    await put(store, *(f"a{number}" for number in range(10)))
    await put(store, *(f"d{number}" for number in range(5)), delay_s=60)
    await put(store, "other", taskname="other")
    # By a unary call: whoever has it cannot be told to stop.
    running = await store.claim(ClaimRequest(1, LeaseKind.UNARY))
    await store.put_switch(Switch(KILL, taskname="send"))
    assert await apply_all(store) == (14, 0)
    assert store.counts() == Counter({Status.GONE: 14, Status.PROCESSING: 1, Status.PENDING: 1})
    await store.hand_back([lease.ref for lease in running])
    assert await claimed(store) == ["other"]  # what came back is dropped by the claim that meets it
    assert store.counts()[Status.GONE] == 15


async def test_nothing_killed_is_handed_out_before_a_round_came_by(store: Inflight) -> None:
    await put(store, "a", args=[17])
    await put(store, "b", args=[18])
    await store.put_switch(Switch(KILL, taskname="send", conditions=(Condition(0, 17),)))
    assert await claimed(store) == ["b"]
    (found,) = await store.describe(["a"])
    assert found.outcome == "dropped"


async def test_arguments_that_cannot_be_read_fall_under_no_condition(store: Inflight) -> None:
    await store.put_switch(Switch(KILL, taskname="send", conditions=(Condition(0, 17),)))
    broken = bytes(TaskActivation(id="x", taskname="send", parameters_bytes=b"\xc1"))
    assert await store.insert([arrival("x", activation=broken)]) == Inserted(pending=1)
    assert await claimed(store) == ["x"]


# ---- demotion


async def test_a_demoted_namespace_is_not_claimed_but_forwarded(store: Inflight) -> None:
    await put(store, "stored")
    await put(store, "later", delay_s=60)
    await put(store, "other", namespace="chat")
    await store.put_switch(Switch(DEMOTE, namespace="mail"))
    assert await put(store, "new") == Inserted(forwarded=1)
    assert await put(store, "late", expires_s=0) == Inserted(expired=1)
    assert await claimed(store) == ["other"]
    assert await apply_all(store) == (0, 2)
    assert {row.id for row in await store.demoted(10)} == {"stored", "later", "new"}
    assert [row.id for row in await store.leaving(10)] == ["late"]  # which a lost cluster must not hold up


# ---- invariants under a random walk


@pytest.mark.parametrize("seed", range(8))
async def test_no_walk_hands_out_what_is_switched_off_or_loses_what_is_not(
    store: Inflight, clock: FixedClock, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated, "SCAN_CHUNK", 2)
    monkeypatch.setattr(gated, "SCAN_ROWS", 5)
    pick = random.Random(seed)
    task_of: dict[str, tuple[str, str]] = {}
    held: dict[str, Lease] = {}
    for step in range(120):
        action = pick.choice(["put", "put", "claim", "claim", "back", "switch", "switch", "resume", "look"])
        if action == "put":
            namespace, taskname = pick.choice(["mail", "chat"]), pick.choice("abc")
            task_of[f"i{step}"] = (namespace, taskname)
            await put(store, f"i{step}", namespace=namespace, taskname=taskname)
        elif action == "claim":
            for lease in await claim(store, pick.randrange(1, 4)):
                namespace, taskname = task_of[lease.id]
                gate = store.board.gate("shop", namespace)
                assert not gate.closed
                assert taskname not in gate.paused_tasks
                assert taskname not in gate.kills
                held[lease.id] = lease
        elif action == "back" and held:
            lease = held.pop(pick.choice(sorted(held)))
            await store.hand_back([lease.ref])
        elif action == "switch":
            kind = pick.choice([PAUSE, PAUSE, PAUSE, KILL, DEMOTE])
            where = pick.choice(["mail", "chat"] if kind is DEMOTE else [None, "mail", "chat"])
            task = None if kind is DEMOTE else pick.choice("abc")
            if kind is PAUSE and where is not None:
                task = pick.choice([None, "a", "b"])
            await store.put_switch(Switch(kind, namespace=where, taskname=task))
        elif action == "resume":
            numbers = [switch.number for switch in store.board.switches]
            await store.remove_switches(pick.sample(numbers, (len(numbers) + 1) // 2))
        elif action == "look":
            await apply_all(store)
            await store.settle([Settlement(row.id) for row in await store.demoted(100)])
    await store.hand_back([lease.ref for lease in held.values()])
    await store.remove_switches([switch.number for switch in store.board.switches])
    waiting = store.counts()[Status.PENDING]
    found = await claimed(store, 1_000)
    assert len(found) == waiting
    for namespace in ("mail", "chat"):  # in the order they came
        order = [int(id_[1:]) for id_ in found if task_of[id_][0] == namespace]
        assert order == sorted(order)


async def test_a_round_is_bounded_by_bytes_also_when_all_of_it_is_dropped(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switches_module, "READ_BYTES", 1_000)
    await put(store, *(f"id{n}" for n in range(6)), args=["x" * 600])
    await store.put_switch(Switch(KILL, taskname="send"))
    looked = await store.apply_switches(0, 100)
    assert (looked.rows, looked.dropped) == (2, 2)
    assert await apply_all(store, 100) == (4, 0)
