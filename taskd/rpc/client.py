"""The client: calls and streams to one address, over one connection that comes back by itself.

Whatever fails becomes one of three errors: PeerUnavailable (nobody there, or the connection was
lost: try again elsewhere or later), PeerTimeout (no answer in time: it may have happened), Refused
(the peer answered with another status than OK).
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import trio
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.metadata import USER_AGENT, decode_grpc_message, encode_timeout
from grpclib.protocol import AbstractHandler
from grpclib.protocol import Stream as GrpclibStream
from h2.errors import ErrorCodes
from h2.exceptions import H2Error, TooManyStreamsError

from taskd import aio
from taskd.clock import Clock, SystemClock
from taskd.errors import ConfigError, PeerError, PeerTimeout, PeerUnavailable, PeerUnreachable, Refused
from taskd.rpc.access import OPEN, Access
from taskd.rpc.auth import Signer
from taskd.rpc.base import MAX_MESSAGE_BYTES, ClientStream, Headers
from taskd.rpc.blocks import literal
from taskd.rpc.connection import Protocol, configuration
from taskd.rpc.exchange import Exchange
from taskd.rpc.limits import Keepalive
from taskd.rpc.local import PREFIX

log = structlog.get_logger("taskd.rpc")

CONNECT_S = 5.0
KEEPALIVE = Keepalive(time_s=30.0, without_calls=False)
MAX_TIMEOUT_S = 99_999_999.0  # eight digits are what grpc-timeout can hold
MAX_REPLY_BYTES = MAX_MESSAGE_BYTES + 1024 * 1024  # what an activation of the largest size is wrapped in

# What proxies and misdirected calls answer with, as the gRPC specification maps it.
HTTP_STATUS = {
    "400": "INTERNAL",
    "401": "UNAUTHENTICATED",
    "403": "PERMISSION_DENIED",
    "404": "UNIMPLEMENTED",
    "429": "UNAVAILABLE",
    "502": "UNAVAILABLE",
    "503": "UNAVAILABLE",
    "504": "UNAVAILABLE",
}


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` in its parts. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"expected an address like host:port, found {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _error_of(code: str, message: str) -> PeerError:
    if code == "UNAVAILABLE":
        return PeerUnavailable(message or None)
    if code == "DEADLINE_EXCEEDED":
        return PeerTimeout(message or None)
    return Refused(code, message)


def _final_error(exchange: Exchange) -> PeerError | None:
    """The error that the peer ended the call with, None when it ended it with OK or not yet."""
    headers = dict(exchange.headers or ())
    http = headers.get(":status", "200")
    if http != "200":
        return _error_of(HTTP_STATUS.get(http, "UNKNOWN"), f"answered with HTTP status {http}, not by gRPC")
    if exchange.trailers is not None:
        headers = dict(exchange.trailers)
    elif "grpc-status" not in headers:
        return None
    try:
        status = Status(int(headers.get("grpc-status", "")))
    except ValueError:
        return Refused("UNKNOWN", f"expected a grpc-status, found {headers.get('grpc-status')!r}")
    if status is Status.OK:
        return None
    return _error_of(status.name, decode_grpc_message(headers.get("grpc-message", "")))


class _ClientCall:
    """One call as its caller holds it. The status that the peer gave explains whatever else went wrong."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def receive(self) -> bytes | None:
        try:
            message = await self._exchange.receive()
        except PeerError as error:
            raise _final_error(self._exchange) or error from None
        if message is None:
            self._check_ended()
        return message

    def check_ended_in_order(self) -> bool:
        """Whether the peer said everything. Raises the error that it ended the call with."""
        if self._exchange.buffer.finished:
            self._check_ended()
            return True
        return False

    def _check_ended(self) -> None:
        error = _final_error(self._exchange)
        if error is not None:
            raise error
        if self._exchange.trailers is None and "grpc-status" not in dict(self._exchange.headers or ()):
            raise Refused("UNKNOWN", "the peer ended the call without a grpc-status")

    async def send(self, body: bytes, *, end: bool = False) -> None:
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if end:
                if self._exchange.ask(body):
                    return
                self._exchange.connection.flush()  # its head: there may be no room for more
            await self._exchange.send(body, end=end)
        except PeerError as error:
            raise _final_error(self._exchange) or error from None

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        self._exchange.finish()


