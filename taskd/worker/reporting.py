"""Gives results to a broker of the plain protocol, again and again until it took them.

Its answers, as the protocol has them: OK means taken, whether it knew the activation or not. NOT_FOUND is
taken for that too, as existing workers do. A result it calls invalid it would never take. Anything else,
no answer included, means: send it again.
"""

from __future__ import annotations

import random

import structlog

from taskd.errors import PeerError, Refused
from taskd.telemetry import metrics
from taskd.wire import consumer
from taskd.wire.consumer import Filter, StatusUpdate
from taskd.wire.frames import Result, ResultStatus
from taskd.worker.plain import CALL_WITHIN_S, Caller, PlainAccount, Restraint

log = structlog.get_logger("taskd.worker")

MAX_RESULTS_PER_CALL = 1_000  # some 60 bytes each: far below the 4 MiB of existing brokers
_NO_BATCH = ("UNIMPLEMENTED", "INVALID_ARGUMENT", "NOT_FOUND")  # then one by one

_STATUS = {
    ResultStatus.COMPLETE: consumer.COMPLETE,
    ResultStatus.FAILURE: consumer.FAILURE,
    ResultStatus.RETRY: consumer.RETRY,
}


class Reporting:
    """Results on their way to one broker; they stay in the account until they are taken."""

    def __init__(self, address: str, account: PlainAccount, rng: random.Random) -> None:
        self.restraint = Restraint(address, "reporting results", rng)
        self.under_way = 0  # calls
        self._account = account
        self._batches = True

    def due(self, now: float) -> bool:
        """Whether there are results that may be sent now."""
        return self._account.has_results and now >= self.restraint.until

    def next_due(self) -> float:
        return self.restraint.until if self._account.has_results else float("inf")

    @property
    def has_ended(self) -> bool:
        """Whether a worker that stops has told what the broker takes now."""
        return not self.under_way and (bool(self.restraint.trouble) or not self._account.has_results)

    def begin(self, most: int) -> list[Result]:
        """The next results, counted as under way until `send` or `send_for_next` has ended."""
        self.under_way += 1
        return self._account.next_results(most)

    async def send(self, client: Caller, results: list[Result]) -> None:
        """Send these, in one call where that is possible."""
        try:
            if len(results) > 1 and self._batches and await self._send_batch(client, results):
                return
            for position, result in enumerate(results):
                if await self._send_one(client, result, None) is None:
                    self._account.again(results[position:])
                    return
        finally:
            self.under_way -= 1

    async def send_for_next(self, client: Caller, result: Result, wanted: Filter) -> bytes | None:
        """Send this one and ask for a task; the reply, or None when there is none to rely on."""
        try:
            reply = await self._send_one(client, result, wanted)
            if reply is None:
                self._account.again([result])
            return reply
        finally:
            self.under_way -= 1

    async def _send_batch(self, client: Caller, results: list[Result]) -> bool:
        """False: they must be sent one by one."""
        body = consumer.encode_status_batch(_update(result, None) for result in results)
        try:
            await client.call(consumer.SET_BATCH_STATUS, body, timeout_s=CALL_WITHIN_S)
        except PeerError as error:
            if isinstance(error, Refused) and error.code in _NO_BATCH:
                self._batches = error.code != "UNIMPLEMENTED"
                return False
            self._account.again(results)
            self.restraint.failed(str(error))
            return True
        self._taken(results)
        return True

    async def _send_one(self, client: Caller, result: Result, wanted: Filter | None) -> bytes | None:
        """The reply; None: it must be sent again."""
        body = consumer.encode_status_update(_update(result, wanted))
        reply = b""
        try:
            reply = await client.call(consumer.SET_TASK_STATUS, body, timeout_s=CALL_WITHIN_S)
        except PeerError as error:
            code = error.code if isinstance(error, Refused) else ""
            if code == "INVALID_ARGUMENT":
                metrics.worker_results_refused.inc()
                log.error(
                    "the broker does not accept this result, it is given up",
                    id=result.id,
                    status=result.status.name.lower(),
                    error=str(error),
                )
            elif code != "NOT_FOUND":
                self.restraint.failed(str(error))
                return None
        self._taken([result])
        return reply

    def _taken(self, results: list[Result]) -> None:
        self.restraint.succeeded()
        self._account.taken([result.lease for result in results])


def _update(result: Result, wanted: Filter | None) -> StatusUpdate:
    status = _STATUS.get(result.status, consumer.FAILURE)
    if status != consumer.RETRY:
        return StatusUpdate(result.id, status, wanted)
    return StatusUpdate(result.id, status, wanted, result.max_attempts, result.delay_on_retry_s)
