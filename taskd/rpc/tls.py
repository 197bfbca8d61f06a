"""TLS contexts, all made here: version 1.2 or newer, certificates always verified."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from taskd.errors import StartupError

EX_CONFIG = 78
ALPN = ("h2",)
HTTP_ALPN = ("http/1.1",)


class RenewableContext(ssl.SSLContext):
    """A context that another one can take the place of, for connections from then on.

    A context by itself cannot be told to forget a certificate or an authority.
    """

    latest: ssl.SSLContext | None = None

    def renew(self, latest: ssl.SSLContext) -> None:
        """Connections from now on are made by `latest`; those that there are stay as they are."""
        self.latest = latest

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Where asyncio and Trio begin each connection."""
        wrap = super().wrap_bio if self.latest is None else self.latest.wrap_bio
        return wrap(incoming, outgoing, server_side, server_hostname, session)


def server_context(
    certificate: Path, key: Path, client_ca: Path | None = None, alpn: Sequence[str] = ALPN
) -> RenewableContext:
    """For a listener that speaks `alpn`.

    With `client_ca`, callers must show a certificate that it signed (mutual TLS).
    Files are PEM; `certificate` holds the chain, own certificate first. Raises StartupError.
    """
    context = RenewableContext(ssl.PROTOCOL_TLS_SERVER)
    _settle(context, alpn)
    _show(context, certificate, key)
    if client_ca is not None:
        _trust(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    ca: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> RenewableContext:
    """For a client: the server's certificate must be signed by `ca` (None: an authority the machine
    trusts) and carry the name it was called by. `certificate` and `key` are shown to servers that ask.

    Raises StartupError.
    """
    context = RenewableContext(ssl.PROTOCOL_TLS_CLIENT)
    _settle(context, ALPN)
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, ca)
    if certificate is not None and key is not None:
        _show(context, certificate, key)
    elif certificate is not None or key is not None:
        raise _refusal("a client certificate needs its key, and a key its certificate: set both or neither")
    return context


def _settle(context: ssl.SSLContext, alpn: Sequence[str]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(alpn))


def _show(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _readable(certificate, "certificate")
    _readable(key, "key")
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise _refusal(
                f"the key {key} does not belong to the first certificate in {certificate}; "
                "the own certificate comes first, then those that signed it"
            ) from None
        raise _refusal(
            f"expected a PEM certificate in {certificate} and a PEM key in {key}: {_reason(error)}"
        ) from None
    except ValueError as error:
        raise _refusal(f"the key {key}: {error}") from None


def _no_passphrase() -> str:
    # Without this, OpenSSL would ask at the terminal, and a daemon wait for ever.
    raise ValueError("it is protected by a passphrase; a daemon needs one without")


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    _readable(ca, "CA certificates")
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise _refusal(f"expected PEM certificates in {ca}: {_reason(error)}") from None


def _readable(path: Path, what: str) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise _refusal(f"the {what} {path} cannot be read: {error.strerror}") from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "not readable").lower().replace("_", " ")


def _refusal(why: str) -> StartupError:
    return StartupError(f"TLS: {why}", exit_code=EX_CONFIG)
