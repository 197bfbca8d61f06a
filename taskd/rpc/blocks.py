"""Blocks of headers that come again and again, byte for byte, on one connection.

HPACK has each end remember headers, so that the second call to a method names them by an index or two
each. Such a block means the same as long as nothing new was remembered, and need not be decoded again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hpack import Decoder, Encoder
from hpack.hpack import encode_integer
from hpack.struct import HeaderTuple
from hpack.table import HeaderTable

from taskd.rpc.base import Headers

BLOCKS_KEPT = 16  # of one connection; methods that one peer calls
BLOCK_BYTES = 256
KEPT_BYTES = 4_096  # of the headers of one block: peers that mean harm can have that much kept 16 times
SIZE_UPDATE, SIZE_UPDATE_MASK = 0x20, 0xE0  # how a block begins that changes the size of the memory


LITERAL = b"\x10"  # a header that is never remembered, its name spelled out (RFC 7541, 6.2.3)


def literal(name: str, value: str) -> bytes:
    """One header, for the end of a block: it is not remembered, as its value comes only once."""
    return LITERAL + _string(name.encode()) + _string(value.encode())


def _string(text: bytes) -> bytes:
    return bytes(encode_integer(len(text), 7)) + text


class Memory:
    """Whether the memory of one end still is what it was."""

    def __init__(self, table: HeaderTable) -> None:
        self._table = table
        self.note()

    def note(self) -> None:
        """Be it from now on what it is now."""
        entries = self._table.dynamic_entries
        self._newest = entries[0] if entries else None
        self._count = len(entries)
        self._size = self._table.maxsize

    def is_as_noted(self) -> bool:
        # What is added becomes the newest, and is another object than any that is there.
        entries = self._table.dynamic_entries
        return (
            len(entries) == self._count
            and (not entries or entries[0] is self._newest)
            and self._table.maxsize == self._size
        )


@dataclass(frozen=True, slots=True)
class Block:
    """One block, decoded. `is_usual`: what it says needs no further look by h2."""

    text: Headers
    is_usual: bool


class RememberingDecoder(Decoder):
    """A decoder that knows blocks again."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[bytes, Block] = {}
        self._memory = Memory(self.header_table)

    def known(self, data: bytes) -> Block | None:
        """What this block means, if it came before and still means the same."""
        return self._blocks.get(data) if self._memory.is_as_noted() else None

    def decode(self, data: bytes, raw: bool = False) -> Iterable[HeaderTuple]:
        if not self._memory.is_as_noted():
            self._blocks.clear()
            self._memory.note()
        headers = list(super().decode(data, raw=raw))
        if raw and self._memory.is_as_noted() and _is_worth_keeping(data, headers):
            if len(self._blocks) >= BLOCKS_KEPT:
                self._blocks.clear()
            # latin-1 decodes any byte: a strange header is its call's problem, not the connection's.
            text = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
            self._blocks[bytes(data)] = Block(text, _is_usual(text))
        return headers


class RememberingEncoder(Encoder):
    """An encoder that need not make the same block again."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[tuple[tuple[str, str], ...], bytes] = {}
        self._memory = Memory(self.header_table)

    def block(self, headers: tuple[tuple[str, str], ...]) -> bytes:
        """As `encode`. For headers that come again and again."""
        if self._memory.is_as_noted() and not self.header_table.resized:
            made = self._blocks.get(headers)
            if made is not None:
                return made
        else:
            self._blocks.clear()
            self._memory.note()
        # What has to be told of a new size is told once.
        is_plain = not self.header_table.resized
        made = bytes(self.encode(headers))
        if is_plain and self._memory.is_as_noted():
            if len(self._blocks) >= BLOCKS_KEPT:
                self._blocks.clear()
            self._blocks[headers] = made
        return made


def _is_worth_keeping(data: bytes, headers: list[HeaderTuple]) -> bool:
    return (
        0 < len(data) <= BLOCK_BYTES
        and data[0] & SIZE_UPDATE_MASK != SIZE_UPDATE
        and sum(len(name) + len(value) for name, value in headers) <= KEPT_BYTES
    )


def _is_usual(headers: Headers) -> bool:
    return not any(
        name == "content-length" or (name == ":status" and value.startswith("1")) for name, value in headers
    )
