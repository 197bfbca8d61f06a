"""Where a producer's records go: the broker that owns an embedded log, or Kafka."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from taskd.config.schema import ProducerConfig
from taskd.errors import LogUnavailable, PeerError, Refused, Undecodable
from taskd.log.base import Outgoing, Partition, Position, Rejected, Writer
from taskd.log.kafka import KafkaLog, Security
from taskd.rpc import client
from taskd.rpc.access import Access, producer_access
from taskd.wire.protobuf import bytes_field, fields, text_field

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
            return list(decode_response(reply, records))
        except Refused as error:
            if error.code in _BAD_RECORD and len(records) > 1:
                middle = len(records) // 2
                return await self.append(records[:middle]) + await self.append(records[middle:])
            kind = Rejected if error.code in _NEVER else LogUnavailable
            return [kind(f"{error.code}: {error.message}")] * len(records)
        except (PeerError, Undecodable) as error:
            return [LogUnavailable(str(error))] * len(records)


def encode_request(records: Sequence[Outgoing]) -> bytes:
    """A taskd.v1.AppendRequest."""
    return b"".join(bytes_field(1, _record(record)) for record in records)


def _record(record: Outgoing) -> bytes:
    out = text_field(1, record.topic)
    if record.key is not None:
        out += bytes_field(2, record.key)
    out += bytes_field(3, record.value)
    for name, value in record.headers:
        out += bytes_field(4, text_field(1, name) + bytes_field(2, value))
    return out


def decode_response(reply: bytes, records: Sequence[Outgoing]) -> list[Position]:
    """The positions in a taskd.v1.AppendResponse. Raises Undecodable unless there is one for each record."""
    appended = [{field[0]: field[2] for field in fields(raw)} for raw in _messages(reply)]
    if len(appended) != len(records):
        raise Undecodable(f"expected the positions of {len(records)} records, found {len(appended)}")
    return [
        Position(Partition(record.topic, _number(at.get(1))), _number(at.get(2)))
        for record, at in zip(records, appended, strict=True)
    ]


def _messages(reply: bytes) -> list[bytes]:
    return [value for number, _, value, _, _ in fields(reply) if number == 1 and isinstance(value, bytes)]


def _number(value: int | bytes | None) -> int:
    return value if isinstance(value, int) else 0
