"""Serves the pages over HTTP, on hypercorn's Trio worker."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import sys

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from taskd.errors import StartupError
from taskd.web.app import make_app
from taskd.web.health import HealthSource

GRACE_S = 1.0  # open requests may finish this long after a stop
KEEP_ALIVE_S = 5.0
READ_TIMEOUT_S = 30
HANDSHAKE_S = 10.0  # of TLS
STUCK_CLIENT_MS = 5_000  # a client that takes nothing for so long is cut off, or it could hold up the stop

EX_UNAVAILABLE, EX_TEMPFAIL = 69, 75


async def serve_http(
    host: str,
    port: int,
    health: HealthSource,
    *,
    tls: ssl.SSLContext | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; `task_status.started` gets the bound port once connections are taken.

    Raises StartupError: the port is taken (exit code 75), or the address cannot be bound (69). On
    cancellation, idle connections are closed at once and open requests get `GRACE_S`.
    """
    listening = await _listen(host, port)
    bound: int = listening.getsockname()[1]
    config = _Config()
    config.tls = tls
    config.bind = [f"fd://{listening.detach()}"]
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.graceful_timeout = GRACE_S
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.read_timeout = READ_TIMEOUT_S
    config.include_server_header = False

    stopping = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_when_cancelled, stopping)
        # Cancelled from outside, hypercorn 0.18 leaves its sockets to the garbage collector; asked to
        # stop, it closes them. So it is shielded and asked.
        with trio.CancelScope(shield=True):
            await serve(
                make_app(health),  # type: ignore[arg-type]
                config,
                shutdown_trigger=stopping.wait,
                task_status=_Started(task_status, bound),  # type: ignore[arg-type]
            )
        nursery.cancel_scope.cancel()


class _Config(Config):
    """Hypercorn's, with a context made elsewhere."""

    tls: ssl.SSLContext | None = None
    ssl_handshake_timeout = HANDSHAKE_S

    @property
    def ssl_enabled(self) -> bool:
        return self.tls is not None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self.tls


class _Started:
    """Tells the port where hypercorn would tell its addresses."""

    def __init__(self, task_status: trio.TaskStatus[int], port: int) -> None:
        self._task_status = task_status
        self._port = port

    def started(self, _: list[str]) -> None:
        self._task_status.started(self._port)


async def _set_when_cancelled(stopping: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        stopping.set()


async def _listen(host: str, port: int) -> socket.socket:
    try:
        found = await trio.socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except (socket.gaierror, UnicodeError):
        raise StartupError(
            f"HTTP cannot listen on {host}:{port}: no such address; set http.host to one of this machine",
            exit_code=EX_UNAVAILABLE,
        ) from None
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_CLIENT_MS)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        raise _cannot_listen(host, port, error) from None
    return listening


def _cannot_listen(host: str, port: int, error: OSError) -> StartupError:
    if error.errno == errno.EADDRINUSE:
        return StartupError(
            f"HTTP cannot listen on {host}:{port}: another program uses the port; stop it, or set http.port",
            exit_code=EX_TEMPFAIL,
        )
    return StartupError(
        f"HTTP cannot listen on {host}:{port}: {error.strerror}; set http.host and http.port",
        exit_code=EX_UNAVAILABLE,
    )
