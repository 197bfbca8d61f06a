"""Where a daemon listens, and what it shows and asks for there."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from taskd.config.schema.base import Port, PositiveInt, PositiveSeconds, Secret, Section


class ListenSection(Section):
    """Where to listen. The default is this machine only."""

    host: str = Field(default="127.0.0.1", description="address to bind")
    port: Port = Field(default=0, description="port to bind; 0 takes a free one")


class ListenTlsSection(Section):
    """TLS of a listener. Files are PEM."""

    certificate: Path = Field(description="the server's certificate, then those that signed it")
    key: Path = Field(description="its private key, without a passphrase")
    client_ca: Path | None = Field(
        default=None, description="callers must show a certificate signed by these (mutual TLS)"
    )


class HttpSection(ListenSection):
    """Where health and metrics are served."""

    port: Port = Field(default=50052, description="port to bind; 0 takes a free one")
    tls: ListenTlsSection | None = Field(default=None, description="certificate and key; null: in the clear")


class RpcSection(ListenSection):
    """Where workers and producers connect, and what they must show."""

    port: Port = Field(default=50051, description="port to bind; 0 takes a free one")
    secrets: tuple[Secret, ...] = Field(
        default=(), description="calls must be signed with one of these; empty: anybody may call"
    )
    tls: ListenTlsSection | None = Field(default=None, description="certificate and key; null: in the clear")
    max_connections: PositiveInt = Field(default=4_096, description="connections at once; more are closed")
    keepalive_s: PositiveSeconds = Field(
        default=60, description="a connection is asked so often whether its peer still lives"
    )
