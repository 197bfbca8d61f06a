"""Signatures of calls: who does not know a shared secret cannot make one.

Two schemes. `signature` is the published one of the taskbroker protocol: path and message, nothing
else, so a captured call can be sent again. `Proof` is that of our own services: it also covers when
it was made and a number used once, and for a stream, whose messages are not known when it opens,
there is no message in it.
"""

from __future__ import annotations

import hmac
import secrets as randomness
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from taskd.errors import Undecodable

SIGNATURE_HEADER = "sentry-signature"
PROOF_HEADER = "taskd-auth"
PROOF_VERSION = "v1"
NONCE_BYTES = 16
MAX_PROOF_CHARS = 160
MAX_TIME_MS = 1 << 53


class Secrets:
    """Shared secrets, to be rotated: every one is accepted, the first signs. None: nothing is checked.

    They appear in no repr, so no log, traceback or dump of an object shows them.
    """

    __slots__ = ("_keys",)

    def __init__(self, secrets: Iterable[str | bytes] = ()) -> None:
        self._keys = tuple(secret.encode() if isinstance(secret, str) else secret for secret in secrets)
        if not all(self._keys):
            raise ValueError("a secret must not be empty")

    def replace(self, other: Secrets) -> None:
        """From now on these are the ones, for everybody who holds this object."""
        self._keys = other._keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"Secrets({len(self._keys)} hidden)"

    def __reduce__(self) -> str:
        raise TypeError("secrets do not travel")

    def sign(self, message: bytes) -> str:
        """Lower-case hex, by the first secret."""
        return _mac(self._keys[0], message)

    def accept(self, message: bytes, signature: str) -> bool:
        """Whether one of the secrets made it; takes as long for a wrong one as for a right one."""
        given = signature.encode("utf-8", "replace")
        accepted = False
        for key in self._keys:  # all of them: which one it was is nobody's business either
            accepted |= hmac.compare_digest(_mac(key, message).encode(), given)
        return accepted


def _mac(key: bytes, message: bytes) -> str:
    return hmac.digest(key, message, "sha256").hex()


# ---- sentry-signature


def signature(secrets: Secrets, path: str, body: bytes) -> str:
    """Of the full method path (`/package.Service/Method`) and the message without its frame."""
    return secrets.sign(_signed(path, body))


def signature_fits(secrets: Secrets, path: str, body: bytes, given: str) -> bool:
    return secrets.accept(_signed(path, body), given)


def _signed(path: str, body: bytes) -> bytes:
    return path.encode() + b":" + body


# ---- taskd-auth


@dataclass(frozen=True, slots=True)
class Proof:
    """That the caller knows the secret, for one call at one time.

    `time_ms`: wall clock of the caller. `nonce`: 32 hex digits, never used again. As a header:
    `v1 <time_ms> <nonce> <hex HMAC-SHA256>`; the HMAC covers scheme, path, time, nonce, whether a
    message follows, and the message.
    """

    time_ms: int
    nonce: str
    mac: str

    @classmethod
    def make(cls, secrets: Secrets, path: str, body: bytes | None, time_ms: int) -> Self:
        """`body` None: the proof opens a stream."""
        nonce = randomness.token_hex(NONCE_BYTES)
        return cls(time_ms, nonce, secrets.sign(_proven(path, body, time_ms, nonce)))

    @classmethod
    def parse(cls, header: str) -> Self:
        """Raises Undecodable."""
        parts = header.split(" ") if len(header) <= MAX_PROOF_CHARS else []
        if len(parts) != 4 or parts[0] != PROOF_VERSION:
            raise Undecodable(f"expected `{PROOF_VERSION} TIME NONCE HMAC` in {PROOF_HEADER}")
        _, time, nonce, mac = parts
        if not (time.isascii() and time.isdigit() and 0 < int(time) < MAX_TIME_MS):
            raise Undecodable(f"expected milliseconds since 1970 in {PROOF_HEADER}")
        if len(nonce) != 2 * NONCE_BYTES or not set(nonce) <= set("0123456789abcdef"):
            raise Undecodable(f"expected a nonce of {2 * NONCE_BYTES} hex digits in {PROOF_HEADER}")
        return cls(int(time), nonce, mac)

    def fits(self, secrets: Secrets, path: str, body: bytes | None) -> bool:
        """Whether it was made for this call; its age is the caller's to judge."""
        return secrets.accept(_proven(path, body, self.time_ms, self.nonce), self.mac)

    def __str__(self) -> str:
        return f"{PROOF_VERSION} {self.time_ms} {self.nonce} {self.mac}"


def _proven(path: str, body: bytes | None, time_ms: int, nonce: str) -> bytes:
    kind = "stream" if body is None else "message"
    head = "\0".join((PROOF_HEADER, PROOF_VERSION, path, str(time_ms), nonce, kind))
    return head.encode() + b"\0" + (body or b"")
