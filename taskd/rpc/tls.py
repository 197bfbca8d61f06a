"""TLS contexts, all made here: version 1.2 or newer, certificates always verified."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from taskd.errors import StartupError

EX_CONFIG = 78
ALPN = ("h2",)
HTTP_ALPN = ("http/1.1",)


def server_context(
    certificate: Path, key: Path, client_ca: Path | None = None, alpn: Sequence[str] = ALPN
) -> ssl.SSLContext:
    """For a listener that speaks `alpn`.

    With `client_ca`, callers must show a certificate that it signed (mutual TLS).
    Files are PEM; `certificate` holds the chain, own certificate first. Raises StartupError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _settle(context, alpn)
    _show(context, certificate, key)
    if client_ca is not None:
        _trust(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def renew(context: ssl.SSLContext, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
    """Show what the files hold now, to connections from now on; authorities are added, none is taken away.

    Raises StartupError; then nothing has changed.
    """
    server_context(certificate, key, client_ca)  # apart, because a wrong pair would leave half of it behind
    _show(context, certificate, key)
    if client_ca is not None:
        _trust(context, client_ca)


def client_context(
    ca: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """For a client: the server's certificate must be signed by `ca` (None: an authority the machine
    trusts) and carry the name it was called by. `certificate` and `key` are shown to servers that ask.

    Raises StartupError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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
