"""The plain protocol, `sentry_protos.taskbroker.v1`, as a worker uses it: what pull and push share.

Existing brokers speak it, and ours. It has no leases with signs of life, no fences and no way to hand
work back: whoever was given an activation has it until its processing deadline, counted from the
hand-out. So nothing is taken that cannot start at once, and what was taken is run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Protocol

import structlog
import trio

from taskd.config.schema import PoolSection
from taskd.wire.envelope import Envelope
from taskd.wire.frames import Assignment, Result, ResultStatus
from taskd.worker.link import BACKOFF_STOPPING_S, State
from taskd.worker.results import DEFAULT_DEADLINE_MS, Account, Job

log = structlog.get_logger("taskd.worker")

PURPOSES = {
    "stream": "for brokers of taskd",
    "pull": "for any broker of the taskbroker protocol: asks for work, task by task",
    "push": "for a broker of the taskbroker protocol that calls its workers",
}
CALL_WITHIN_S = 10.0
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.1, 10.0


class Caller(Protocol):
    """Calls to one broker; `taskd.rpc.client.Client` is one."""

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes: ...


CallConnector = Callable[[str], AbstractAsyncContextManager[Caller]]
"""A client for an address. Opening it must not need the broker: it connects when called."""


class BrokerLink(Protocol):
    """What a pool knows of each of its brokers, whatever they speak."""

    address: str
    state: State

    @property
    def account(self) -> Account | None: ...

    @property
    def connected(self) -> bool: ...

    async def run(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class PlainAccount(Account):
    """What this worker owes to one address, which stands for the store behind it."""

    moves_deadlines: ClassVar[bool] = False

    def start(self, job: Job) -> None:
        self.running.add(job.lease)

    def heartbeat(self, job: Job, progress: float | None, message: str) -> None:
        """It cannot be told either."""

    def finish(self, job: Job, result: Result) -> None:
        if result.status is not ResultStatus.INTERRUPTED:
            super().finish(job, result)
            return
        self.forget(job)  # it is to run again, and that is what the broker's deadline makes of silence
        log.warning("given up, left to the broker's deadline", id=job.lease.id, reason=result.reason)

    def crash(self, job: Job, result: Result) -> None:
        """There is no such status. No policy allows a crash, so it is the failure it would be there."""
        self.finish(job, result._replace(status=ResultStatus.FAILURE))

    def hand_back(self, job: Job) -> None:
        """It cannot be: the broker finds out by the deadline."""
        self.forget(job)
        log.warning("not started in time, left to the broker's deadline", id=job.lease.id)

    @property
    def has_results(self) -> bool:
        return bool(self._results)

    def next_results(self, most: int) -> list[Result]:
        """The oldest results that are not under way; `taken` or `again` is told what became of them."""
        return [self._results.popleft() for _ in range(min(most, len(self._results)))]

    def again(self, results: list[Result]) -> None:
        """They did not arrive, or nobody knows."""
        self._results.extendleft(reversed(results))


class Restraint:
    """How long a broker is left alone after calls that failed. The log hears of the first and of the end."""

    def __init__(self, address: str, what: str, rng: random.Random) -> None:
        self.until = float("-inf")  # Trio's clock
        self.trouble = ""
        self._address = address
        self._what = what
        self._rng = rng
        self._failures = 0
        self._most_s = BACKOFF_MOST_S

    def hurry(self) -> None:
        """The worker stops: it has little time, so the next attempts follow soon."""
        self._most_s = BACKOFF_STOPPING_S
        self.until = min(self.until, trio.current_time() + BACKOFF_STOPPING_S)

    def failed(self, why: str) -> None:
        if trio.current_time() < self.until:
            return  # calls that were under way when the first one failed
        self._failures += 1
        longest_s = min(BACKOFF_FIRST_S * 2 ** min(self._failures - 1, 10), self._most_s)
        self.until = trio.current_time() + self._rng.uniform(longest_s / 2, longest_s)
        tell = log.debug if self.trouble else log.warning
        tell(f"{self._what} failed, trying again", address=self._address, error=why)
        self.trouble = why

    def succeeded(self) -> None:
        if self.trouble:
            log.info(f"{self._what} works again", address=self._address, failures=self._failures)
        self._failures, self.trouble = 0, ""


class PlainLink:
    """One broker. Subclasses say what there is to do; what they begin runs in the nursery of `run`.

    `on_change`: called when something came or went, so that others look again.
    """

    def __init__(
        self, address: str, account: PlainAccount, *, connect: CallConnector, on_change: Callable[[], None]
    ) -> None:
        self.address = address
        self.account = account
        self.state: State = "connecting"
        self._connect = connect
        self._on_change = on_change
        self._wake = trio.Event()
        self._closing = False

    @property
    def connected(self) -> bool:
        return self.state == "working"

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def close(self) -> None:
        """Nothing new: tell what can be told, then end."""
        self._closing = True
        self.wake()

    async def run(self) -> None:
        """Work with this broker until `close` or cancelled."""
        try:
            async with self._connect(self.address) as client, trio.open_nursery() as calls:
                while not (self._closing and self._has_ended()):
                    self._wake = trio.Event()
                    if self._begin(calls, client):
                        continue
                    with trio.move_on_at(self._due()):
                        await self._wake.wait()
                calls.cancel_scope.cancel()
        finally:
            self.state = "down"
            self._on_change()

    def _answered(self, works: bool) -> None:
        before, self.state = self.state, "working" if works else "down"
        if works and before == "connecting":
            log.info("broker answers", address=self.address)

    # ---- for subclasses

    def _begin(self, calls: trio.Nursery, client: Caller) -> bool:
        """Begin one call, if there is one to make now; else False."""
        raise NotImplementedError

    def _due(self) -> float:
        """When to look again though nobody wakes this link."""
        raise NotImplementedError

    def _has_ended(self) -> bool:
        """Whether nothing more can be told, now that it closes."""
        raise NotImplementedError


def assignment(activation: bytes, envelope: Envelope) -> Assignment:
    """What was handed out, in the terms of the pool. It counts from now, so it must start before it ends."""
    deadline_ms = envelope.processing_deadline_s * 1000 or DEFAULT_DEADLINE_MS
    return Assignment(envelope.id, 0, activation, deadline_ms, expires_in_ms=deadline_ms)


def takes(config: PoolSection, envelope: Envelope) -> bool:
    """Whether it is of what the pool says it takes."""
    fits = config.application is None or envelope.application == config.application
    return fits and (not config.namespaces or envelope.namespace in config.namespaces)
