"""How `taskd.v1.LogService/Append` is written and read: by hand, every record of an embedded log passes here.

Read strictly: a field of another type than declared is an error, unknown fields are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskd.errors import Undecodable
from taskd.log.base import Outgoing, Partition, Position
from taskd.wire.protobuf import (
    LENGTH,
    VARINT,
    bytes_field,
    fields,
    read_varint,
    text_field,
    varint,
    varint_field,
)

# Field numbers of AppendRequest and AppendResponse, of AppendRecord, RecordHeader and AppendedRecord
RECORDS = 1
TOPIC, KEY, VALUE, HEADERS = 1, 2, 3, 4
HEADER_NAME, HEADER_VALUE = 1, 2
PARTITION, OFFSET = 1, 2


def encode_request(records: Sequence[Outgoing]) -> bytes:
    """A taskd.v1.AppendRequest."""
    return b"".join([bytes_field(RECORDS, _record(record)) for record in records])


def _record(record: Outgoing) -> bytes:
    topic, value, key, headers = record
    out = text_field(TOPIC, topic)
    if key is not None:
        out += bytes_field(KEY, key)
    out += b"\x1a%b%b" % (varint(len(value)), value)
    for name, content in headers:
        out += bytes_field(HEADERS, text_field(HEADER_NAME, name) + bytes_field(HEADER_VALUE, content))
    return out


def decode_request(raw: bytes) -> list[Outgoing]:
    """The records of a taskd.v1.AppendRequest. Raises Undecodable."""
    records = []
    for number, wire_type, value, _, _ in fields(raw):
        if number == RECORDS:
            found = _bytes(wire_type, value, "records")
            records.append(_usual_record(found) or _any_record(found))
    return records


def _usual_record(raw: bytes) -> Outgoing | None:
    """As our encoder writes one with a key and no headers; None: another one, or none at all."""
    try:
        key_at = 2 + raw[1]
        value_at = key_at + 2 + raw[key_at + 1]
        # The length of topic and key is of one byte each.
        tags = raw[0], raw[key_at], raw[value_at]
        if tags != (0x0A, 0x12, 0x1A) or raw[1] > 0x7F or raw[key_at + 1] > 0x7F:
            return None
        size, begin = read_varint(raw, value_at + 1, len(raw))
        if begin + size != len(raw):
            return None
        return Outgoing(raw[2:key_at].decode(), raw[begin:], raw[key_at + 2 : value_at])
    except (IndexError, Undecodable, UnicodeDecodeError):
        return None


def _any_record(raw: bytes) -> Outgoing:
    topic = content = b""
    key = None
    headers = []
    for number, wire_type, value, _, _ in fields(raw):
        if number == TOPIC:
            topic = _bytes(wire_type, value, "topic")
        elif number == KEY:
            key = _bytes(wire_type, value, "key")
        elif number == VALUE:
            content = _bytes(wire_type, value, "value")
        elif number == HEADERS:
            headers.append(_header(_bytes(wire_type, value, "headers")))
    return Outgoing(_text(topic, "topic"), content, key, tuple(headers))


def _header(raw: bytes) -> tuple[str, bytes]:
    name = content = b""
    for number, wire_type, value, _, _ in fields(raw):
        if number == HEADER_NAME:
            name = _bytes(wire_type, value, "name")
        elif number == HEADER_VALUE:
            content = _bytes(wire_type, value, "value")
    return _text(name, "name"), content


def _bytes(wire_type: int, value: int | bytes, name: str) -> bytes:
    if wire_type != LENGTH or not isinstance(value, bytes):
        raise Undecodable(f"the field {name} is of another type")
    return value


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Undecodable(f"the {name} is not UTF-8: {error.reason} at byte {error.start}") from None


def encode_response(positions: Sequence[Position]) -> bytes:
    """A taskd.v1.AppendResponse."""
    return b"".join([bytes_field(RECORDS, _position(position)) for position in positions])


def _position(position: Position) -> bytes:
    (_, number), offset = position
    # proto3 leaves out what has its default value.
    return (varint_field(PARTITION, number) if number else b"") + (
        varint_field(OFFSET, offset) if offset else b""
    )


def decode_response(reply: bytes, records: Sequence[Outgoing]) -> list[Position]:
    """The positions in a taskd.v1.AppendResponse. Raises Undecodable unless there is one for each record."""
    places = [
        _place(value)
        for number, _, value, _, _ in fields(reply)
        if number == RECORDS and isinstance(value, bytes)
    ]
    if len(places) != len(records):
        raise Undecodable(f"expected the positions of {len(records)} records, found {len(places)}")
    return [
        Position(Partition(record.topic, number), offset)
        for record, (number, offset) in zip(records, places, strict=True)
    ]


def _place(raw: bytes) -> tuple[int, int]:
    partition = offset = 0
    for number, wire_type, value, _, _ in fields(raw):
        if wire_type == VARINT and isinstance(value, int):
            if number == PARTITION:
                partition = value
            elif number == OFFSET:
                offset = value
    return partition, offset
