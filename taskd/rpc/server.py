"""The server: a table of plain Trio functions, answered over gRPC.

A handler is a task of the server's own nursery. Whatever goes wrong in it becomes a gRPC status;
whatever goes wrong on a connection costs that connection. Draining happens above: whoever serves
refuses new work and waits for the old first, and leaves the block last, which ends what is left.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio
from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler
from grpclib.protocol import Stream as GrpclibStream

from taskd import aio
from taskd.errors import StartupError
from taskd.rpc.answer import Call, Limits
from taskd.rpc.auth import Guard
from taskd.rpc.base import MAX_MESSAGE_BYTES, Headers, Services, Unary
from taskd.rpc.connection import Flusher, Protocol, configuration
from taskd.rpc.exchange import Exchange
from taskd.rpc.limits import (
    HELLO_S,
    MAX_CONNECTIONS,
    MAX_RECEIVING_BYTES,
    SWEEP_S,
    Budget,
    Keepalive,
    Seldom,
    connections_allowed,
)
from taskd.rpc.local import open_unix_listener

log = structlog.get_logger("taskd.rpc")

ANSWERS_S = 0.5  # for calls that run when the server stops
UNWIND_S = 5.0  # for handlers to unwind and tell their callers, before connections are closed all the same
BACKLOG = 1024
KEEPALIVE = Keepalive()
LOCAL_CONNECTIONS = 64


class _Server:
    """All connections of one listener and the calls on them."""

    def __init__(
        self,
        services: Services,
        limits: Limits,
        nursery: trio.Nursery,
        *,
        guard: Guard | None,
        tls: ssl.SSLContext | None,
        keepalive: Keepalive,
        max_connections: int,
    ) -> None:
        self.services = services
        self.limits = limits
        self.guard = guard
        self.nursery = nursery
        self.stopping = False
        self.calls: set[Call] = set()
        self.ended = trio.lowlevel.ParkingLot()
        self._tls = tls
        self._max_connections = max_connections
        self._turned_away = 0
        self._accepting = trio.CancelScope()
        self._protocols: set[Protocol] = set()
        self._budget = Budget(MAX_RECEIVING_BYTES)
        self._flusher = Flusher()
        self._seldom = Seldom()
        self._config: Configuration = configuration(keepalive).__for_server__()

    # ---- connections

    async def accept(self, listeners: list[trio.SocketListener]) -> None:
        """Take connections until `stop`."""
        with self._accepting:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sweep)
                nursery.start_soon(self._flusher.run)
                await trio.serve_listeners(self._welcome, listeners, handler_nursery=nursery)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            for protocol in list(self._protocols):
                protocol.check()
            if self._turned_away:
                log.warning("connections turned away", count=self._turned_away, most=self._max_connections)
                self._turned_away = 0

    async def _welcome(self, stream: trio.SocketStream) -> None:
        """Give the socket to asyncio; TLS shakes hands first, within `HELLO_S`."""
        if len(self._protocols) >= self._max_connections:
            self._turned_away += 1
            stream.socket.close()
            return
        connected = socket.socket(fileno=stream.socket.detach())
        protocol = Protocol(
            _Acceptor(self),
            self._config,
            client_side=False,
            max_message_bytes=self.limits.max_request_bytes,
            budget=self._budget,
            flusher=self._flusher,
            on_lost=self._protocols.discard,
        )
        self._protocols.add(protocol)
        try:
            await aio.call(_adopt, protocol, connected, self._tls)
        except (OSError, aio.Interrupted) as error:
            unsaid = self._seldom.say(trio.current_time())
            if unsaid is not None:
                log.info("connection not made", error=repr(error), failed_unsaid=unsaid)
        finally:
            if not hasattr(protocol, "connection"):
                self._protocols.discard(protocol)
                connected.close()
        if self._tls is None and hasattr(protocol, "connection"):
            await protocol.read()

    def start(self, call: Call) -> None:
        if self.stopping:
            call.scope.cancel()
        self.calls.add(call)
        call.exchange.connection.calls += 1
        self.nursery.start_soon(self._run, call, name=f"rpc {call.path}")

    async def _run(self, call: Call) -> None:
        try:
            await call.run()
        finally:
            self.calls.discard(call)
            call.exchange.connection.calls -= 1
            self.ended.unpark_all()

    async def stop(self) -> None:
        """End every call, say goodbye on every connection. Nobody can make it hang.

        What was asked already is answered, as far as that is quick: the last report of a drain ends
        the drain, and must still learn that it was taken.
        """
        with trio.CancelScope(shield=True):
            self.stopping = True
            with trio.move_on_after(ANSWERS_S):
                while any(isinstance(self.services.get(call.path), Unary) for call in self.calls):
                    await self.ended.park()
            self._accepting.cancel()
            for call in self.calls:
                call.scope.cancel()
            with trio.move_on_after(UNWIND_S):
                while self.calls:
                    await self.ended.park()
            if self.calls:
                log.warning("calls outlived the server", paths=sorted(call.path for call in self.calls))
            async with trio.open_nursery() as nursery:
                for protocol in list(self._protocols):
                    nursery.start_soon(protocol.say_goodbye, "the server is stopping")


class _Acceptor(AbstractHandler):
    """Starts a call for each stream a peer opens. A stream itself tells its call when the peer is gone."""

    def __init__(self, server: _Server) -> None:
        self._server = server

    def accept(self, stream: GrpclibStream, headers: Headers, release_stream: Callable[[], None]) -> None:
        assert isinstance(stream, Exchange)
        stream.release = release_stream
        server = self._server
        server.start(Call(stream, dict(headers), server.services, server.limits, server.guard))

    def cancel(self, stream: GrpclibStream) -> None:
        pass

    def close(self) -> None:
        pass


async def _adopt(protocol: Protocol, connected: socket.socket, tls: ssl.SSLContext | None) -> None:
    await asyncio.get_running_loop().connect_accepted_socket(
        lambda: protocol, connected, ssl=tls, ssl_handshake_timeout=HELLO_S if tls else None
    )


def _cannot_listen(host: str, port: int, error: OSError) -> StartupError:
    address = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return StartupError(
            f"cannot listen on {address}: another process holds that port; "
            "stop it, or choose another port (0 takes a free one)",
            exit_code=75,
        )
    # Python 3.13 passes over addresses that are not the machine's, and leaves no errno.
    if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, None):
        advice = "the host must be a name or address of this machine, such as 127.0.0.1 or 0.0.0.0"
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = "ports below 1024 need a privilege; choose a higher one"
    else:
        advice = "check the host and the port"
    return StartupError(f"cannot listen on {address}: {error.strerror or error}; {advice}")


@asynccontextmanager
async def _open_serving_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that leaves what its block raises as it is, and whose tasks end with the block."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        if failure is not None:
            raise failure


@asynccontextmanager
async def serve(
    services: Services,
    host: str,
    port: int,
    *,
    max_request_bytes: int = MAX_MESSAGE_BYTES,
    max_reply_bytes: int = MAX_MESSAGE_BYTES,
    guard: Guard | None = None,
    tls: ssl.SSLContext | None = None,
    keepalive: Keepalive = KEEPALIVE,
    max_connections: int = MAX_CONNECTIONS,
) -> AsyncIterator[int]:
    """Answer calls of `services` while the block lasts; yields the bound port (`port` 0 takes a free one).

    Raises StartupError when it cannot listen there. A request larger than `max_request_bytes` is
    refused with RESOURCE_EXHAUSTED before it is kept; so is a unary reply larger than
    `max_reply_bytes`, after its `undelivered`. `guard` says who may call, None: everybody. Leaving
    cancels the calls that still run, answers them UNAVAILABLE, and closes all connections; that is
    not skipped by cancellation and ends in seconds unless a handler does not let itself be cancelled.
    Runs inside `aio.open_loop()`.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    async with _open_serving_nursery() as nursery:
        server = _Server(
            services,
            Limits(max_request_bytes, max_reply_bytes),
            nursery,
            guard=guard,
            tls=tls,
            keepalive=keepalive,
            max_connections=connections_allowed(max_connections),
        )
        nursery.start_soon(server.accept, listeners)
        try:
            yield listeners[0].socket.getsockname()[1]
        finally:
            await server.stop()


@asynccontextmanager
async def serve_unix(
    services: Services, path: Path, *, max_request_bytes: int = MAX_MESSAGE_BYTES
) -> AsyncIterator[None]:
    """Answer calls of `services` on a Unix socket at `path`, as `serve` does on a port.

    Who may open the file may call: its mode is 0600. Raises StartupError.
    """
    with open_unix_listener(path) as listener:
        async with _open_serving_nursery() as nursery:
            server = _Server(
                services,
                Limits(max_request_bytes, MAX_MESSAGE_BYTES),
                nursery,
                guard=None,
                tls=None,
                keepalive=KEEPALIVE,
                max_connections=LOCAL_CONNECTIONS,
            )
            nursery.start_soon(server.accept, [listener])
            try:
                yield
            finally:
                await server.stop()
