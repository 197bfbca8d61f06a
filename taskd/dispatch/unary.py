"""Unary calls: the service existing workers of the protocol speak, to fetch work and to report it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from taskd.dispatch.roster import Roster
from taskd.dispatch.rounds import Rounds, Wanted
from taskd.errors import Refused, Undecodable
from taskd.inflight.base import Lease, Ref, Report, ReportStatus
from taskd.inflight.writer import Inflight
from taskd.rpc.base import Reply, Services, Unary
from taskd.wire import consumer
from taskd.wire.consumer import Filter, StatusUpdate

T = TypeVar("T")

# In this order a batch is applied, whatever order it came in.
_STATUSES = {
    consumer.COMPLETE: ReportStatus.COMPLETE,
    consumer.FAILURE: ReportStatus.FAILURE,
    consumer.RETRY: ReportStatus.RETRY,
}


class UnaryDispatch:
    """`sentry_protos.taskbroker.v1.ConsumerService`. Once `draining` is set, nothing is handed out.

    `hands_out` False: delivery is push; results are taken, and nobody can fetch.
    """

    def __init__(
        self, inflight: Inflight, roster: Roster, draining: trio.Event, *, hands_out: bool = True
    ) -> None:
        self._inflight = inflight
        self._rounds = Rounds(inflight, draining)
        self._roster = roster
        self._draining = draining
        self._hands_out = hands_out

    @property
    def services(self) -> Services:
        return {
            f"/{consumer.SERVICE}/GetTask": Unary(self.get_task),
            f"/{consumer.SERVICE}/SetTaskStatus": Unary(self.set_task_status),
            f"/{consumer.SERVICE}/SetBatchActivationStatus": Unary(self.set_batch_status),
        }

    async def get_task(self, request: bytes) -> Reply:
        wanted = _decoded(consumer.decode_filter, request)
        if not self._hands_out:
            raise Refused(
                "PERMISSION_DENIED", "this broker pushes its work to workers; start this one in push mode"
            )
        self._refuse_while_draining()
        lease = await self._claim(wanted)
        if lease is None:
            self._refuse_while_draining()
            raise Refused("NOT_FOUND", "No pending activations")
        return self._reply(lease)

    async def set_task_status(self, request: bytes) -> Reply:
        update = _decoded(consumer.decode_status_update, request)
        wanted = None
        if update.fetch_next is not None and self._hands_out:
            wanted = self._wanted(update.fetch_next)
        return self._reply(await self._rounds.work(_reports([update]), wanted))

    async def set_batch_status(self, request: bytes) -> bytes:
        reports = _reports(_decoded(consumer.decode_status_batch, request))
        if reports:
            await self._rounds.work(reports)
        return b""

    def _refuse_while_draining(self) -> None:
        if self._draining.is_set():
            raise Refused("UNAVAILABLE", "the broker is stopping; ask another one")

    def _wanted(self, wanted: Filter) -> Wanted | None:
        """None: nothing can be what is asked for."""
        if wanted.namespace is not None and wanted.application is None:
            return None
        self._roster.asked(wanted.application)
        return Wanted(wanted.application, () if wanted.namespace is None else (wanted.namespace,))

    async def _claim(self, filter_: Filter) -> Lease | None:
        wanted = self._wanted(filter_)
        # Who polls and finds nothing shall cost no transaction.
        if wanted is None or not self._inflight.claimable(wanted.application, wanted.namespaces):
            return None
        return await self._rounds.work((), wanted)

    def _reply(self, lease: Lease | None) -> Reply:
        if lease is None:
            return Reply(consumer.encode_task(None))

        async def undo() -> None:
            await self._inflight.hand_back([Ref(lease.id, lease.fence)])

        return Reply(consumer.encode_task(lease.activation), undelivered=undo)


def _reports(updates: Sequence[StatusUpdate]) -> list[Report]:
    """In the order they are applied. Raises Refused when a status is none that can be set."""
    for update in updates:
        if update.status not in _STATUSES:
            raise Refused(
                "INVALID_ARGUMENT",
                f"status {update.status} of {update.id!r} cannot be set; "
                f"expected {consumer.FAILURE} (FAILURE), {consumer.RETRY} (RETRY) or "
                f"{consumer.COMPLETE} (COMPLETE)",
            )
    order = list(_STATUSES)
    return [_report(update) for update in sorted(updates, key=lambda u: order.index(u.status))]


def _report(update: StatusUpdate) -> Report:
    is_retry = update.status == consumer.RETRY
    return Report(
        id=update.id,
        fence=None,
        status=_STATUSES[update.status],
        max_attempts=update.max_attempts if is_retry else None,
        delay_on_retry_s=update.delay_on_retry_s if is_retry else None,
    )


def _decoded(decode: Callable[[bytes], T], request: bytes) -> T:
    try:
        return decode(request)
    except Undecodable as error:
        raise Refused("INVALID_ARGUMENT", f"the request cannot be read: {error}") from None
