"""A batch of arrivals is stored as its members would be one after the other."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from taskd.activation.switches import Switch, SwitchKind
from taskd.clock import Now
from taskd.inflight.base import Arrival, Inserted, Policy
from taskd.inflight.writer import Inflight, open_inflight

WALL_MS = 1_700_000_000_000


class StoppedClock:
    def now(self) -> Now:
        return Now(WALL_MS, 50_000)


def some_arrival(pick: Random, number: int) -> Arrival:
    """Often one that is known already, sometimes under another namespace than before."""
    return Arrival(
        id=f"{pick.randrange(number + 5)}",
        namespace=f"n{pick.randrange(6)}",
        taskname=pick.choice(["send", "send", "send", "killed"]),
        application="shop",
        received_at_ms=pick.choice([None, WALL_MS - 60_000, WALL_MS + 10**9]),
        processing_deadline_s=pick.choice([0, 5, 500]),
        expires_s=pick.choice([None, None, 30, 90]),
        delay_s=pick.choice([None, None, None, 5, 100, 10_000]),
        attempts=0,
        dead_letter=pick.random() < 0.5,
        at_most_once=pick.random() < 0.5,
        topic="taskd",
        partition=0,
        offset=number,
        record_key=None,
        activation=b"x",
        undecodable="broken" if pick.random() < 0.1 else "",
    )


@pytest.mark.parametrize("seed", range(8))
async def test_together_or_one_by_one_is_the_same(tmp_path: Path, seed: int) -> None:
    pick = Random(seed)
    policy = Policy(max_delay_ms=50_000, max_processing_deadline_ms=60_000)
    batches = [[some_arrival(pick, n) for n in range(pick.randrange(1, 40))] for _ in range(5)]
    found: list[Any] = []
    for together in (True, False):
        path = tmp_path / f"{together}.sqlite"
        async with open_inflight(path, StoppedClock(), policy, inline=True) as store:
            await store.put_switch(Switch(SwitchKind.KILLSWITCH, "shop", "n1", "killed"))
            await store.put_switch(Switch(SwitchKind.DEMOTE, "shop", "n2"))
            results = []
            for batch in batches:
                if together:
                    results.append(await store.insert(batch))
                else:
                    results.append(added([await store.insert([arrival]) for arrival in batch]))
            found.append((results, rows(store), store.depths()))
            assert sorted(map(repr, store.depths())) == sorted(map(repr, store._store.recount()))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]


def added(results: list[Inserted]) -> Inserted:
    numbers = {
        name: sum(getattr(one, name) for one in results)
        for name in ("pending", "delayed", "duplicate", "expired", "undecodable", "dropped", "forwarded")
    }
    return Inserted(
        **numbers,
        shortened=tuple(id_ for one in results for id_ in one.shortened),
        beyond_expiry=tuple(id_ for one in results for id_ in one.beyond_expiry),
    )


def rows(store: Inflight) -> list[Any]:
    """Lanes by name: which number one gets is the store's own business."""
    columns = (
        "id, status, namespace, seq, inflight.taskname, offset, activation, received_at_ms, due_at_ms, "
        "expires_at_ms, deadline_ms, dead_letter, at_most_once, reason, error, outcome, finished_at_ms"
    )
    query = f"SELECT {columns} FROM inflight JOIN lane USING (lane) ORDER BY row"
    return list(store._store.db.execute(query))
