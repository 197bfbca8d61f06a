"""Unary calls that are in flight at once share a transaction: what all of them report, what all of them get.

A call that is alone waits for nobody. Who comes while a round is under way goes with the next one, which
begins as soon as that one ends. So under load the rows of many calls become few statements and one commit,
where each call by itself would cost two.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import outcome
import trio

from taskd.inflight.base import ClaimRequest, Lease, LeaseKind, Report, ReportStatus, Verdict
from taskd.inflight.writer import Inflight
from taskd.telemetry import metrics

CALLS_IN_ROUND = 256  # so many rows are written in some milliseconds


# Looked up once: in a round of one call that took as long as its claim.
_RESULTS = {
    status: metrics.results.labels("unary", status.value)
    for status in (ReportStatus.COMPLETE, ReportStatus.FAILURE, ReportStatus.RETRY)
}
_CLAIMS = metrics.claims.labels("unary")


class Wanted(NamedTuple):
    """Which activation a caller takes. `application` None: of any; `namespaces` empty: of any."""

    application: str | None = None
    namespaces: tuple[str, ...] = ()

    def request(self, limit: int) -> ClaimRequest:
        # Each goes in a reply of its own, so how large one is does not concern who gets the next.
        return ClaimRequest(
            limit,
            LeaseKind.UNARY,
            application=self.application,
            namespaces=self.namespaces,
            max_bytes=sys.maxsize,
        )


@dataclass(eq=False, slots=True)
class _Call:
    """One call's part in a round."""

    reports: Sequence[Report]
    wanted: Wanted | None
    task: trio.lowlevel.Task | None = None  # of the caller, while it waits
    begun: bool = False  # its round
    looks_again: bool = False  # its claim met so much else that it found nothing yet
    result: outcome.Outcome[Lease | None] | None = None

    def wake(self) -> None:
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None


class Rounds:
    """The calls of one broker. Once `draining` is set, nothing is handed out."""

    def __init__(self, inflight: Inflight, draining: trio.Event) -> None:
        self._inflight = inflight
        self._draining = draining
        self._gathered: list[_Call] = []
        self._under_way = False
        self._had_company = False  # the last call that was served

    async def work(self, reports: Sequence[Report], wanted: Wanted | None = None) -> Lease | None:
        """Write `reports`, and lease what is `wanted`; None: nothing is there, or nothing was wanted.

        Returns once both are durable. Raises StoreError; then the lease was not made, and the reports may be
        sent again. Cancelling is noticed once the reports are written, and withdraws what is wanted if that
        was not begun; the lease of a call that is cancelled later is its caller's to hand back.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        call = _Call(reports, wanted)
        self._gathered.append(call)
        if self._under_way:
            await self._turn(call)
        else:
            self._under_way = True
            if self._had_company:
                # Calls that were read together begin in one turn of the loop: let the others come along.
                await trio.lowlevel.cancel_shielded_checkpoint()
        if call.result is None:
            await self._lead()
            assert call.result is not None
        lease = call.result.unwrap()
        if call.looks_again and lease is None and wanted is not None and not self._draining.is_set():
            leases = await self._inflight.claim(wanted.request(1))
            _CLAIMS.inc(len(leases))
            return leases[0] if leases else None
        return lease

    async def _turn(self, call: _Call) -> None:
        """Wait until the call's round is over, or until it has to lead it."""

        def abort(_: object) -> trio.lowlevel.Abort:
            if not call.begun:
                call.wanted = None  # nobody is there to take it
                if not call.reports:
                    self._gathered.remove(call)
                    return trio.lowlevel.Abort.SUCCEEDED
            return trio.lowlevel.Abort.FAILED  # what it reports happened, whoever waits to hear of it

        call.task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    async def _lead(self) -> None:
        """Serve what has gathered, then pass the lead on."""
        calls = self._gathered[:CALLS_IN_ROUND]
        del self._gathered[:CALLS_IN_ROUND]
        self._had_company = len(calls) > 1
        for call in calls:
            call.begun = True
        try:
            with trio.CancelScope(shield=True):
                await self._serve(calls)
        except BaseException as error:  # an end of this task would hang all the others
            for call in calls:
                call.result = call.result or outcome.Error(error)
            raise
        finally:
            for call in calls:
                call.wake()
            self._under_way = bool(self._gathered)
            if self._gathered:
                self._gathered[0].wake()

    async def _serve(self, calls: Sequence[_Call]) -> None:
        wanting: dict[Wanted, list[_Call]] = {}
        if not self._draining.is_set():
            for call in calls:
                if call.wanted is not None:
                    wanting.setdefault(call.wanted, []).append(call)
        reports = [report for call in calls for report in call.reports]
        requests = [wanted.request(len(group)) for wanted, group in wanting.items()]
        try:
            verdicts, claims = await self._inflight.report_and_claim(reports, requests)
        except Exception as error:
            if len(calls) == 1:
                calls[0].result = await self._apart(calls[0], error)
                return
            for call in calls:  # each by itself: what is wrong with one of them is nobody else's trouble
                await self._serve([call])
            return
        for call in calls:
            call.result = outcome.Value(None)
        for group, claimed in zip(wanting.values(), claims, strict=True):
            for call, lease in zip_longest(group, claimed.leases):
                call.result = outcome.Value(lease)
                call.looks_again = claimed.cut_short
        _count(reports, verdicts, sum(len(claimed.leases) for claimed in claims))

    async def _apart(self, call: _Call, error: Exception) -> outcome.Outcome[Lease | None]:
        """One call whose write failed: its report is durable also if the claim is what cannot be."""
        if call.wanted is None:
            return outcome.Error(error)
        try:
            if call.reports:
                _count(call.reports, await self._inflight.report(call.reports), 0)
            if self._draining.is_set():
                return outcome.Value(None)
            leases = await self._inflight.claim(call.wanted.request(1))
        except Exception as failure:
            return outcome.Error(failure)
        _CLAIMS.inc(len(leases))
        return outcome.Value(leases[0] if leases else None)


def _count(reports: Sequence[Report], verdicts: Sequence[Verdict], leases: int) -> None:
    for status, count in Counter([report.status for report in reports]).items():
        _RESULTS[status].inc(count)
    late = len(verdicts) - verdicts.count(Verdict.APPLIED)
    if late:
        metrics.superseded_results.inc(late)
    if leases:
        _CLAIMS.inc(leases)
