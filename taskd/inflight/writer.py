"""The store as Trio code sees it: every method is one write, gathered with others into a transaction."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import structlog
import trio

from taskd.activation.lifecycle import LEAVING, Status
from taskd.activation.switches import Board, Switch, SwitchSource
from taskd.clock import Clock, Now
from taskd.database import free_bytes, wal_bytes
from taskd.errors import StoreError
from taskd.groupcommit import Committer, InlineCommitter, OnBatch, Pending, open_group_commit
from taskd.inflight.arrivals import Arrivals
from taskd.inflight.base import (
    Arrival,
    Claimed,
    ClaimRequest,
    Depth,
    Description,
    Inserted,
    Lease,
    Leaving,
    Left,
    Policy,
    Ref,
    Report,
    Settlement,
    Verdict,
)
from taskd.inflight.cancelling import Cancelled, Cancelling
from taskd.inflight.claims import Claims
from taskd.inflight.departures import Departures
from taskd.inflight.describing import describe
from taskd.inflight.handouts import Handouts
from taskd.inflight.heartbeats import Extending, Heartbeat, ProgressNotes
from taskd.inflight.held import HeldRows
from taskd.inflight.known import KnownTasks
from taskd.inflight.leases import Leases
from taskd.inflight.limits import LimitState, room
from taskd.inflight.parked import Parked
from taskd.inflight.relaning import Relaning
from taskd.inflight.sqlite import Changes, SqliteStore
from taskd.inflight.standing import StandingClaims
from taskd.inflight.switches import DemotedTo, Looked, Replaced, Switches
from taskd.inflight.wake import Wake

T = TypeVar("T")

RESUME_BYTES = 8 * 1024 * 1024  # as much room as that ends the trouble of a full disk
TOKENS_AT_LEAST_MS = 10  # between two wake-ups by tokens: those of a fast rate come several at a time
TOKENS_AT_MOST_S = 20.0

log = structlog.get_logger("taskd.inflight")


class Inflight:
    """Opened by `open_inflight`. Every write is durable when its method returns.

    A write that was submitted happens, also when its caller is cancelled meanwhile; cancellation is
    then noticed at the caller's next checkpoint. Raises StoreError when the file fails.
    """

    def __init__(self, store: SqliteStore, committer: Committer, clock: Clock) -> None:
        self._store = store
        self._committer = committer
        self._clock = clock
        departures = Departures(store)
        self._departures = departures
        self._arrivals = Arrivals(store, departures)
        held = HeldRows(store)
        self._handouts = Handouts(store, departures, held)
        self._leases = Leases(store, departures, held)
        self._extending = Extending(store, self._leases)
        self._progress = ProgressNotes()
        self._claims = Claims(store)
        self._parked = Parked(store)
        self._cancelling = Cancelling(store, departures)
        self._switches = Switches(store, departures)
        self._watchers: list[tuple[frozenset[Status], Wake]] = []
        self._switch_watchers: list[Wake] = []
        self.observers: list[Callable[[Changes], None]] = []
        self.standing = StandingClaims()
        self.last_commit_mono_ms = clock.now().mono_ms
        self.notice = ""  # what an operator should know of this file
        self.damaged = trio.Event()  # SQLite met damage in it; then nothing is taken any more
        self._relaning = Relaning(store)
        self.limits_changed = Wake()  # `relane` has something to do
        self.short_of_tokens = Wake()  # `tokens_in_s` is sooner than it was
        self._token_due_ms: int | None = None  # somebody waits for it; monotonic

    @property
    def store_id(self) -> str:
        return self._store.store_id

    @property
    def trouble(self) -> str:
        """Why the disk takes nothing; empty when it does.

        Meanwhile nothing is inserted and claims answer nothing; reports and what upkeep does are tried,
        because they need little room. It ends by `probe`.
        """
        return self._store.trouble

    async def probe(self) -> None:
        """While in trouble: see whether it is over. Raises StoreError as long as it is not."""
        if not self.trouble:
            return
        if self.damaged.is_set():
            raise StoreError(self.trouble)
        free = free_bytes(self._store.path)
        if free < RESUME_BYTES:
            raise StoreError(f"{self.trouble}: {free} bytes are free, waiting for {RESUME_BYTES}")
        await self._submit(lambda now: self._store.probe())
        log.info("the store takes rows again", after=self.trouble)
        self._store.trouble = ""
        self._undone()  # whoever waited for rows looks again

    async def shrink(self, max_pages: int) -> int:
        return await self._submit(lambda now: self._store.shrink(max_pages))

    @property
    def wal_bytes(self) -> int:
        return wal_bytes(self._store.path)

    async def insert(self, arrivals: Sequence[Arrival]) -> Inserted:
        if self.trouble:
            raise StoreError(self.trouble)
        await trio.lowlevel.checkpoint_if_cancelled()
        inserting = self._begin(lambda now: self._arrivals.insert(arrivals, now))
        for claim in self.standing.begin(len(arrivals), self._begin_claim):
            claim.wake()  # its owner waits for the commit itself, not for this task to run after it
        return await inserting.wait()

    def _begin(self, write: Callable[[Now], T]) -> Pending[T]:
        return self._committer.begin(lambda: write(self._clock.now()))

    def _begin_claim(self, request: ClaimRequest) -> Pending[list[Lease]]:
        return self._begin(lambda now: self._handouts.claim(request, now))

    async def claim(self, request: ClaimRequest) -> list[Lease]:
        def claim(now: Now) -> tuple[list[Lease], bool, int]:
            return self._handouts.claim(request, now), self._handouts.cut_short, now.mono_ms

        while not self.trouble:
            try:
                leases, cut_short, looked_ms = await self._submit(claim)
            except StoreError:
                if not self.trouble:
                    raise
            else:
                if leases or not cut_short:
                    self._expect_token(looked_ms)
                    return leases
        return []

    async def start(self, refs: Sequence[Ref]) -> list[Verdict]:
        return await self._submit(lambda now: self._leases.start(refs, now))

    async def complete(self, refs: Sequence[Ref]) -> list[Verdict]:
        """As `report`, of work that is done and nothing more to say of it."""
        verdicts = await self._submit(lambda now: self._leases.complete(refs, now))
        self._progress.forget(
            ref.id for ref, verdict in zip(refs, verdicts, strict=True) if verdict is Verdict.APPLIED
        )
        return verdicts

    async def report(self, reports: Sequence[Report]) -> list[Verdict]:
        verdicts = await self._submit(lambda now: self._leases.report(reports, now))
        self._forget_progress(reports, verdicts)
        return verdicts

    async def report_and_claim(
        self, reports: Sequence[Report], requests: Sequence[ClaimRequest]
    ) -> tuple[list[Verdict], list[Claimed]]:
        """Both as one write, reports first; either all of it is durable, or nothing.

        A claim that was cut short may find more by `claim`. In trouble, claims find nothing.
        """

        def write(now: Now) -> tuple[list[Verdict], list[Claimed], int]:
            verdicts = self._leases.report(reports, now) if reports else []
            if self.trouble:
                return verdicts, [Claimed([], cut_short=False) for _ in requests], now.mono_ms
            claims: list[Claimed] = []
            for request in requests:
                if claims and claims[-1].cut_short:  # what one claim passes over is enough for a transaction
                    claims.append(Claimed([], cut_short=True))
                else:
                    claims.append(self._handouts.claim_each(request, now))
            return verdicts, claims, now.mono_ms

        verdicts, claims, looked_ms = await self._submit(write)
        self._forget_progress(reports, verdicts)
        if requests:
            self._expect_token(looked_ms)
        return verdicts, claims

    def _forget_progress(self, reports: Sequence[Report], verdicts: Sequence[Verdict]) -> None:
        self._progress.forget(
            report.id for report, verdict in zip(reports, verdicts, strict=True) if verdict is Verdict.APPLIED
        )

    async def heartbeat(self, heartbeats: Sequence[Heartbeat]) -> list[Verdict]:
        """These tasks are alive: their deadlines move, and what they say of themselves can be asked for."""
        refs = [heartbeat.ref for heartbeat in heartbeats]
        verdicts = await self._submit(lambda now: self._extending.extend(refs, now))
        mono_ms = self._clock.now().mono_ms
        for heartbeat, verdict in zip(heartbeats, verdicts, strict=True):
            if verdict is Verdict.APPLIED:
                self._progress.note(heartbeat, mono_ms)
        return verdicts

    async def hand_back(self, refs: Sequence[Ref]) -> list[Verdict]:
        return await self._submit(lambda now: self._leases.hand_back(refs, now))

    async def reconcile(self, holder: str, holding: Iterable[Ref]) -> int:
        return await self._submit(lambda now: self._leases.reconcile(holder, holding, now))

    async def held_ids(self, limit: int) -> list[str]:
        return await self._submit(lambda now: self._leases.held_ids(limit))

    async def holders(self) -> list[str]:
        return await self._submit(lambda now: self._leases.holders())

    async def pushed(self, refs: Sequence[Ref]) -> list[Verdict]:
        return await self._submit(lambda now: self._claims.pushed(refs, now))

    async def unclaim(self, refs: Sequence[Ref]) -> list[Verdict]:
        return await self._submit(lambda now: self._claims.unclaim(refs))

    async def maybe_pushed(self, refs: Sequence[Ref]) -> list[Verdict]:
        return await self._submit(lambda now: self._claims.maybe_pushed(refs, now))

    async def end_overdue_claims(self, limit: int) -> int:
        return await self._submit(lambda now: self._claims.end_overdue(limit, now))

    async def sort_parked(self, served: Collection[str], limit: int) -> int:
        return await self._submit(lambda now: self._parked.sort(served, limit))

    async def bring_back(self, known: KnownTasks, limit: int) -> int:
        return await self._submit(lambda now: self._parked.bring_back(known, limit))

    async def lost(self, refs: Sequence[Ref]) -> list[Ref]:
        return await self._submit(lambda now: self._leases.lost(refs))

    async def end_overdue(self, limit: int) -> int:
        return await self._submit(lambda now: self._leases.end_overdue(limit, now))

    async def become_due(self, limit: int) -> int:
        return await self._submit(lambda now: self._arrivals.become_due(limit, now))

    async def expire(self, limit: int) -> int:
        return await self._submit(lambda now: self._arrivals.expire(limit, now))

    async def leaving(self, limit: int) -> list[Leaving]:
        return await self._submit(lambda now: self._departures.leaving(limit))

    async def forward_all(self, limit: int, reason: str) -> int:
        return await self._submit(lambda now: self._departures.forward_all(limit, reason))

    async def left(self, limit: int) -> list[Left]:
        return await self._submit(lambda now: self._departures.left(limit))

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        await self._submit(lambda now: self._departures.settle(settlements, now))

    async def stick(self, id_: str, why: str) -> None:
        await self._submit(lambda now: self._departures.stick(id_, why))

    async def set_aside(self, rows: Mapping[str, str]) -> None:
        await self._submit(lambda now: self._departures.set_aside(rows))

    async def first_set_aside(self) -> dict[str, str]:
        return await self._submit(lambda now: self._departures.first_set_aside())

    async def take_back(self, why: str, limit: int) -> int:
        return await self._submit(lambda now: self._departures.take_back(why, limit))

    async def forget(self, ttl_ms: int, max_count: int, limit: int) -> int:
        return await self._submit(lambda now: self._departures.forget(now.wall_ms - ttl_ms, max_count, limit))

    async def describe(self, ids: Sequence[str]) -> list[Description]:
        found = await self._submit(lambda now: [describe(self._store, id_, now) for id_ in ids])
        mono_ms = self._clock.now().mono_ms
        return [self._progress.added_to(description, mono_ms) for description in found]

    # ---- operators' orders

    async def cancel(self, ids: Sequence[str], why: str, *, even_unknown: bool = False) -> list[Cancelled]:
        return await self._submit(
            lambda now: self._cancelling.cancel(ids, why, now, even_unknown=even_unknown)
        )

    @property
    def board(self) -> Board:
        """The switches that hold now."""
        return self._store.board

    async def put_switch(self, switch: Switch) -> Switch:
        return await self._submit(lambda now: self._switches.put(switch, now))

    async def remove_switches(self, numbers: Collection[int]) -> tuple[Switch, ...]:
        return await self._submit(lambda now: self._switches.remove(numbers))

    @property
    def demoted_to(self) -> DemotedTo:
        return self._switches.demoted_to

    async def replace_switches(
        self, source: SwitchSource, switches: Sequence[Switch], demoted_to: DemotedTo | None = None
    ) -> Replaced:
        return await self._submit(lambda now: self._switches.replace(source, switches, now, demoted_to))

    async def end_switches(self) -> tuple[Switch, ...]:
        return await self._submit(self._switches.end)

    async def apply_switches(self, after_row: int, limit: int) -> Looked:
        return await self._submit(lambda now: self._switches.apply(after_row, limit, now))

    async def demoted(self, limit: int) -> list[Leaving]:
        return await self._submit(lambda now: self._departures.demoted(limit))

    def watch_switches(self) -> Wake:
        """A wake-up for each commit that changed a switch."""
        wake = Wake()
        self._switch_watchers.append(wake)
        return wake

    # ---- limits

    async def relane(self, limit: int) -> int:
        """Let the limits of the policy hold, and move rows to the lanes that they make.

        Looks at `limit` rows at most; returns how many. Until all were looked at, nothing is handed out in
        namespaces whose tasks are limited otherwise than before.
        """
        if not self._relaning.is_due:
            return 0
        round_ = await self._submit(lambda now: self._relaning.round(limit, now))
        if self._relaning.done(round_):
            self._wake_claimers()
        return round_.looked

    async def limit_states(self) -> list[LimitState]:
        """What each limit allows, and what it is asked for now."""
        states = self._store.limits.states(self._clock.now().mono_ms)
        if self._store.limits.pools:
            states += await self._submit(lambda now: self._handouts.pool_states())
        return states

    def _expect_token(self, looked_ms: int) -> None:
        """Somebody goes away without rows: note when the next token comes that rows wait for.

        `looked_ms`: when it looked (monotonic). A token may have come since, and is due then.
        """
        if not self._store.limits.rated:
            return
        due_ms = self._store.limits.next_token_ms(looked_ms)
        if due_ms is not None and (self._token_due_ms is None or due_ms < self._token_due_ms):
            self._token_due_ms = due_ms
            self.short_of_tokens.set()

    def tokens_in_s(self) -> float:
        """In how many seconds `bring_tokens` should be called."""
        if self._token_due_ms is None:
            return TOKENS_AT_MOST_S
        in_ms = self._token_due_ms - self._clock.now().mono_ms
        return min(max(in_ms, TOKENS_AT_LEAST_MS) / 1000, TOKENS_AT_MOST_S)

    async def bring_tokens(self) -> int:
        """A token is there that rows waited for: let those who wait for rows look again."""
        due_ms = self._token_due_ms
        if due_ms is not None and due_ms <= self._clock.now().mono_ms:
            self._token_due_ms = None
            self._wake_claimers()
        return 0

    def _wake_claimers(self) -> None:
        for statuses, wake in self._watchers:
            if Status.PENDING in statuses:
                wake.set()

    # ---- what a look costs nothing

    def depths(self) -> list[Depth]:
        return self._store.depths()

    def claimable(
        self,
        application: str | None,
        namespaces: Collection[str],
        knows: KnownTasks | None = None,
        known_to_any: KnownTasks | None = None,
        pool: str = "",
    ) -> bool:
        """Whether a claim with these filters may find a row; costs no transaction."""
        if self.trouble or pool in self._store.full_pools:
            return False
        now_ms = self._clock.now().mono_ms if self._store.limits.rules else 0
        found = any(
            lane.counts[Status.PENDING] > 0
            and (application is None or lane.application == application)
            and (not namespaces or lane.namespace in namespaces)
            and (knows is None or knows.may_serve(*lane.name, known_to_any))
            and not self._store.gate(lane).closed
            and (not lane.limits or room(lane.limits, now_ms) > 0)
            and lane.namespace not in self._store.unsettled
            for lane in list(self._store.lanes.values())
        )
        if not found:
            self._expect_token(now_ms)
        return found

    def counts(self) -> Counter[Status]:
        """Rows by status, over all lanes."""
        total: Counter[Status] = Counter()
        for depth in self._store.depths():
            total[depth.status] += depth.count
        return total

    def size_bytes(self) -> int:
        """Of what is stored. Pages that were freed do not count: the file keeps them for what comes."""
        return self._store.used_bytes

    @property
    def policy(self) -> Policy:
        return self._store.policy

    def set_policy(self, policy: Policy) -> None:
        """From the next write on, these limits hold; what was handed out keeps its deadline.

        Limits of what may be handed out hold once `relane` was called, as `limits_changed` says.
        """
        self._store.policy = policy
        self.limits_changed.set()

    async def depths_by_partition(self) -> dict[tuple[str, int, Status], int]:
        """Rows that are not finished, by topic, partition and status; reads each, in another thread."""
        return await trio.to_thread.run_sync(self._store.depths_by_partition)

    def trace(self, on: bool) -> None:
        """Whether observers are told every transition by id, at the price of a look-up each."""
        self._store.traced = on

    def watch_all(self) -> Wake:
        """A wake-up for each commit that moved any row."""
        return self.watch(*Status)

    def watch_claimable(self) -> Wake:
        """A wake-up for each commit that may have made a row claimable."""
        if self._store.policy.strict_order_namespaces:  # there, an ended lease frees the next row
            return self.watch(Status.PENDING, *LEAVING)
        return self.watch(Status.PENDING)

    def watch(self, *statuses: Status) -> Wake:
        """A wake-up for each commit that moved a row into one of `statuses`."""
        wake = Wake()
        self._watchers.append((frozenset(statuses), wake))
        return wake

    def unwatch(self, wake: Wake) -> None:
        self._watchers = [entry for entry in self._watchers if entry[1] is not wake]

    async def _submit(self, write: Callable[[Now], T]) -> T:
        return await self._committer.submit(lambda: write(self._clock.now()))

    def _committed(self, changes: Changes) -> None:
        self.last_commit_mono_ms = self._clock.now().mono_ms
        entered = {status for _, status in changes.events}
        if changes.wakes_claims:
            entered.add(Status.PENDING)
        for statuses, wake in self._watchers:
            if not entered.isdisjoint(statuses):
                wake.set()
        if changes.board_before is not None:
            for wake in self._switch_watchers:
                wake.set()
        for observe in self.observers:
            try:
                observe(changes)
            except Exception:  # the rows are durable: who only watches must not make them look failed
                log.exception("an observer of the store failed")

    def _undone(self) -> None:
        """Whoever looked at the counters meanwhile saw what did not come to be, and has to look again."""
        for _, wake in self._watchers:
            wake.set()


@asynccontextmanager
async def open_inflight(
    path: Path,
    clock: Clock,
    policy: Policy,
    *,
    inline: bool = False,
    on_batch: OnBatch = lambda size, seconds: None,
) -> AsyncIterator[Inflight]:
    """Open the store at `path` while the block lasts; raises StartupError when that cannot be.

    `inline` writes in the caller's own task, for tests on the autojump clock.
    """
    store = SqliteStore(path, clock.now(), policy)
    try:
        if inline:
            inflight = Inflight(store, InlineCommitter(store.apply), clock)
            store.on_commit, store.on_undo = inflight._committed, inflight._undone
            store.on_damage = inflight.damaged.set
            yield inflight
            return
        token = trio.lowlevel.current_trio_token()
        committed: deque[Changes] = deque()

        def answered(size: int, seconds: float) -> None:
            # In the turn of the loop that answers the writes: to wake it once more would cost as much again.
            while committed:
                inflight._committed(committed.popleft())
            on_batch(size, seconds)

        async with open_group_commit(store.apply, name="taskd-store", on_batch=answered) as committer:
            inflight = Inflight(store, committer, clock)
            store.on_commit = committed.append
            store.on_undo = lambda: token.run_sync_soon(inflight._undone)
            store.on_damage = lambda: token.run_sync_soon(inflight.damaged.set)
            yield inflight
    finally:
        store.close()
