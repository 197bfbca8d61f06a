"""What the configuration says of secrets and TLS, as servers and clients are given it."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import SecretStr

from taskd.clock import Clock
from taskd.config.schema import (
    HttpSection,
    ListenTlsSection,
    PoolListenSection,
    PoolSection,
    ProducerConfig,
    PushSection,
    RpcSection,
)
from taskd.rpc import tls
from taskd.rpc.auth import Guard
from taskd.wire.signing import Secrets


@dataclass(frozen=True, slots=True)
class Access:
    """How a client makes itself known, and by what it knows the server. Default: in the clear, unsigned."""

    secrets: Secrets = field(default_factory=Secrets)
    tls: ssl.SSLContext | None = None


OPEN = Access()


def revealed(secrets: Iterable[SecretStr]) -> Secrets:
    return Secrets(secret.get_secret_value() for secret in secrets)


def pool_access(section: PoolSection) -> Access:
    """Of a worker's pool. Raises StartupError when a file of its TLS cannot be used."""
    return Access(revealed(section.secrets), pool_tls(section))


def pool_tls(section: PoolSection) -> tls.RenewableContext | None:
    """Of a pool's calls to its brokers. Raises StartupError as `pool_access`."""
    wanted = section.tls
    return None if wanted is None else tls.client_context(wanted.ca, wanted.certificate, wanted.key)


def listen_tls(section: PoolListenSection) -> tls.RenewableContext | None:
    """Of where a pool is called. Raises StartupError as `pool_access`."""
    return _listener_context(section.tls, tls.ALPN)


def producer_access(config: ProducerConfig) -> Access:
    """Of producers and of commands that ask a broker. Raises StartupError as `pool_access`."""
    context = None
    if config.tls or config.tls_ca or config.tls_certificate or config.tls_key:
        context = tls.client_context(config.tls_ca, config.tls_certificate, config.tls_key)
    return Access(revealed([config.secret] if config.secret else []), context)


def server_tls(section: RpcSection) -> tls.RenewableContext | None:
    """Of the gRPC listener. Raises StartupError as `pool_access`."""
    return _listener_context(section.tls, tls.ALPN)


def http_tls(section: HttpSection) -> tls.RenewableContext | None:
    """Of the HTTP listener. Raises StartupError as `pool_access`."""
    return _listener_context(section.tls, tls.HTTP_ALPN)


def push_tls(section: PushSection) -> tls.RenewableContext:
    """Of calls to workers. Raises StartupError as `pool_access`."""
    return tls.client_context(section.tls.ca, section.tls.certificate, section.tls.key)


def _listener_context(section: ListenTlsSection | None, alpn: Sequence[str]) -> tls.RenewableContext | None:
    if section is None:
        return None
    return tls.server_context(section.certificate, section.key, section.client_ca, alpn)


def server_guard(
    secrets: Secrets, clock: Clock, of_services: Mapping[str, Iterable[SecretStr]] | None = None
) -> Guard:
    """The broker's. `of_services`: secrets of services that `secrets`, its usual ones, must not open."""
    of = {service: revealed(secrets) for service, secrets in (of_services or {}).items()}
    return Guard(secrets, clock, of_services=of)
