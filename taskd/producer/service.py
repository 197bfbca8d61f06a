"""`taskd.v1.LogService`: the embedded log's door, by which producers in other processes append."""

from __future__ import annotations

from taskd.errors import Refused
from taskd.log.base import Outgoing, Position, Rejected, Writer
from taskd.rpc.base import Services, Unary
from taskd.wire.generated.taskd.v1 import AppendedRecord, AppendRecord, AppendRequest, AppendResponse
from taskd.wire.protobuf import check_whole

METHOD = "/taskd.v1.LogService/Append"


class LogService:
    """Answers when every record of the request is durable; a request of which one cannot be is refused."""

    def __init__(self, writer: Writer, topics: frozenset[str]) -> None:
        self._writer = writer
        self._topics = topics

    @property
    def services(self) -> Services:
        return {METHOD: Unary(self.append)}

    async def append(self, request: bytes) -> bytes:
        try:
            check_whole(request)
            records = AppendRequest.parse(request).records
        except Exception as error:  # the generated code raises many kinds
            raise Refused("INVALID_ARGUMENT", f"the request cannot be read: {error}") from None
        outgoing = [_outgoing(record) for record in records]
        unknown = {record.topic for record in outgoing} - self._topics
        if unknown:
            raise Refused(
                "INVALID_ARGUMENT",
                f"this broker has no topic {sorted(unknown)[0]!r}; it has {', '.join(sorted(self._topics))}",
            )
        answers = await self._writer.append(outgoing)
        return bytes(AppendResponse(records=[_appended(answer) for answer in answers]))


def _outgoing(record: AppendRecord) -> Outgoing:
    """Raises Refused for fields of another type than declared, which the generated code takes as they are.

    By hand, because this is on every record's way.
    """
    try:
        headers = tuple((header.name, header.value) for header in record.headers)
        found = Outgoing(record.topic, record.value, record.key, headers)
    except AttributeError:  # a number in place of a message
        fits = False
    else:
        texts = (found.topic, *(name for name, _ in headers))
        values = (found.value, found.key or b"", *(value for _, value in headers))
        fits = all(isinstance(text, str) for text in texts)
        fits &= all(isinstance(value, bytes) for value in values)
    if not fits:
        raise Refused("INVALID_ARGUMENT", "the request cannot be read: a field is of another type")
    return found


def _appended(answer: Position | Exception) -> AppendedRecord:
    if isinstance(answer, Rejected):
        raise Refused("INVALID_ARGUMENT", str(answer))
    if isinstance(answer, Exception):
        raise Refused("UNAVAILABLE", str(answer))
    return AppendedRecord(partition=answer.partition.number, offset=answer.offset)
