"""What both ends of a call agree on. No type of grpclib appears here or crosses these interfaces."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

Headers = list[tuple[str, str]]

MAX_MESSAGE_BYTES = 10 * 1024 * 1024
"""Requests and replies of existing brokers and clients are held to this size (contract, RPC answers)."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that must be taken back when it cannot be given.

    `undelivered` is awaited, shielded from cancellation, when the peer was gone before `body` was
    written: its call was cancelled or timed out, or its connection was lost.
    """

    body: bytes
    undelivered: Callable[[], Awaitable[object]] | None = None


class Duplex(Protocol):
    """The messages of one bidirectional stream. One task may send while another receives."""

    async def receive(self) -> bytes | None:
        """The next message, None when the peer finished its side.

        Raises PeerUnavailable when the peer is gone. On the client also Refused, PeerTimeout or
        PeerUnavailable when the server ended the stream with an error. Cancelling loses no message.
        """
        ...

    async def send(self, body: bytes) -> None:
        """Hand one message to the transport; waits while the peer does not read.

        Raises PeerUnavailable when the peer is gone. Cancelling before anything was written is
        harmless; cancelling in the middle of a message gives up the stream.
        """
        ...


class ClientStream(Duplex, Protocol):
    """A stream as its caller holds it."""

    async def finish(self) -> None:
        """Tell the server that nothing more will be sent; messages can still be received."""
        ...


@dataclass(frozen=True, slots=True)
class Unary:
    """One request, one reply. The handler raises Refused to answer with another status than OK."""

    handler: Callable[[bytes], Awaitable[bytes | Reply]]


@dataclass(frozen=True, slots=True)
class Stream:
    """Messages both ways until the handler returns; it is cancelled when the peer goes."""

    handler: Callable[[Duplex], Awaitable[None]]


Services = Mapping[str, Unary | Stream]
"""Full gRPC paths, such as `/taskd.v1.LogService/Append`, and what answers there."""
