"""`taskd.v1.LogService`: the embedded log's door, by which producers in other processes append."""

from __future__ import annotations

from taskd.errors import Refused, Undecodable
from taskd.log.base import Position, Rejected, Writer
from taskd.producer.append_codec import decode_request, encode_response
from taskd.rpc.base import Services, Unary

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
            outgoing = decode_request(request)
        except Undecodable as error:
            raise Refused("INVALID_ARGUMENT", f"the request cannot be read: {error}") from None
        unknown = {record.topic for record in outgoing} - self._topics
        if unknown:
            raise Refused(
                "INVALID_ARGUMENT",
                f"this broker has no topic {sorted(unknown)[0]!r}; it has {', '.join(sorted(self._topics))}",
            )
        answers = await self._writer.append(outgoing)
        return encode_response([_position(answer) for answer in answers])


def _position(answer: Position | Exception) -> Position:
    if isinstance(answer, Rejected):
        raise Refused("INVALID_ARGUMENT", str(answer))
    if isinstance(answer, Exception):
        raise Refused("UNAVAILABLE", str(answer))
    return answer
