"""Whatever happens to a cancelled activation, in any order: neither it nor its retry is handed out again."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rows import arrival

from taskd.activation.ids import retry_id
from taskd.activation.lifecycle import Status
from taskd.inflight.base import (
    Arrival,
    ClaimRequest,
    Lease,
    LeaseKind,
    Leaving,
    Policy,
    Ref,
    Report,
    ReportStatus,
    Settlement,
)
from taskd.inflight.cancelling import Effect
from taskd.inflight.writer import Inflight, open_inflight
from taskd.testing.clock import FixedClock

IDS = 12
STEPS = 300
ENDS_IT = {Effect.DROPPED, Effect.STOPPING, Effect.UNTOLD, Effect.EXPECTED}


class Life:
    """Activations whose every step is drawn by lot. `first` names, by id, the activation it began as."""

    def __init__(self, store: Inflight, clock: FixedClock, rng: random.Random) -> None:
        self.store, self.clock, self.rng = store, clock, rng
        self.first: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.effects: set[Effect] = set()
        self.log: list[Arrival] = []  # all that was ever produced: any of it may be read again
        self.leases: list[Lease] = []
        self.publishing: list[Leaving] = []  # read, and not settled yet

    async def step(self) -> None:
        steps: tuple[tuple[int, Callable[[], object]], ...] = (
            (4, self.read_the_log), (4, self.claim), (2, self.start), (5, self.report), (1, self.hand_back),
            (2, self.push_ends), (2, self.time_passes), (2, self.cancel),
            (3, self.publisher_reads), (3, self.publisher_settles),
        )  # fmt: skip
        (chosen,) = self.rng.choices([step for _, step in steps], [weight for weight, _ in steps])
        await chosen()  # type: ignore[misc]

    def produce(self, id_: str, first: str, attempts: int = 0) -> None:
        self.first[id_] = first
        # None of it is dead-lettered.
        delay_s = self.rng.choice((None, 5))
        self.log.append(
            arrival(id_, attempts=attempts, delay_s=delay_s, received_at_ms=None, dead_letter=False)
        )

    async def read_the_log(self) -> None:
        found = self.rng.sample(self.log, min(3, len(self.log)))
        await self.store.insert(found)

    async def claim(self) -> None:
        kind = self.rng.choice((LeaseKind.UNARY, LeaseKind.STREAM, LeaseKind.PUSH))
        holder = "w1" if kind is LeaseKind.STREAM else None
        leases = await self.store.claim(ClaimRequest(2, kind, holder))
        assert not [lease.id for lease in leases if self.first[lease.id] in self.cancelled]
        self.leases += leases

    def _refs(self) -> list[Ref]:
        return [lease.ref for lease in self.rng.sample(self.leases, min(2, len(self.leases)))]

    async def start(self) -> None:
        await self.store.start(self._refs())

    async def hand_back(self) -> None:
        await self.store.hand_back(self._refs())

    async def push_ends(self) -> None:
        end = self.rng.choice((self.store.pushed, self.store.unclaim, self.store.maybe_pushed))
        await end(self._refs())

    async def report(self) -> None:
        status = self.rng.choice((ReportStatus.RETRY, ReportStatus.RETRY, *ReportStatus))
        for ref in self._refs():
            fence = self.rng.choice((ref.fence, None))
            await self.store.report([Report(ref.id, fence, status, delay_on_retry_s=0)])

    async def time_passes(self) -> None:
        self.clock.advance(self.rng.choice((0.1, 6, 20)))
        await self.store.become_due(100)
        await self.store.end_overdue(100)
        await self.store.end_overdue_claims(100)

    async def publisher_reads(self) -> None:
        self.publishing += await self.store.leaving(10)

    async def publisher_settles(self) -> None:
        """The retry is in the log; the crash that comes before the row is settled is the other half."""
        settles = self.rng.random() < 0.7
        for row in self.publishing:
            if row.status is Status.RETRY:
                follower = retry_id(row.id, row.retry_attempts + 1)
                if follower not in self.first:
                    self.produce(follower, self.first[row.id], row.retry_attempts + 1)
                if settles:
                    await self.store.settle([Settlement(row.id, continued_as=follower)])
        self.publishing.clear()

    async def cancel(self) -> None:
        id_ = self.rng.choice(sorted(self.first.values()))
        (found,) = await self.store.cancel([id_], "by ann: why")
        self.effects.add(found.effect)
        assert (found.effect is Effect.STOPPING) == bool(found.holder)
        assert found.outcome != "retried", "there is a newer one to be cancelled"
        if found.effect in ENDS_IT:
            self.cancelled.add(id_)
        elif id_ in self.cancelled:
            assert (found.effect, found.outcome) == (Effect.ENDED, "dropped")


@pytest.mark.parametrize("seed", range(10))
async def test_what_was_cancelled_never_runs_again(tmp_path: Path, seed: int) -> None:
    clock, rng = FixedClock(), random.Random(seed)
    async with open_inflight(tmp_path / "store.sqlite", clock, Policy(), inline=True) as store:
        life = Life(store, clock, rng)
        for number in range(IDS):
            life.produce(f"a{number}", f"a{number}")
        for _ in range(STEPS):
            await life.step()
        assert life.cancelled
        assert life.effects >= {Effect.DROPPED, Effect.ENDED}
        counted = {(d.namespace, d.status): d.count for d in store._store.recount()}
        assert counted == {(d.namespace, d.status): d.count for d in store.depths()}
