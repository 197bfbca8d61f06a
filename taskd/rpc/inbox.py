"""The received half of a stream: gRPC messages out of HTTP/2 data. Pure of I/O.

A message is a byte saying whether it is compressed, its length in four bytes, and its body. Its
length is judged before its body is kept, so a peer can make us hold no more than the limit and the
stream's window.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable

from grpclib.protocol import Buffer
from trio.lowlevel import ParkingLot

from taskd.errors import Refused
from taskd.rpc.limits import Budget

PREFIX = struct.Struct(">BI")


class Inbox(Buffer):
    """Messages of one stream in the order they came, and how much of the window each still occupies.

    grpclib's processor calls `add`, `eof` and `unacked_size`. `acknowledge(size)` gives window back
    to the peer: for a finished message when it is taken, for an unfinished one as soon as no
    finished one waits before it, since it may be larger than the window. So at most one message and
    one window are kept for a reader that does not read.
    """

    def __init__(
        self, max_message_bytes: int, acknowledge: Callable[[int], None], budget: Budget | None = None
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._budget = budget
        self._finished_bytes = 0
        self._kept_bytes = 0  # as the budget was told
        self._acknowledge = acknowledge
        self._messages: deque[tuple[bytes, int]] = deque()
        self._partial = bytearray()
        self._held = 0  # bytes of the partial message that still occupy the window
        self._ended = False
        self.fault: Refused | None = None
        self.arrived = ParkingLot()

    def add(self, data: bytes, ack_size: int) -> None:
        if self.fault is not None:
            self._acknowledge(ack_size)
            return
        if ack_size > len(data):
            self._acknowledge(ack_size - len(data))  # padding
        if self._is_whole(data):
            self._messages.append((data[PREFIX.size :], len(data)))
            self._finished_bytes += len(data) - PREFIX.size
        else:
            self._partial += data
            self._held += len(data)
            self._split()
        self._account()
        self._give_back_partial()
        if self.arrived:
            self.arrived.unpark_all()

    def _is_whole(self, data: bytes) -> bool:
        """Whether this is one message, no more and no less, that can be taken: the rule for small ones."""
        if self._partial or len(data) < PREFIX.size:
            return False
        compressed, length = PREFIX.unpack_from(data)
        return not compressed and length == len(data) - PREFIX.size and length <= self._max_message_bytes

    def _split(self) -> None:
        """Move out of the partial message what is finished; keep nothing of one that is not taken here."""
        start = 0
        while len(self._partial) - start >= PREFIX.size:
            compressed, length = PREFIX.unpack_from(self._partial, start)
            self.fault = self._fault_of(compressed, length)
            if self.fault is not None:
                start = len(self._partial)
                break
            end = start + PREFIX.size + length
            if end > len(self._partial):
                break
            occupied = min(end - start, self._held - (len(self._partial) - end))
            self._messages.append((bytes(memoryview(self._partial)[start + PREFIX.size : end]), occupied))
            self._finished_bytes += length
            self._held -= occupied
            start = end
        if start:
            del self._partial[:start]

    def _account(self) -> None:
        """Tell the budget; when all peers together hold too much, this is the message that is not taken."""
        if self._budget is None:
            return
        kept = len(self._partial) + self._finished_bytes
        self._budget.used_bytes += kept - self._kept_bytes
        self._kept_bytes = kept
        if self._partial and self._budget.used_bytes > self._budget.most_bytes:
            self.fault = Refused("UNAVAILABLE", "too many requests are being received; try again")
            self._partial.clear()
            self._account()

    def discard(self) -> None:
        """Nobody will take what is left."""
        self._partial.clear()
        self._messages.clear()
        self._finished_bytes = 0
        self._account()

    def _give_back_partial(self) -> None:
        if self._held and not self._messages:
            self._acknowledge(self._held)
            self._held = 0

    def _fault_of(self, compressed: int, length: int) -> Refused | None:
        if length > self._max_message_bytes:
            return Refused(
                "RESOURCE_EXHAUSTED",
                f"a message of {length} bytes is larger than the {self._max_message_bytes} taken here",
            )
        if compressed:
            return Refused(
                "UNIMPLEMENTED", "compressed messages are not taken; send them with grpc-encoding: identity"
            )
        return None

    def eof(self) -> None:
        self._ended = True
        if self._partial and self.fault is None:
            self.fault = Refused("INTERNAL", "the data ended in the middle of a message")
        if self.arrived:
            self.arrived.unpark_all()

    @property
    def ended(self) -> bool:
        """The peer sends nothing more."""
        return self._ended

    @property
    def finished(self) -> bool:
        """The peer ended its side in order, and everything was taken."""
        return self._ended and not self._messages and self.fault is None

    def take(self) -> bytes | None:
        """The next message, None when none is complete yet."""
        if not self._messages:
            return None
        body, occupied = self._messages.popleft()
        self._finished_bytes -= len(body)
        self._account()
        self._acknowledge(occupied)
        self._give_back_partial()
        return body

    def unacked_size(self) -> int:
        occupied = self._held + sum(size for _, size in self._messages)
        self._messages.clear()
        self._held = 0
        return occupied
