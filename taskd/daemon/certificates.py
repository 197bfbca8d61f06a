"""The certificates of a broker: read at the start, and again when the configuration is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from taskd.config.schema import BrokerConfig
from taskd.errors import StartupError
from taskd.rpc.access import http_tls, push_tls, server_tls
from taskd.rpc.tls import RenewableContext

log = structlog.get_logger("taskd.broker")

# By section of the configuration; None: TLS is not used there.
MAKE: Mapping[str, Callable[[BrokerConfig], RenewableContext | None]] = {
    "rpc.tls": lambda config: server_tls(config.rpc),
    "http.tls": lambda config: http_tls(config.http),
    "push.tls": lambda config: push_tls(config.push) if config.dispatch.mode == "push" else None,
}


class Certificates:
    """`contexts` are what listeners and clients were given, and stay the same objects."""

    def __init__(self, config: BrokerConfig) -> None:
        """Raises StartupError when a file cannot be used."""
        made = {place: make(config) for place, make in MAKE.items()}
        self.contexts = {place: context for place, context in made.items() if context is not None}

    def renew(self, config: BrokerConfig) -> None:
        """Read the files again. What they show and trust holds for connections from now on.

        Files that cannot be used are logged, and what was read before holds.
        """
        for place, context in self.contexts.items():
            try:
                latest = MAKE[place](config)
            except StartupError as error:
                log.error("the old certificate holds", of=place, problem=str(error))
            else:
                if latest is not None:
                    context.renew(latest)