class _NoRequests(AbstractHandler):
    """A server asks its clients nothing."""

    def accept(self, stream: GrpclibStream, headers: Headers, release_stream: Callable[[], None]) -> None:
        release_stream()

    def cancel(self, stream: GrpclibStream) -> None:
        pass

    def close(self) -> None:
        pass


class Client:
    """Calls to one address. Opened by `connect`; shared by any number of tasks."""

    def __init__(self, address: str, access: Access, clock: Clock, keepalive: Keepalive) -> None:
        self.address = address
        self._path = address.removeprefix(PREFIX) if address.startswith(PREFIX) else ""
        self._host, self._port = ("localhost", 0) if self._path else split_address(address)
        self._signer = Signer(access.secrets, clock)
        self._tls = access.tls
        self._config: Configuration = configuration(keepalive).__for_client__()
        self._protocol: Protocol | None = None
        self._connecting = trio.Lock()
        self._failed_at = float("-inf")
        self._failure = ""
        self._closed = False

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        """One request, one reply. Raises PeerUnavailable, PeerTimeout, Refused.

        PeerTimeout means that the peer may have done what was asked; without a connection it is
        PeerUnreachable instead. Cancelling tells the server, which cancels its handler.
        """
        exchange: Exchange | None = None
        try:
            with trio.move_on_after(timeout_s):
                exchange = await self._open(path, body, timeout_s)
                return await _unary(_ClientCall(exchange), body)
        except PeerUnavailable as error:
            if exchange is None:
                raise PeerUnreachable(str(error)) from error
            raise
        finally:
            if exchange is not None:
                exchange.give_up(ErrorCodes.CANCEL, "the call has ended")
                exchange.release()
        if exchange is None:
            raise PeerUnreachable(f"{self.address}: no connection within {timeout_s:g} s")
        raise PeerTimeout(f"{self.address}: no answer to {path} within {timeout_s:g} s")

    @asynccontextmanager
    async def stream(self, path: str) -> AsyncIterator[ClientStream]:
        """Messages both ways while the block lasts. Raises PeerUnavailable, PeerTimeout, Refused.

        Leaving the block cancels the stream at the server, unless it ended; for an orderly end call
        `finish()` and receive until None.
        """
        exchange = await self._open(path, None, None)
        try:
            exchange.connection.flush()
            yield _ClientCall(exchange)
        finally:
            exchange.give_up(ErrorCodes.CANCEL, "the stream has ended")
            exchange.release()

    async def _open(self, path: str, body: bytes | None, timeout_s: float | None) -> Exchange:
        """A new stream whose headers go out with the next flush. `body` None: not one message."""
        while True:
            protocol = await self._connected()
            try:
                stream_id = protocol.connection.begin_stream(
                    self._usual_headers(path), self._last_headers(path, body, timeout_s)
                )
            except TooManyStreamsError:
                await protocol.connection.stream_closed.park()
            except H2Error as error:
                protocol.processor.close("cannot be used any more")  # the next call makes a new one
                raise PeerUnavailable(f"{self.address}: no further stream: {error}") from error
            else:
                protocol.connection.headers_send_process()
                exchange = protocol.connection.create_stream(stream_id=stream_id)
                exchange.release = protocol.processor.register(exchange)
                return exchange

    def _usual_headers(self, path: str) -> tuple[tuple[str, str], ...]:
        """The same for each call to a method."""
        return (
            (":method", "POST"),
            (":scheme", "http" if self._tls is None else "https"),
            (":path", path),
            (":authority", "localhost" if self._path else self.address),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", USER_AGENT),
        )

    def _last_headers(self, path: str, body: bytes | None, timeout_s: float | None) -> bytes:
        """Those of this call only, encoded."""
        encoded = b"".join(literal(name, value) for name, value in self._signer.headers(path, body))
        if timeout_s is not None and timeout_s < MAX_TIMEOUT_S:
            encoded += literal("grpc-timeout", encode_timeout(timeout_s))
        return encoded

    async def _connected(self) -> Protocol:
        asked_at = trio.current_time()
        while self._protocol is None or self._protocol.connection.is_closing():
            async with self._connecting:
                if self._closed:
                    raise PeerUnavailable(f"{self.address}: this client is closed")
                if self._failed_at >= asked_at:
                    raise PeerUnavailable(self._failure)  # what one attempt found holds for all who waited
                if self._protocol is None or self._protocol.connection.is_closing():
                    try:
                        self._protocol = await self._connect()
                    except PeerUnavailable as error:
                        self._failed_at, self._failure = trio.current_time(), str(error)
                        raise
        return self._protocol

    async def _connect(self) -> Protocol:
        with trio.move_on_after(CONNECT_S):
            try:
                stream = await self._open_socket()
            except OSError as error:
                raise PeerUnavailable(f"{self.address}: nobody answers: {error}") from error
            return await self._hand_shake(socket.socket(fileno=stream.socket.detach()))
        raise PeerUnavailable(f"{self.address}: nobody answered within {CONNECT_S:g} s")

    async def _open_socket(self) -> trio.SocketStream:
        if self._path:
            return await trio.open_unix_socket(self._path)
        return await trio.open_tcp_stream(self._host, self._port)

    async def _hand_shake(self, connected: socket.socket) -> Protocol:
        """Give the socket to grpclib and wait for the server's settings, which limit the calls at once."""
        protocol = Protocol(_NoRequests(), self._config, client_side=True, max_message_bytes=MAX_REPLY_BYTES)
        ready = False
        try:
            try:
                await aio.call(_adopt, protocol, connected, self._tls, self._host)
            except (OSError, aio.Interrupted) as error:
                raise PeerUnavailable(f"{self.address}: {_why_not(error)}") from error
            if self._tls is None:
                # It lives as long as the connection, whoever made that, and needs asyncio's loop of here.
                trio.lowlevel.spawn_system_task(_read, protocol, context=contextvars.copy_context())
            await protocol.connection.ready.wait()
            ready = not protocol.connection.is_closing()
        finally:
            if not ready:
                _abort(protocol, connected)
        if not ready:
            raise PeerUnavailable(
                f"{self.address}: hung up before the first HTTP/2 frame; "
                + (
                    "is it a gRPC port, and does it want TLS?"
                    if self._tls is None
                    else "does it want a certificate of ours?"
                )
            )
        return protocol

    async def _close(self) -> None:
        self._closed = True
        if self._protocol is not None:
            with trio.CancelScope(shield=True):
                await self._protocol.say_goodbye("this client is closed")


