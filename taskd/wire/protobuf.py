"""A small reader and writer of the protobuf wire format, for the paths where building messages is too slow.

Reading yields each field as (number, wire type, value, start, end): an int for varints and fixed
widths, bytes for length-delimited fields; `start` and `end` let the caller keep a field as it came.
"""

from __future__ import annotations

from collections.abc import Iterator

from taskd.errors import Undecodable

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
UINT64_MAX = 2**64 - 1
ONE_BYTE = tuple(bytes((value,)) for value in range(0x80))

Field = tuple[int, int, "int | bytes", int, int]


def fields(raw: bytes, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of one message in the order they lie in `raw[start:end]`.

    Raises Undecodable on anything that is not the wire format: truncated fields, groups,
    field number 0, varints beyond 64 bits.
    """
    position = start
    stop = len(raw) if end is None else end
    while position < stop:
        begin = position
        key = raw[position]
        # Keys, lengths and numbers of one byte are the rule: read here, without a call.
        if key < 0x80:
            position += 1
        else:
            key, position = read_varint(raw, position, stop)
        number, wire_type = key >> 3, key & 7
        if number == 0 or number > 536_870_911:  # the largest number of the protobuf specification
            raise Undecodable(f"field number {number} at byte {begin} is not a valid one")
        if wire_type == VARINT:
            if position < stop and raw[position] < 0x80:
                value = raw[position]
                position += 1
            else:
                value, position = read_varint(raw, position, stop)
            yield number, wire_type, value, begin, position
            continue
        if wire_type == LENGTH:
            if position < stop and raw[position] < 0x80:
                size = raw[position]
                position += 1
            else:
                size, position = read_varint(raw, position, stop)
        elif wire_type == FIXED64:
            size = 8
        elif wire_type == FIXED32:
            size = 4
        else:
            raise Undecodable(f"wire type {wire_type} at byte {begin} is not one that proto3 uses")
        if size > stop - position:
            raise Undecodable(
                f"field {number} at byte {begin} claims {size} bytes, {stop - position} are left"
            )
        chunk = raw[position : position + size]
        position += size
        if wire_type == LENGTH:
            yield number, wire_type, chunk, begin, position
        else:
            yield number, wire_type, int.from_bytes(chunk, "little"), begin, position


def check_whole(raw: bytes) -> None:
    """Raises Undecodable unless `raw` is fields from end to end: the generated messages take a field
    that was cut off for what is left of it."""
    for _ in fields(raw):
        pass


def read_varint(raw: bytes, position: int, stop: int) -> tuple[int, int]:
    """The varint at `position` and the position behind it."""
    value = shift = 0
    if position + 1 < stop:  # one byte or two: the rule
        low = raw[position]
        if low < 0x80:
            return low, position + 1
        high = raw[position + 1]
        if high < 0x80:
            return low & 0x7F | high << 7, position + 2
        value, shift, position = low & 0x7F | (high & 0x7F) << 7, 14, position + 2
    while position < stop:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & UINT64_MAX, position
        shift += 7
        if shift > 63:
            raise Undecodable(f"a varint at byte {position} is longer than 64 bits")
    raise Undecodable("the bytes end in the middle of a varint")


def varint(value: int) -> bytes:
    """`value`, 0 to 2**64 - 1, as a varint."""
    if value < 0x80:
        return ONE_BYTE[value]
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    if value < 0x200000:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def varint_field(number: int, value: int) -> bytes:
    if number < 16 and value < 0x80:  # the rule, without calls
        return ONE_BYTE[number << 3] + ONE_BYTE[value]
    return varint(number << 3) + varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    size = len(value)
    if number < 16 and size < 0x80:
        return ONE_BYTE[number << 3 | LENGTH] + ONE_BYTE[size] + value
    return varint(number << 3 | LENGTH) + varint(size) + value


def text_field(number: int, value: str) -> bytes:
    return bytes_field(number, value.encode())


def signed(value: int) -> int:
    """A varint read as the int64 or int32 it stands for."""
    return value - (1 << 64) if value >> 63 else value
