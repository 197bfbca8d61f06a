"""One call on the server: its request read, its handler run, its outcome told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import assert_never

import structlog
import trio
from grpclib.const import Status
from grpclib.metadata import decode_timeout, encode_grpc_message
from h2.errors import ErrorCodes

from taskd import aio
from taskd.errors import PeerUnavailable, Refused
from taskd.rpc.auth import Guard
from taskd.rpc.base import Headers, Reply, Services, Stream, Unary
from taskd.rpc.exchange import Exchange
from taskd.rpc.limits import DELIVER_S, RECEIVE_S

log = structlog.get_logger("taskd.rpc")

UNDELIVERED_S = 10.0
MESSAGE_CHARS = 1000  # other implementations take 8 KiB of headers in all
TIMEOUT_CHARS = 9  # the protocol allows eight digits and a unit
PATH_CHARS = 200  # of a path that is told back
CONTENT_TYPES = ("application/grpc", "application/grpc+proto")


@dataclass(frozen=True, slots=True)
class Limits:
    max_request_bytes: int
    max_reply_bytes: int
    receive_s: float = RECEIVE_S
    deliver_s: float = DELIVER_S


@lru_cache(maxsize=256)  # most callers always give the same
def _decoded_timeout_s(value: str) -> float:
    if len(value) > TIMEOUT_CHARS:
        raise ValueError
    return float(decode_timeout(value))


def _nobody_cares() -> None:
    pass


class _ServerStream:
    """A stream as its handler holds it: headers go out with the first message."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def receive(self) -> bytes | None:
        return await self._call.exchange.receive()

    async def send(self, body: bytes) -> None:
        self._call.send_first_headers()
        await self._call.exchange.send(body)


