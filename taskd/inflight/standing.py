"""Claims that wait for rows: made in the very transaction that brings them, where nothing else is ready.

A claim of its own behind each arrival would wait for the disk once more, and for two threads. So whoever
is idle leaves word of what it would take; what comes in asks, and the claims go along with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from taskd.errors import StoreError
from taskd.groupcommit import Pending
from taskd.inflight.base import ClaimRequest, Lease


@dataclass(eq=False, slots=True)
class StandingClaim:
    """`request`: what its owner would claim now, None while it is busy; asked from any task, so it must not
    wait. `wake`: called when a claim was made; its owner then has to `take` it."""

    request: Callable[[], ClaimRequest | None]
    wake: Callable[[], None]
    _made: Pending[list[Lease]] | None = None

    @property
    def made(self) -> bool:
        """Whether there is one to `take`."""
        return self._made is not None

    async def take(self) -> list[Lease]:
        """What was claimed, once it is durable. Not cancelled before: somebody has to see to the leases."""
        made, self._made = self._made, None
        try:
            return [] if made is None else await made.wait()
        except StoreError:
            return []  # its owner's next claim meets the same trouble

    def begin(self, most: int, claim: Callable[[ClaimRequest], Pending[list[Lease]]]) -> int:
        """Make it now, for at most so many rows; for how many it was made."""
        request = None if self.made else self.request()
        if request is None:
            return 0
        limit = min(request.limit, most)
        self._made = claim(replace(request, limit=limit))
        return limit


class StandingClaims:
    """All of one store, asked in turns."""

    def __init__(self) -> None:
        self._claims: deque[StandingClaim] = deque()

    def add(self, request: Callable[[], ClaimRequest | None], wake: Callable[[], None]) -> StandingClaim:
        """As `StandingClaim` says; until `remove`, after which what was made has still to be taken."""
        claim = StandingClaim(request, wake)
        self._claims.append(claim)
        return claim

    def remove(self, claim: StandingClaim) -> None:
        self._claims.remove(claim)

    def begin(self, rows: int, claim: Callable[[ClaimRequest], Pending[list[Lease]]]) -> list[StandingClaim]:
        """Make claims for so many rows that are about to come; those that were made."""
        made: list[StandingClaim] = []
        for standing in list(self._claims):
            if rows <= 0:
                break
            taken = standing.begin(rows, claim)
            if taken:
                rows -= taken
                made.append(standing)
                self._claims.remove(standing)
                self._claims.append(standing)
        return made
