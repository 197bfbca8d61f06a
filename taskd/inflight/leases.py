"""Leases: what their holders say - started, reported, handed back - and their end without a word.

Who reports under a fence that is not the row's newest is superseded: somebody else has, or had, the row
since.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from taskd.activation.lifecycle import HELD, LEAVING, Event, Status
from taskd.clock import Now
from taskd.inflight.base import LeaseKind, Ref, Report, ReportStatus, Verdict
from taskd.inflight.departures import Departures
from taskd.inflight.held import HeldRows
from taskd.inflight.sqlite import SqliteStore
from taskd.wire.envelope import scan

MAX_ERROR_CHARS = 4_096  # of an error text kept with a row
MAX_ATTEMPTS_MARGIN = 3  # of retries beyond max_attempts; a worker that counts from elsewhere is no loop
MAX_REASON_CHARS = 64  # of the word that names a reason
WITHOUT_FENCE = frozenset({LeaseKind.UNARY, LeaseKind.PUSH})  # these holders report by id alone


@dataclass(slots=True)
class Leased:
    """One row as its lease sees it; the columns of `leased`."""

    row: int
    status: Status
    lane: int
    fence: int
    kind: int
    attempts: int
    counted: bool
    started: bool
    at_most_once: bool
    dead_letter: bool
    deadline_ms: int
    received_at_ms: int

    def __post_init__(self) -> None:
        self.status = Status(self.status)
        self.dead_letter = bool(self.dead_letter)


class Leases:
    """`held`: what was handed out, as it is remembered."""

    def __init__(self, store: SqliteStore, departures: Departures, held: HeldRows) -> None:
        self._store = store
        self._departures = departures
        self._held = held

    # ---- what the holder says

    def start(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """The holder began: the attempt counts, the deadline runs."""
        verdicts: list[Verdict] = []
        for is_plain, group in groupby(refs, self._held.has_not_started):
            together = list(group)
            if is_plain and self._held.start(together, now):
                verdicts += [Verdict.APPLIED] * len(together)
            else:
                verdicts += [self._start(ref, now) for ref in together]
        return verdicts

    def _start(self, ref: Ref, now: Now) -> Verdict:
        leased = self._find(ref.id)
        if leased is None:
            return Verdict.UNKNOWN
        if leased.status is not Status.PROCESSING or leased.fence != ref.fence:
            return Verdict.SUPERSEDED
        if not leased.started:
            self._begin(leased, now)
        return Verdict.APPLIED

    def _begin(self, leased: Leased, now: Now) -> None:
        end_ms = now.mono_ms + leased.deadline_ms + self._store.policy.grace_ms
        self._store.run("start", not leased.counted, end_ms, now.wall_ms, now.mono_ms, leased.row)
        self._store.measure("received_to_started", now.wall_ms - leased.received_at_ms)
        leased.attempts += not leased.counted
        leased.counted = leased.started = True

    def complete(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """The work of these is done: as `report` of each, cheaper."""
        if self._held.complete(refs, now):
            return [Verdict.APPLIED] * len(refs)
        return self.report([Report(id_, fence, ReportStatus.COMPLETE) for id_, fence in refs], now)

    def report(self, reports: Sequence[Report], now: Now) -> list[Verdict]:
        """Outcomes of leases. A late one counts as long as nobody else was given the row."""
        verdicts: list[Verdict] = []
        for is_plain, group in groupby(reports, self._is_plain):
            together = list(group)
            if is_plain and self._held.complete([report[:2] for report in together], now):
                verdicts += [Verdict.APPLIED] * len(together)
            else:
                verdicts += [self._report(report, now) for report in together]
        return verdicts

    def _is_plain(self, report: Report) -> bool:
        return report.status is ReportStatus.COMPLETE and self._held.has(report[:2])

    def _report(self, report: Report, now: Now) -> Verdict:
        self._held.forget(report[:2])
        leased = self._find(report.id)
        if leased is None:
            return Verdict.UNKNOWN
        newest = leased.kind in WITHOUT_FENCE if report.fence is None else leased.fence == report.fence
        if not newest or leased.status not in (Status.PROCESSING, Status.PENDING, Status.CLAIMED):
            return Verdict.SUPERSEDED
        if leased.kind != LeaseKind.UNARY and leased.status in HELD and not leased.started:
            self._begin(leased, now)  # the result overtook its START, or carried it: it started all the same
        if report.status is ReportStatus.CRASHED:
            if leased.status is Status.PROCESSING:
                self._crash(leased, now, report.error[:MAX_ERROR_CHARS])
            return Verdict.APPLIED
        if report.status is ReportStatus.INTERRUPTED:
            if leased.status is Status.PROCESSING:
                self._end(leased, now, "interrupted", report.error[:MAX_ERROR_CHARS], forgive=True)
            return Verdict.APPLIED
        self._finish(leased, report, now)
        self._store.measure("received_to_finished", now.wall_ms - leased.received_at_ms)
        return Verdict.APPLIED

    def _finish(self, leased: Leased, report: Report, now: Now) -> None:
        row, lane, before = leased.row, leased.lane, leased.status
        reason, error = report.reason[:MAX_REASON_CHARS], report.error[:MAX_ERROR_CHARS]
        if report.status is ReportStatus.COMPLETE:
            status = self._store.move(row, lane, before, Event.COMPLETED)
            self._departures.finish(row, lane, status, now)
        elif report.status is ReportStatus.FAILURE:
            reason = reason or "failed"
            self._departures.fail(row, lane, before, Event.FAILED, leased.dead_letter, now, reason, error)
        elif leased.at_most_once:  # a retry is a second run; workers of ours ask for none
            why = (now, "at_most_once", error)
            self._departures.fail(row, lane, before, Event.FAILED, leased.dead_letter, *why)
        elif self._retries_without_end(row, report):
            self._departures.fail(row, lane, before, Event.FAILED, True, now, "max_attempts", error)
        else:
            status = self._store.move(row, lane, before, Event.RETRY_ASKED)
            follow = (report.max_attempts, report.delay_on_retry_s)
            self._store.run("leave", status, reason or "retry", error, *follow, row)

    def _retries_without_end(self, row: int, report: Report) -> bool:
        """Whether this retry is far beyond the attempts it may have, which its worker should have noticed.

        One that names no limit has none. Off by default: workers decide between retry and failure.
        """
        if not self._store.policy.enforce_max_attempts:
            return False
        envelope = scan(self._store.one("activation", row)[0])
        limit = envelope.max_attempts if report.max_attempts is None else report.max_attempts
        return limit > 0 and envelope.attempts + 1 > limit + MAX_ATTEMPTS_MARGIN

    def hand_back(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """The holder did not start these, or never got them: they wait again, their attempt undone."""
        return [self._hand_back(ref) for ref in refs]

    def _hand_back(self, ref: Ref) -> Verdict:
        self._held.forget(ref)
        leased = self._find(ref.id)
        if leased is None:
            return Verdict.UNKNOWN
        if leased.status is not Status.PROCESSING or leased.fence != ref.fence or leased.started:
            return Verdict.SUPERSEDED
        self._store.move(leased.row, leased.lane, Status.PROCESSING, Event.HANDED_BACK)
        self._store.run("requeue", int(leased.counted), leased.row)
        self._store.return_token(leased.row, leased.lane)
        return Verdict.APPLIED

    # ---- what the holder no longer says

    def reconcile(self, holder: str, holding: Iterable[Ref], now: Now) -> int:
        """End the leases of `holder` that it does not name as its own. Returns how many."""
        held = {(ref.id, ref.fence) for ref in holding}
        lost = [id_ for id_, fence in self._store.run("held_by", holder) if (id_, fence) not in held]
        for id_ in lost:
            self._end_by_id(id_, now, "lost on the way to its worker")
        return len(lost)

    def lost(self, refs: Iterable[Ref]) -> list[Ref]:
        """Those that are over for good: their row is gone or about to go, or was handed out again since."""
        return [
            ref
            for ref in refs
            if (row := self._find(ref.id)) is None or row.fence != ref.fence or row.status in LEAVING
        ]

    def held_ids(self, limit: int) -> list[str]:
        """Some of the activations that are with workers now."""
        return [id_ for (id_,) in self._store.run("held", limit)]

    def holders(self) -> list[str]:
        """Workers that hold a stream lease."""
        return [holder for (holder,) in self._store.run("holders")]

    def end_overdue(self, limit: int, now: Now) -> int:
        """End the leases whose time is over. Returns how many."""
        overdue = [id_ for (id_,) in self._store.run("leases_over", now.mono_ms, limit)]
        for id_ in overdue:
            self._end_by_id(id_, now, "its deadline passed without a report")
        return len(overdue)

    def _end_by_id(self, id_: str, now: Now, why: str) -> None:
        leased = self._find(id_)
        assert leased is not None  # read in this very transaction
        self._held.forget((id_, None if leased.kind == LeaseKind.UNARY else leased.fence))
        self._end(leased, now, "deadline", why)

    def _crash(self, leased: Leased, now: Now, error: str) -> None:
        """Its process ended under it. One that does so again and again would take down the next one, too."""
        (crashes,) = self._store.one("crash", leased.row)
        self._end(leased, now, "poison", error, may_wait=crashes < self._store.policy.max_crashes)

    def _end(
        self,
        leased: Leased,
        now: Now,
        reason: str,
        error: str,
        *,
        forgive: bool = False,
        may_wait: bool = True,
    ) -> None:
        """A lease ended without an outcome: wait again, unless that may not be.

        `forgive`: as if it had not been an attempt. `may_wait`: as far as is known outside.
        """
        may_wait &= leased.attempts < self._store.policy.max_processing_attempts
        if leased.at_most_once:
            reason = "at_most_once"
        elif forgive or may_wait:
            self._store.move(leased.row, leased.lane, Status.PROCESSING, Event.LEASE_ENDED)
            self._store.run("requeue", int(forgive and leased.counted), leased.row)
            return
        self._departures.fail(
            leased.row,
            leased.lane,
            Status.PROCESSING,
            Event.EXHAUSTED,
            leased.dead_letter,
            now,
            reason,
            error,
        )

    def _find(self, id_: str) -> Leased | None:
        """The row; None when there is none, or only its tombstone."""
        found = self._store.one("leased", id_)
        return None if found is None else Leased(*found)