class Call:
    """One call. Cancel `scope` to end it; the peer's going does so by itself."""

    def __init__(
        self,
        exchange: Exchange,
        headers: Mapping[str, str],
        services: Services,
        limits: Limits,
        guard: Guard | None = None,
    ) -> None:
        self.exchange = exchange
        self.path = headers.get(":path", "")
        self.scope = trio.CancelScope()
        self._headers = headers
        self._services = services
        self._limits = limits
        self._guard = guard
        self._headers_sent = False
        exchange.on_gone = self.scope.cancel

    async def run(self) -> None:
        """Answer the peer, whatever happens. Raises nothing but Cancelled, or what is no Exception."""
        try:
            refusal = await self._outcome()
            if refusal is not None and self.exchange.gone is None:
                self._refuse(refusal)
        except PeerUnavailable:
            pass  # gone while it was told; there is nobody else to tell
        finally:
            self.exchange.on_gone = _nobody_cares
            self.exchange.give_up(ErrorCodes.NO_ERROR, "the call has ended")
            self.exchange.release()
            self.exchange.buffer.discard()

    async def _outcome(self) -> Refused | None:
        """Run the handler; None when the peer has its answer, else what to refuse it with."""
        try:
            with self.scope:
                await self._answer()
                return None
        except Refused as refusal:
            return refusal
        except BaseExceptionGroup as group:
            return self._of_group(group)
        except PeerUnavailable as error:
            if self.exchange.gone is not None:
                return None
            return self._internal(error)
        except Exception as error:
            return self._internal(error)
        if trio.current_time() >= self.scope.deadline:
            return Refused("DEADLINE_EXCEEDED", "the call's deadline passed before its handler was done")
        return Refused("UNAVAILABLE", "the server is stopping")

    def _of_group(self, group: BaseExceptionGroup[BaseException]) -> Refused | None:
        error = aio.lone(group)
        if isinstance(error, Refused):
            return error
        failures, others = group.split(Exception)
        if self.exchange.gone is not None and failures is not None:
            _, failures = failures.split(PeerUnavailable)
        refusal = self._internal(failures) if failures is not None else None
        if others is not None:
            raise others
        return refusal

    def _internal(self, error: BaseException) -> Refused:
        log.error("handler failed", path=self.path, exc_info=error)
        return Refused("INTERNAL", "internal error; the server's log says more")

    async def _answer(self) -> None:
        if self._headers.get("content-type") not in CONTENT_TYPES or self._headers.get(":method") != "POST":
            self.exchange.send_head([(":status", "415")], end=True)
            return
        service = self._services.get(self.path)
        if service is None:
            raise Refused("UNIMPLEMENTED", f"no method {self.path[:PATH_CHARS]} here")
        if self._guard is not None:
            self._guard.check_head(self.path, self._headers)
        self.scope.deadline = trio.current_time() + self._timeout_s()
        match service:
            case Unary(handler):
                await self._answer_unary(handler)
            case Stream(handler):
                if self._guard is not None:
                    self._guard.check(self.path, self._headers, None)
                await handler(_ServerStream(self))
                self._end("OK")
            case _:
                assert_never(service)

    def _timeout_s(self) -> float:
        value = self._headers.get("grpc-timeout")
        if value is None:
            return float("inf")
        try:
            return _decoded_timeout_s(value)
        except ValueError:
            raise Refused(
                "INVALID_ARGUMENT",
                f"grpc-timeout: expected up to 8 digits and one of HMSmun, found {value[:20]!r}",
            ) from None

    async def _answer_unary(self, handler: Callable[[bytes], Awaitable[bytes | Reply]]) -> None:
        request = await self._receive()
        if self._guard is not None:
            self._guard.check(self.path, self._headers, request)
        answer = await handler(request)
        reply = answer if isinstance(answer, Reply) else Reply(answer)
        delivered = False
        try:
            await self._deliver(reply.body)
            delivered = True
        finally:
            if not delivered and reply.undelivered is not None:
                await self._take_back(reply.undelivered)

    async def _receive(self) -> bytes:
        """The whole request, or Refused: a peer that sends it drop by drop holds memory meanwhile."""
        if (here := self.exchange.buffer.take()) is not None:
            return here  # the rule: head and message of a small request come together
        with trio.move_on_after(self._limits.receive_s):
            request = await self.exchange.receive()
            if request is None:
                raise Refused("INVALID_ARGUMENT", "expected one message in the request, found none")
            return request
        raise Refused(
            "DEADLINE_EXCEEDED", f"the request was not complete within {self._limits.receive_s:g} s"
        )

    async def _deliver(self, body: bytes) -> None:
        if len(body) > self._limits.max_reply_bytes:
            log.error("reply too large", path=self.path, size_bytes=len(body))
            raise Refused(
                "RESOURCE_EXHAUSTED",
                f"the reply has {len(body)} bytes, more than the {self._limits.max_reply_bytes} allowed",
            )
        # A handler that finished behind a shield learns here that its caller did not wait.
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.exchange.reply(self._headers.get("content-type", ""), body):
            self._headers_sent = True
            return
        self.send_first_headers()
        with trio.move_on_after(self._limits.deliver_s) as scope:
            await self.exchange.send(body, hold=True)
        if scope.cancelled_caught:
            self.exchange.give_up(ErrorCodes.CANCEL, "the peer did not take its reply")
            raise PeerUnavailable(f"{self.exchange.connection.peer} did not take its reply")
        self._end("OK")

    async def _take_back(self, undelivered: Callable[[], Awaitable[object]]) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + UNDELIVERED_S) as scope:
            try:
                await undelivered()
            except Exception as error:
                log.error("taking back an undelivered reply failed", path=self.path, exc_info=error)
        if scope.cancelled_caught:
            log.error(
                "taking back an undelivered reply took too long", path=self.path, within_s=UNDELIVERED_S
            )

    def send_first_headers(self) -> None:
        if not self._headers_sent:
            self.exchange.send_head(self._first_headers(), flush=False)
            self._headers_sent = True

    def _first_headers(self) -> Headers:
        return [(":status", "200"), ("content-type", self._headers.get("content-type", CONTENT_TYPES[0]))]

    def _refuse(self, refusal: Refused) -> None:
        if refusal.code not in Status.__members__ or refusal.code == "OK":
            refusal = self._internal(ValueError(f"no gRPC status is called {refusal.code!r}"))
        self._end(refusal.code, refusal.message)

    def _end(self, code: str, message: str = "") -> None:
        headers = [] if self._headers_sent else self._first_headers()
        headers.append(("grpc-status", str(Status[code].value)))
        if message:
            headers.append(("grpc-message", encode_grpc_message(message[:MESSAGE_CHARS])))
        self.exchange.send_head(headers, end=True)
        self._headers_sent = True