async def _unary(call: _ClientCall, body: bytes) -> bytes:
    await call.send(body, end=True)
    reply = await call.receive()
    if reply is None:
        raise Refused("INTERNAL", "the peer answered OK, but without a reply")
    if not call.check_ended_in_order():
        await call.receive()  # None, or the status that takes the reply back
    return reply


async def _adopt(protocol: Protocol, connected: socket.socket, tls: ssl.SSLContext | None, host: str) -> None:
    loop = asyncio.get_running_loop()
    if tls is None:
        await loop.create_connection(lambda: protocol, sock=connected)
    else:
        await loop.create_connection(lambda: protocol, sock=connected, ssl=tls, server_hostname=host)


async def _read(protocol: Protocol) -> None:
    try:
        await protocol.read()
    except Exception as error:  # what a task of the system raises would end the process
        log.error("connection closed: reading failed", peer=protocol.connection.peer, exc_info=error)
        protocol.connection.transport.abort()


def _why_not(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS connection: {error.reason or error}"
    return f"no connection: {error}"


def _abort(protocol: Protocol, connected: socket.socket) -> None:
    if hasattr(protocol, "connection"):
        protocol.connection.transport.abort()
    else:
        connected.close()


@asynccontextmanager
async def connect(
    address: str, access: Access = OPEN, *, clock: Clock | None = None, keepalive: Keepalive = KEEPALIVE
) -> AsyncIterator[Client]:
    """A client of the gRPC server at `address`; connects when called, and again after a loss.

    An address is `host:port`, or `unix:` and the path of a socket.

    `access`: the secrets that sign its calls, and TLS. Raises ConfigError when the address is none;
    nothing else. Runs inside `aio.open_loop()`.
    """
    client = Client(address, access, clock or SystemClock(), keepalive)
    try:
        yield client
    finally:
        await client._close()
