"""Work that a broker of the published protocol brings: the worker is the server, `WorkerService`.

A call is answered with OK once its task has a slot, and then the task will be run and reported. While all
slots are taken a caller waits a little, so that a slot that becomes free gets its next task at once.
Results go to the one broker that the pool names.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import structlog
import trio

from taskd.clock import SystemClock
from taskd.config.schema import PoolSection
from taskd.errors import Refused, Undecodable
from taskd.rpc.access import listen_tls, revealed, server_guard
from taskd.rpc.base import Services, Unary
from taskd.rpc.health import health_services
from taskd.rpc.server import serve
from taskd.wire import pushing
from taskd.wire.envelope import Envelope, scan
from taskd.wire.frames import LeaseRef, Result
from taskd.worker.backlog import Backlog
from taskd.worker.plain import CallConnector, Caller, PlainAccount, PlainLink, assignment, takes
from taskd.worker.reporting import MAX_RESULTS_PER_CALL, Reporting

log = structlog.get_logger("taskd.worker")

SLOT_WITHIN_S = 5.0  # how long a caller may wait for a slot (contract, push delivery)

Listen = Callable[[Services], AbstractAsyncContextManager[object]]
"""Serves these while its block lasts."""


class PushLink(PlainLink):
    """Takes what is pushed, and reports to the broker at `address`.

    `free_slots(is_async)`: how many tasks of this kind could start now. `is_ready`: whether a child can take
    work at all.
    """

    def __init__(
        self,
        address: str,
        config: PoolSection,
        backlog: Backlog,
        *,
        free_slots: Callable[[bool], int],
        is_ready: Callable[[], bool],
        connect: CallConnector,
        on_change: Callable[[], None],
        rng: random.Random,
    ) -> None:
        account = PlainAccount(address)
        super().__init__(address, account, connect=connect, on_change=on_change)
        backlog.accounts[address] = account
        self._config = config
        self._backlog = backlog
        self._free_slots = free_slots
        self._is_ready = is_ready
        self._reporting = Reporting(address, account, rng)
        self._doors = {kind: trio.Lock() for kind in (False, True)}  # callers wait in a line for each kind
        self._change = trio.Event()

    def wake(self) -> None:
        super().wake()
        self._change.set()
        self._change = trio.Event()

    @property
    def services(self) -> Services:
        known = ("", pushing.SERVICE)
        return {
            pushing.PUSH_TASK: Unary(self.push_task),
            **health_services(lambda service: self._is_serving() if service in known else None),
        }

    def _is_serving(self) -> bool:
        return self._is_ready() and not self._backlog.closed

    # ---- taking

    async def push_task(self, request: bytes) -> bytes:
        """PushTask. Once this returned, the task is the worker's."""
        try:
            activation = pushing.decode_push(request)
            envelope = scan(activation)
        except Undecodable as error:
            raise Refused("INVALID_ARGUMENT", f"the request cannot be read: {error}") from None
        self._check_fits(envelope)
        is_async = self._backlog.is_async(activation)
        with trio.move_on_after(SLOT_WITHIN_S):
            async with self._doors[is_async]:
                if self._has(envelope.id):
                    return b""  # pushed again, as its first answer was lost: it is here
                await self._until_free(is_async)
                self._backlog.accept(self.account, [assignment(activation, envelope)], trio.current_time())
                return b""
        raise Refused("RESOURCE_EXHAUSTED", pushing.BUSY)

    def _check_fits(self, envelope: Envelope) -> None:
        if not takes(self._config, envelope):
            raise Refused(
                "FAILED_PRECONDITION",
                f"this worker takes application {self._config.application!r}, namespaces "
                f"{list(self._config.namespaces) or 'any'}; this is {envelope.application!r}, "
                f"{envelope.namespace!r}: look at the broker's worker_map",
            )

    def _has(self, id_: str) -> bool:
        lease = LeaseRef(id_, 0)
        return lease in self.account.jobs or lease in self.account.untaken

    async def _until_free(self, is_async: bool) -> None:
        while True:
            change = self._change
            if self._backlog.closed:
                raise Refused("UNAVAILABLE", "the worker is stopping; push to another one")
            if self._free_slots(is_async) > 0 and not self.account.is_full:
                return
            await change.wait()

    # ---- reporting

    def _begin(self, calls: trio.Nursery, client: Caller) -> bool:
        if self._backlog.closed:
            self._reporting.restraint.hurry()
        if self._reporting.under_way or not self._reporting.due(trio.current_time()):
            return False
        calls.start_soon(self._report, client, self._reporting.begin(MAX_RESULTS_PER_CALL))
        return True

    async def _report(self, client: Caller, results: list[Result]) -> None:
        await self._reporting.send(client, results)
        self._answered(not self._reporting.restraint.trouble)
        self._on_change()

    def _due(self) -> float:
        return self._reporting.next_due()

    def _has_ended(self) -> bool:
        return self._reporting.has_ended


def listener(config: PoolSection, context: ssl.SSLContext | None = None) -> Listen:
    """Serves where the pool listens. Raises StartupError: when called, for TLS; when opened, for the port.

    `context` of TLS; without, it is made of the pool's files.

    Who can reach it and knows a secret of the pool (or, without secrets, anybody) can have tasks run.
    """
    where = config.listen
    context = context or listen_tls(where)
    guard = server_guard(revealed(config.secrets), SystemClock())

    @asynccontextmanager
    async def listen(services: Services) -> AsyncIterator[None]:
        limit = pushing.MAX_PUSH_BYTES
        async with serve(
            services, where.host, where.port, max_request_bytes=limit, guard=guard, tls=context
        ) as port:
            signed = bool(config.secrets)
            log.info("pool listens", push=f"{where.host}:{port}", signed=signed, tls=context is not None)
            yield

    return listen
