"""Certificates: read at the start, and again when the configuration is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from taskd.config.schema import BrokerConfig, PoolSection, Section
from taskd.errors import StartupError
from taskd.rpc.access import http_tls, listen_tls, pool_tls, push_tls, server_tls
from taskd.rpc.tls import RenewableContext

C = TypeVar("C", bound=Section)
# By section of the configuration; None: TLS is not used there.
Makers = Mapping[str, Callable[[C], RenewableContext | None]]
BROKER: Makers[BrokerConfig] = {
    "rpc.tls": lambda config: server_tls(config.rpc),
    "http.tls": lambda config: http_tls(config.http),
    "push.tls": lambda config: push_tls(config.push) if config.dispatch.mode == "push" else None,
}
POOL: Makers[PoolSection] = {
    "tls": pool_tls,
    "listen.tls": lambda pool: listen_tls(pool.listen) if pool.protocol == "push" else None,
}

log = structlog.get_logger("taskd.certificates")


class Certificates(Generic[C]):
    """`contexts` are what listeners and clients were given, and stay the same objects."""

    def __init__(self, config: C, makers: Makers[C]) -> None:
        """Raises StartupError when a file cannot be used."""
        self._makers = makers
        made = {place: make(config) for place, make in makers.items()}
        self.contexts = {place: context for place, context in made.items() if context is not None}

    def renew(self, config: C) -> None:
        """Read the files again. What they show and trust holds for connections from now on.

        Files that cannot be used are logged, and what was read before holds.
        """
        for place, context in self.contexts.items():
            try:
                latest = self._makers[place](config)
            except StartupError as error:
                log.error("the old certificate holds", of=place, problem=str(error))
            else:
                if latest is not None:
                    context.renew(latest)


class ReadOnce:
    """The files of Kafka's clusters: clients read them when they are made, so a change needs a restart."""

    def __init__(self, config: BrokerConfig) -> None:
        self._files = {
            f"log.clusters.{name}.{key}": path
            for name, cluster in config.log.clusters.items()
            for key in ("ssl_ca_location", "ssl_certificate_location", "ssl_key_location")
            if (path := getattr(cluster, key)) is not None
        }
        self._seen = {key: _stamp(path) for key, path in self._files.items()}

    def tell(self) -> None:
        """Name those whose content has changed since the start."""
        for key, path in self._files.items():
            if _stamp(path) != self._seen[key]:
                log.warning("needs a restart", key=key, problem=f"{path} has changed since the start")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
