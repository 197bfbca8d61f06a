"""Tells systemd how the daemon is: READY, RELOADING, STOPPING, and a watchdog ping while things get on.

systemd names a datagram socket in NOTIFY_SOCKET, and in WATCHDOG_USEC how long it waits between two
pings before it restarts the service. Without them nothing is told.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping

import structlog
import trio

from taskd.clock import monotonic_s

PINGS_PER_TIMEOUT = 3  # a late one does not end the daemon

log = structlog.get_logger("taskd.daemon")


def listens(environ: Mapping[str, str] | None = None) -> bool:
    """Whether there is anybody to tell."""
    return (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


def tell(state: str, environ: Mapping[str, str] | None = None) -> bool:
    """Send one state such as `READY=1`. False when nobody listens; never raises, never blocks."""
    if not listens(environ):
        return False
    address = (os.environ if environ is None else environ)["NOTIFY_SOCKET"]
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux's abstract names
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.setblocking(False)
            to.connect(address)
            to.send(state.encode())
    except OSError as error:
        log.debug("the service manager cannot be told", state=state, error=str(error))
        return False
    return True


def reloading() -> None:
    """The configuration is read again; `tell("READY=1")` ends it."""
    tell(f"RELOADING=1\nMONOTONIC_USEC={int(monotonic_s() * 1e6)}")


async def keep_watchdog(trouble: Callable[[], str], environ: Mapping[str, str] | None = None) -> None:
    """Ping while `trouble()` is empty, until cancelled. Without a ping systemd ends and restarts us.

    A loop that is stuck does not ping either.
    """
    timeout_s = _timeout_s(os.environ if environ is None else environ)
    if timeout_s is None:
        return
    silent = ""
    while True:
        now = trouble()
        if not now:
            tell("WATCHDOG=1", environ)
        elif not silent:
            log.error("no watchdog ping: the service manager will restart this process", trouble=now)
        silent = now
        await trio.sleep(timeout_s / PINGS_PER_TIMEOUT)


def _timeout_s(environ: Mapping[str, str]) -> float | None:
    text, of = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if of and of != str(os.getpid()):
        return None  # meant for the process that started us
    return int(text) / 1_000_000 if text.isascii() and text.isdigit() and int(text) else None
