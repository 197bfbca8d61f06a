"""The server: a table of plain Trio functions, answered over gRPC.

A handler is a task of the server's own nursery. Whatever goes wrong in it becomes a gRPC status;
whatever goes wrong on a connection costs that connection. Draining happens above: whoever serves
refuses new work and waits for the old first, and leaves the block last, which ends what is left.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import trio
from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler
from grpclib.protocol import Stream as GrpclibStream

from taskd import aio
from taskd.errors import StartupError
from taskd.rpc.answer import Call, Limits
from taskd.rpc.base import MAX_MESSAGE_BYTES, Services
from taskd.rpc.connection import Protocol, configuration
from taskd.rpc.exchange import Exchange, Headers

log = structlog.get_logger("taskd.rpc")

UNWIND_S = 5.0  # for handlers to unwind and tell their callers, before connections are closed all the same
LISTENER_S = 2.0
BACKLOG = 1024


class _Server:
    """All connections of one listener and the calls on them."""

    def __init__(self, services: Services, limits: Limits, nursery: trio.Nursery) -> None:
        self.services = services
        self.limits = limits
        self.nursery = nursery
        self.stopping = False
        self.calls: set[Call] = set()
        self.idle = trio.lowlevel.ParkingLot()
        self._protocols: set[Protocol] = set()
        self._config: Configuration = configuration(
            keepalive_time_s=60.0, without_calls=True
        ).__for_server__()

    def new_protocol(self) -> Protocol:
        self._protocols = {protocol for protocol in self._protocols if not protocol.lost.is_set()}
        protocol = Protocol(
            _Acceptor(self), self._config, client_side=False, max_message_bytes=self.limits.max_request_bytes
        )
        self._protocols.add(protocol)
        return protocol

    def start(self, call: Call) -> None:
        if self.stopping:
            call.scope.cancel()
        self.calls.add(call)
        self.nursery.start_soon(self._run, call, name=f"rpc {call.path}")

    async def _run(self, call: Call) -> None:
        try:
            await call.run()
        finally:
            self.calls.discard(call)
            if not self.calls:
                self.idle.unpark_all()

    async def stop(self, listener: asyncio.Server) -> None:
        """End every call, say goodbye on every connection, close the listener. Nobody can make it hang."""
        with trio.CancelScope(shield=True):
            self.stopping = True
            listener.close()
            for call in self.calls:
                call.scope.cancel()
            with trio.move_on_after(UNWIND_S):
                while self.calls:
                    await self.idle.park()
            if self.calls:
                log.warning("calls outlived the server", paths=sorted(call.path for call in self.calls))
            async with trio.open_nursery() as nursery:
                for protocol in self._protocols:
                    nursery.start_soon(protocol.say_goodbye, "the server is stopping")
            # From 3.12.1 on it waits for connections, which are all closed by now.
            await aio.finish(listener.wait_closed, within_s=LISTENER_S)


class _Acceptor(AbstractHandler):
    """Starts a call for each stream a peer opens. A stream itself tells its call when the peer is gone."""

    def __init__(self, server: _Server) -> None:
        self._server = server

    def accept(self, stream: GrpclibStream, headers: Headers, release_stream: Callable[[], None]) -> None:
        assert isinstance(stream, Exchange)
        stream.release = release_stream
        self._server.start(Call(stream, dict(headers), self._server.services, self._server.limits))

    def cancel(self, stream: GrpclibStream) -> None:
        pass

    def close(self) -> None:
        pass


async def _listen(server: _Server, host: str, port: int) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    return await loop.create_server(server.new_protocol, host, port, backlog=BACKLOG)


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
) -> AsyncIterator[int]:
    """Answer calls of `services` while the block lasts; yields the bound port (`port` 0 takes a free one).

    Raises StartupError when it cannot listen there. A request larger than `max_request_bytes` is
    refused with RESOURCE_EXHAUSTED before it is kept; so is a unary reply larger than
    `max_reply_bytes`, after its `undelivered`. Leaving cancels the calls that still run, answers them
    UNAVAILABLE, and closes all connections; that is not skipped by cancellation and ends in seconds
    unless a handler does not let itself be cancelled. Runs inside `aio.open_loop()`.
    """
    async with _open_serving_nursery() as nursery:
        server = _Server(services, Limits(max_request_bytes, max_reply_bytes), nursery)
        try:
            listener = await aio.call(_listen, server, host, port)
        except OSError as error:
            raise _cannot_listen(host, port, error) from error
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            await server.stop(listener)
