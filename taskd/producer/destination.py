"""Where a producer's records go: the broker that owns an embedded log, or Kafka."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from taskd.config.schema import ProducerConfig
from taskd.errors import LogUnavailable, PeerError, Refused, Undecodable
from taskd.log.base import Outgoing, Position, Rejected, Writer
from taskd.log.kafka import KafkaLog, Security
from taskd.producer.append_codec import decode_response, encode_request
from taskd.rpc import client
from taskd.rpc.access import Access, producer_access

APPEND = "/taskd.v1.LogService/Append"

# Answers that will not change. The first group may concern one record of many.
_BAD_RECORD = {"INVALID_ARGUMENT", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED"}
_NEVER = {"FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED"} | _BAD_RECORD


@dataclass(frozen=True, slots=True)
class Destination:
    """A place to append to. `name` and `advice` are for error messages."""

    name: str
    advice: str
    open_writer: Callable[[], AbstractAsyncContextManager[Writer]]


def destination(config: ProducerConfig) -> Destination:
    """Where `config` says records go; opens nothing yet.

    Raises StartupError or ConfigError when TLS cannot be used.
    """
    if config.log == "kafka":
        return Destination(
            name=f"Kafka at {config.kafka}",
            advice="Check that it can be reached; TASKD_KAFKA or taskd.configure(kafka=...) names it",
            open_writer=KafkaLog(config.kafka, security=Security.of(config.cluster)).open_writer,
        )
    access = producer_access(config)
    return Destination(
        name=f"the broker at {config.broker}",
        advice=(
            "Check that `taskd broker` or `taskd dev` runs there; "
            "TASKD_BROKER or taskd.configure(broker=...) names it"
        ),
        open_writer=lambda: open_remote_writer(config.broker, config.timeout_s, access),
    )


@asynccontextmanager
async def open_remote_writer(address: str, timeout_s: float, access: Access) -> AsyncIterator[Writer]:
    """Append to the embedded log of the broker at `address`; connects on the first append."""
    async with client.connect(address, access) as connected:
        yield RemoteWriter(connected, timeout_s)


class RemoteWriter:
    """The log's writer, through the gRPC service of the broker that owns the log."""

    def __init__(self, connected: client.Client, timeout_s: float) -> None:
        self._client = connected
        self._timeout_s = timeout_s

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        """As `Writer.append`.

        One bad record makes the broker refuse the whole request, so it is searched for by halves; what
        was appended before is then appended twice, which ids make harmless.
        """
        if not records:
            return []
        try:
            reply = await self._client.call(APPEND, encode_request(records), timeout_s=self._timeout_s)
            return [*decode_response(reply, records)]
        except Refused as error:
            if error.code in _BAD_RECORD and len(records) > 1:
                middle = len(records) // 2
                return await self.append(records[:middle]) + await self.append(records[middle:])
            kind = Rejected if error.code in _NEVER else LogUnavailable
            return [kind(f"{error.code}: {error.message}")] * len(records)
        except (PeerError, Undecodable) as error:
            return [LogUnavailable(str(error))] * len(records)
