"""Claims that go along with what comes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import outcome
import pytest
import trio

from taskd.errors import StoreError
from taskd.groupcommit import InlineCommitter, Pending, Write, open_group_commit
from taskd.inflight.base import ClaimRequest, Lease, LeaseKind
from taskd.inflight.standing import StandingClaim, StandingClaims


def lease(id_: str) -> Lease:
    return Lease(id_, 1, b"", 1_000, None)


def captured(writes: Sequence[Write]) -> list[outcome.Outcome[object]]:
    return [outcome.capture(write) for write in writes]


@dataclass
class Store:
    """Makes every claim at once, and writes down for how many rows."""

    limits: list[int] = field(default_factory=list)
    fails: bool = False

    def claim(self, request: ClaimRequest) -> Pending[list[Lease]]:
        self.limits.append(request.limit)
        return InlineCommitter(captured).begin(self._claimed)

    def _claimed(self) -> list[Lease]:
        if self.fails:
            raise StoreError("the disk is full")
        return [lease("a")]


def idle(claims: StandingClaims, limit: int) -> StandingClaim:
    return claims.add(lambda: ClaimRequest(limit, LeaseKind.STREAM), lambda: None)


async def test_as_many_rows_are_claimed_as_come_and_in_turns() -> None:
    claims, store = StandingClaims(), Store()
    first, second = idle(claims, 2), idle(claims, 100)
    assert claims.begin(1, store.claim) == [first]
    assert [item.id for item in await first.take()] == ["a"]
    assert claims.begin(1, store.claim) == [second], "it is the other one's turn"
    await second.take()
    assert claims.begin(10, store.claim) == [first, second]
    assert store.limits == [1, 1, 2, 8]


async def test_who_is_busy_or_has_not_taken_the_last_claim_is_passed_over() -> None:
    claims, store = StandingClaims(), Store()
    claims.add(lambda: None, lambda: None)
    other = idle(claims, 1)
    assert claims.begin(5, store.claim) == [other]
    assert other.made
    assert claims.begin(5, store.claim) == []
    await other.take()
    assert not other.made
    assert await other.take() == []


async def test_a_claim_that_failed_is_none() -> None:
    claims, store = StandingClaims(), Store(fails=True)
    claim = idle(claims, 1)
    claims.begin(1, store.claim)
    assert await claim.take() == []


async def test_what_was_made_is_taken_though_its_owner_is_gone() -> None:
    claims, store = StandingClaims(), Store()
    claim = idle(claims, 1)
    claims.begin(1, store.claim)
    claims.remove(claim)
    assert claims.begin(1, store.claim) == []
    assert len(await claim.take()) == 1


async def test_a_write_that_was_begun_happens_and_is_told_of_when_asked() -> None:
    sizes: list[int] = []
    async with open_group_commit(captured, name="test", on_batch=lambda n, _: sizes.append(n)) as committer:
        one, two = committer.begin(lambda: 1), committer.begin(lambda: 2)
        assert (await one.wait(), await two.wait()) == (1, 2)
        with pytest.raises(ZeroDivisionError):
            await committer.begin(lambda: 1 // 0).wait()
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await committer.begin(lambda: 3).wait() == 3
    assert sum(sizes) == 4
