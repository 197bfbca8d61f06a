"""How a client of Kafka connects, starts and ends."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from taskd import aio  # isort: skip  # before aiokafka: it replaces functions of asyncio

from aiokafka import AIOKafkaProducer, errors

from taskd.config.schema import ClusterSection
from taskd.errors import ConfigError

REQUEST_WITHIN_MS = 10_000
STOP_WITHIN_S = 5.0

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Security:
    """Credentials. `protocol`: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL; files are PEM."""

    protocol: str = "PLAINTEXT"
    mechanism: str = "PLAIN"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, cluster: ClusterSection) -> Security:
        password = cluster.sasl_password
        return cls(
            protocol=cluster.security_protocol,
            mechanism=cluster.sasl_mechanism,
            username=cluster.sasl_username,
            password=None if password is None else password.get_secret_value(),
            ca=cluster.ssl_ca_location,
            certificate=cluster.ssl_certificate_location,
            key=cluster.ssl_key_location,
        )

    def settings(self) -> dict[str, Any]:
        """What aiokafka's clients are told. Raises ConfigError when a file cannot be used."""
        told: dict[str, Any] = {"security_protocol": self.protocol}
        if self.protocol.startswith("SASL"):
            told["sasl_mechanism"] = self.mechanism
            told["sasl_plain_username"] = self.username
            told["sasl_plain_password"] = self.password
        if self.protocol.endswith("SSL"):
            told["ssl_context"] = self._ssl_context()
        return told

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"expected certificates in PEM form in {self.ca}, the file of ssl_ca_location: {error}"
            ) from error
        if self.certificate is not None:
            try:
                # A key with a passphrase would make OpenSSL ask the terminal for it.
                context.load_cert_chain(self.certificate, self.key, password="")
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(
                    f"expected a certificate in {self.certificate} and its key, without a passphrase, in "
                    f"{self.key}, the files of ssl_certificate_location and ssl_key_location: {error}"
                ) from error
        return context


async def started(make: Callable[[], Awaitable[C]]) -> C:
    """Make and start a client; one that fails to start is stopped, or its end would raise an alarm."""
    client = await aio.call(make)
    try:
        await aio.call(client.start)  # type: ignore[attr-defined]  # aiokafka is untyped
    except BaseException:
        await stop(client)
        raise
    return client


async def stop(client: Any) -> None:
    if not await aio.finish(client.stop, within_s=STOP_WITHIN_S):
        # An interrupted stop() is not repeated by aiokafka, so its parts are ended one by one.
        await aio.finish(partial(_tear_down, client), within_s=1)


async def _tear_down(client: Any) -> None:
    """The connections are closed whatever fails before: they would be kept up for as long as we live."""
    if isinstance(client, AIOKafkaProducer):
        try:
            client._message_accumulator.fail_all(errors.KafkaConnectionError("given up"))
            with suppress(KeyError):  # it still looks for a batch that has just been failed
                await client._sender.close()
        finally:
            await client.client.close()
    else:
        try:
            if client._coordinator is not None:
                client._coordinator._coordination_task.cancel()
            if client._fetcher is not None:
                await client._fetcher.close()
        finally:
            await client._client.close()
