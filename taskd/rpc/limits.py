"""What one peer may cost. Whoever goes beyond loses its connection, or its call, and nobody else anything."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import structlog

log = structlog.get_logger("taskd.rpc")

RESERVED_FILES = 128  # for the store, the log and the rest of the process
MAX_CONNECTIONS = 4_096

HELLO_S = 10.0  # to finish the TLS handshake, and again for preface and settings
FRAME_S = 20.0  # to finish one frame, or one block of headers, that was begun
RECEIVE_S = 60.0  # to finish the request of a unary call
DELIVER_S = 60.0  # to take its reply
SWEEP_S = 2.0  # how often the deadlines above are looked at
MAX_UNSENT_BYTES = 64 * 1024 * 1024  # written to a peer that does not read; one reply may have 11 MiB
MAX_RECEIVING_BYTES = 256 * 1024 * 1024  # requests of all peers that are not complete or not yet taken

LOG_EVERY_S = 1.0

GLITCHES = 1_000  # at once, and
GLITCHES_PER_S = 100  # for good


@dataclass(frozen=True, slots=True)
class Keepalive:
    """A peer is asked for a sign of life every `time_s`, and is gone without one for `timeout_s`."""

    time_s: float = 60.0
    timeout_s: float = 20.0
    without_calls: bool = True


class Glitches:
    """Counts what is legal, rarely needed, and cheap to send in floods: resets, pings, settings, empty
    or unknown frames. A bucket of tokens that fills up again."""

    __slots__ = ("_at_s", "_left")

    def __init__(self, now_s: float) -> None:
        self._left = float(GLITCHES)
        self._at_s = now_s

    def spend(self, now_s: float) -> bool:
        """Count one; False when it was one too many."""
        self._left = min(GLITCHES, self._left + (now_s - self._at_s) * GLITCHES_PER_S) - 1
        self._at_s = now_s
        return self._left >= 0


class Seldom:
    """Lets one log line pass each `LOG_EVERY_S`, so that who is refused cannot fill the log."""

    __slots__ = ("_last_s", "_unsaid")

    def __init__(self) -> None:
        self._last_s = float("-inf")
        self._unsaid = 0

    def say(self, now_s: float) -> int | None:
        """How many were passed over since the last one that passed; None: this one is passed over too."""
        if now_s - self._last_s < LOG_EVERY_S:
            self._unsaid += 1
            return None
        unsaid, self._unsaid, self._last_s = self._unsaid, 0, now_s
        return unsaid


class Budget:
    """Bytes that all connections of a server hold together."""

    __slots__ = ("most_bytes", "used_bytes")

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.used_bytes = 0


def connections_allowed(wanted: int) -> int:
    """How many connections there are file descriptors for; raises this process's limit if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, raised), hard))
            soft = max(soft, raised)
        except (OSError, ValueError):
            pass  # then fewer connections
        if soft < needed:
            allowed = max(1, soft - RESERVED_FILES)
            log.warning("fewer connections than configured", allowed=allowed, wanted=wanted, open_files=soft)
            return allowed
    return wanted
