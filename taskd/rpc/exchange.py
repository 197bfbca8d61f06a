"""HTTP/2 streams used straight from Trio, on connections that grpclib keeps.

grpclib's own streams are awaited by asyncio tasks, and each step across the border costs more than
the work itself. Here the bytes are split into messages in the transport's callback, which wakes the
waiting Trio task, and a Trio task writes to the transport directly: trio-asyncio runs both in one
thread, so no task and no queue lies between. grpclib keeps the connection: settings, windows,
pings, and which event belongs to which stream.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import trio
from grpclib.protocol import Stream as GrpclibStream
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.stream import H2Stream, StreamInputs
from trio.lowlevel import ParkingLot

from taskd.errors import PeerUnavailable
from taskd.locks import take
from taskd.rpc.base import Headers
from taskd.rpc.inbox import PREFIX, Inbox
from taskd.rpc.shortcut import DATA, END_HEADERS, END_STREAM, HEADERS, frame_head

if TYPE_CHECKING:
    from taskd.rpc.connection import Channel


# An answer of status OK always has the same two blocks of headers. Encoded once, without the encoder's
# memory, they save a fifth of the time that a small call takes.
PART = (StreamInputs.SEND_DATA,)
WHOLE_REQUEST = (StreamInputs.SEND_DATA, StreamInputs.SEND_END_STREAM)
WHOLE_ANSWER = (
    StreamInputs.SEND_HEADERS,
    StreamInputs.SEND_DATA,
    StreamInputs.SEND_HEADERS,
    StreamInputs.SEND_END_STREAM,
)


def _never_indexed(name: bytes, value: str) -> bytes:
    """A header field by RFC 7541, 6.2.2: `name` is its encoded name; up to 126 bytes of value."""
    return name + bytes([len(value)]) + value.encode()


STATUS_200, CONTENT_TYPE = b"\x88", b"\x0f\x10"  # names in HPACK's static table
OK_HEADS = {
    kind: STATUS_200 + _never_indexed(CONTENT_TYPE, kind)
    for kind in ("application/grpc", "application/grpc+proto")
}
OK_TAIL = _never_indexed(b"\x00\x0bgrpc-status", "0")


class Signal(asyncio.Event):
    """An event that grpclib sets and Trio tasks wait for; `wakes` so many of them."""

    def __init__(self, lot: ParkingLot, wakes: float = math.inf) -> None:
        # Without what asyncio's has for those who wait: no asyncio task ever does.
        self._value = False
        self._lot = lot
        self._wakes = wakes

    def set(self) -> None:
        # Set a dozen times in each call, mostly for nobody.
        self._value = True
        if self._lot:
            self._lot.unpark(count=self._wakes)


class Exchange(GrpclibStream):
    """One HTTP/2 stream and the gRPC messages on it.

    Whoever made it calls `release` in the end; until then the connection keeps it.
    """

    connection: Channel
    buffer: Inbox
    id: int

    def __init__(self, connection: Channel, stream_id: int) -> None:
        # Not as grpclib begins a stream, with a queue, events and times that nobody looks at here: they
        # took an eighth of the time of a small call.
        self.connection = connection
        self._h2_connection = connection.h2
        self._transport = connection.transport
        self.id = stream_id
        self.wrapper = None
        self.headers = None
        self.trailers = None
        self.gone: str | None = None
        self.release: Callable[[], None] = lambda: None
        self.on_gone: Callable[[], None] = lambda: None
        self._room = ParkingLot()
        self._sending = trio.Lock()
        self.buffer = Inbox(
            connection.max_message_bytes, partial(connection.ack, stream_id), connection.budget
        )
        self.window_updated = Signal(self._room)
        self.headers_received = self.trailers_received = Signal(self.buffer.arrived)

    def __terminated__(self, reason: str) -> None:
        if self.gone is None:
            self.gone = reason
            self.on_gone()
        if self._room:
            self._room.unpark_all()
        if self.buffer.arrived:
            self.buffer.arrived.unpark_all()

    def raise_if_gone(self) -> None:
        if self.gone is not None:
            raise PeerUnavailable(f"{self.connection.peer}: {self.gone}")

    async def receive(self) -> bytes | None:
        """The next message, None when the peer finished its side."""
        await trio.lowlevel.checkpoint_if_cancelled()
        inbox = self.buffer
        waited = False
        while (message := inbox.take()) is None:
            if inbox.fault is not None:
                raise inbox.fault
            if inbox.finished:
                break
            self.raise_if_gone()
            await inbox.arrived.park()
            waited = True
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return message

    async def send(self, body: bytes, *, end: bool = False, hold: bool = False) -> None:
        """Hand one message to the transport, waiting while the peer does not read.

        `end`: it is our last. `hold`: its last part may wait for the next flush, which follows at once.
        """
        await take(self._sending)
        left = memoryview(PREFIX.pack(0, len(body)) + body)
        untouched = len(left)
        try:
            while len(left):
                await self._wait_for_room()
                left = left[self._write(left, end, hold) :]
        except trio.Cancelled:
            if len(left) < untouched:
                self.give_up(ErrorCodes.CANCEL, "a message was cancelled in the middle")
            raise
        finally:
            self._sending.release()

    async def _wait_for_room(self) -> None:
        while True:
            self.raise_if_gone()
            if self.connection.write_ready.is_set() and self._window() > 0:
                return
            await self._room.park()

    def ask(self, body: bytes) -> bool:
        """Write a whole request behind its head; False when it must wait."""
        self.raise_if_gone()
        stream = self._open_stream()
        size = PREFIX.size + len(body)
        if not self._takes_now(size):
            return False
        self._advance(stream, WHOLE_REQUEST)
        self._consume(stream, size)
        self._h2_connection._data_to_send += b"".join(
            (frame_head(size, DATA, END_STREAM, self.id), PREFIX.pack(0, len(body)), body)
        )
        self.connection.flush()
        self.connection.data_send_process()
        return True

    def reply(self, content_type: str, body: bytes) -> bool:
        """Write a whole answer of status OK, to be flushed with those of others; False when it must wait."""
        self.raise_if_gone()
        stream = self._open_stream()
        size = PREFIX.size + len(body)
        h2 = self._h2_connection
        head = OK_HEADS.get(content_type)
        if (
            head is None
            or not self.buffer.ended
            or h2.encoder.header_table.resized  # which the next block from the encoder has to tell
            or not self._takes_now(size)
        ):
            return False
        self._advance(stream, WHOLE_ANSWER)
        self._consume(stream, size)
        h2._data_to_send += b"".join(
            (
                frame_head(len(head), HEADERS, END_HEADERS, self.id),
                head,
                frame_head(size, DATA, 0, self.id),
                PREFIX.pack(0, len(body)),
                body,
                frame_head(len(OK_TAIL), HEADERS, END_HEADERS | END_STREAM, self.id),
                OK_TAIL,
            )
        )
        self.connection.flush_soon()
        self.connection.data_send_process()
        return True

    def _open_stream(self) -> H2Stream:
        stream = self._h2_connection.streams.get(self.id)
        if stream is None or self.connection.is_closing():
            raise PeerUnavailable(f"{self.connection.peer}: the stream is closed")
        return stream

    def _takes_now(self, size: int) -> bool:
        """Whether so many bytes can be written at once, in one frame."""
        return (
            self.connection.write_ready.is_set()
            and size <= self._h2_connection.max_outbound_frame_size
            and size <= self._window()
            and not self._sending.locked()
        )

    def _advance(self, stream: H2Stream, steps: tuple[StreamInputs, ...]) -> None:
        try:
            for step in steps:
                stream.state_machine.process_input(step)
        except H2Error as error:
            raise PeerUnavailable(f"{self.connection.peer}: the stream is closed") from error

    def _consume(self, stream: H2Stream, size: int) -> None:
        """So much data is written: it counts against both windows."""
        stream.outbound_flow_control_window -= size
        self._h2_connection.outbound_flow_control_window -= size

    def _window(self) -> int:
        try:
            return self._h2_connection.local_flow_control_window(self.id)
        except H2Error as error:
            raise PeerUnavailable(f"{self.connection.peer}: the stream is closed") from error

    def _write(self, left: memoryview, end: bool, hold: bool) -> int:
        """Write what the window takes, in one call of the transport; how many bytes that was."""
        h2, stream = self._h2_connection, self._open_stream()
        size = min(self._window(), len(left))
        last = end and size == len(left)
        self._advance(stream, WHOLE_REQUEST if last else PART)
        self._consume(stream, size)
        most = h2.max_outbound_frame_size
        for start in range(0, size, most):
            part = left[start : min(start + most, size)]
            flags = END_STREAM if last and start + most >= size else 0
            h2._data_to_send += frame_head(len(part), DATA, flags, self.id)
            h2._data_to_send += part
        if not (hold and size == len(left)):
            self.connection.flush()
        self.connection.data_send_process()
        return size

    def send_head(self, headers: Headers, *, end: bool = False, flush: bool = True) -> None:
        """Write headers or trailers; they are small, and wait for nobody."""
        self.raise_if_gone()
        if self.connection.is_closing() or self.id not in self._h2_connection.streams:
            raise PeerUnavailable(f"{self.connection.peer}: the stream is closed")
        try:
            self._h2_connection.send_headers(self.id, headers, end_stream=end)
        except H2Error as error:
            raise PeerUnavailable(f"{self.connection.peer}: the stream is closed") from error
        if flush:
            self.connection.flush()
        self.connection.headers_send_process()

    def finish(self) -> None:
        """End our side without a further message."""
        self.raise_if_gone()
        try:
            self._h2_connection.end_stream(self.id)
        except H2Error as error:
            raise PeerUnavailable(f"{self.connection.peer}: the stream is closed") from error
        self.connection.flush()

    def give_up(self, code: ErrorCodes, reason: str) -> None:
        """Give the stream up, telling the peer, if it is still open."""
        if self.closable:
            self.reset_nowait(code)
        self.__terminated__(reason)
