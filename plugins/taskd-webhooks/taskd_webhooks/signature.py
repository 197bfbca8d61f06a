"""Signing and checking of deliveries: HMAC-SHA256 over the time of signing and the body.

The header is `X-Taskd-Signature: t=<unix seconds>,v1=<hex>`. The time is signed too, so a captured
request is worthless once the receiver's tolerance is over.
"""

from __future__ import annotations

import hashlib
import hmac

HEADER = "X-Taskd-Signature"
DEFAULT_TOLERANCE_S = 300  # clocks differ and queues hold requests up; Stripe's webhooks allow the same


class InvalidSignature(Exception):
    """The signature is missing, malformed, too old, or not made with this secret over this body."""


def sign(secret: str, body: bytes, *, now_s: int) -> str:
    """The header's value for `body`, signed at `now_s` (seconds since 1970)."""
    return f"t={now_s},v1={_digest(secret, now_s, body)}"


def verify(
    secret: str, body: bytes, header: str | None, *, now_s: float, tolerance_s: float = DEFAULT_TOLERANCE_S
) -> None:
    """Return when `header` signs `body` with `secret` and was made within `tolerance_s` of `now_s`.

    `body` must be the bytes as received, before any JSON parsing. Raises InvalidSignature otherwise.
    A header may carry several `v1` parts, one for each secret in use while secrets are changed.
    """
    signed_at_s, digests = _parse(header)
    expected = _digest(secret, signed_at_s, body)
    if not any(hmac.compare_digest(expected.encode(), digest.encode()) for digest in digests):
        raise InvalidSignature("the signature does not match the body; check the secret on both sides")
    if abs(now_s - signed_at_s) > tolerance_s:
        raise InvalidSignature(
            f"signed {now_s - signed_at_s:.0f} s ago, {tolerance_s:.0f} s are allowed; check both clocks"
        )


def _digest(secret: str, now_s: int, body: bytes) -> str:
    return hmac.new(secret.encode(), b"%d." % now_s + body, hashlib.sha256).hexdigest()


def _parse(header: str | None) -> tuple[int, list[str]]:
    if not header:
        raise InvalidSignature(f"expected the header {HEADER}: t=<unix seconds>,v1=<hex>, found none")
    parts = [part.strip().partition("=") for part in header.split(",")]
    times = [value for name, _, value in parts if name == "t" and value.isascii() and value.isdigit()]
    digests = [value for name, _, value in parts if name == "v1"]
    if len(times) != 1 or len(times[0]) > 12 or not digests:
        raise InvalidSignature(f"expected t=<unix seconds>,v1=<hex>, found {header[:100]!r}")
    return int(times[0]), digests
