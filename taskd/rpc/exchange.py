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
from grpclib.protocol import Connection
from grpclib.protocol import Stream as GrpclibStream
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from trio.lowlevel import ParkingLot

from taskd.errors import PeerUnavailable
from taskd.rpc.base import Headers
from taskd.rpc.inbox import PREFIX, Inbox

if TYPE_CHECKING:
    from taskd.rpc.connection import Channel


class Signal(asyncio.Event):
    """An event that grpclib sets and Trio tasks wait for; `wakes` so many of them."""

    def __init__(self, lot: ParkingLot, wakes: float = math.inf) -> None:
        super().__init__()
        self._lot = lot
        self._wakes = wakes

    def set(self) -> None:
        # Set a dozen times in each call, mostly for nobody; no asyncio task ever waits for it.
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
        self.gone: str | None = None
        self.release: Callable[[], None] = lambda: None
        self.on_gone: Callable[[], None] = lambda: None
        self._room = ParkingLot()
        self._sending = trio.Lock()
        super().__init__(connection, connection.h2, connection.transport, stream_id=stream_id)
        self.window_updated = Signal(self._room)
        self.headers_received = Signal(self.buffer.arrived)
        self.trailers_received = Signal(self.buffer.arrived)

    def init_stream(self, stream_id: int, connection: Connection) -> None:
        super().init_stream(stream_id, connection)
        channel = self.connection
        self.buffer = Inbox(channel.max_message_bytes, partial(channel.ack, stream_id), channel.budget)

    def __terminated__(self, reason: str) -> None:
        if self.gone is None:
            self.gone = reason
            self.on_gone()
        self._room.unpark_all()
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
        async with self._sending:
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

    async def _wait_for_room(self) -> None:
        while True:
            self.raise_if_gone()
            if self.connection.write_ready.is_set() and self._window() > 0:
                return
            await self._room.park()

    def reply(self, head: Headers, body: bytes, tail: Headers) -> bool:
        """Write a whole answer at once, to be flushed with those of others; False when it must wait."""
        self.raise_if_gone()
        size = PREFIX.size + len(body)
        h2, connection = self._h2_connection, self.connection
        if connection.is_closing() or self.id not in h2.streams:
            raise PeerUnavailable(f"{connection.peer}: the stream is closed")
        if (
            not connection.write_ready.is_set()
            or size > h2.max_outbound_frame_size
            or size > self._window()
            or self._sending.locked()
        ):
            return False
        try:
            h2.send_headers(self.id, head)
            h2.send_data(self.id, PREFIX.pack(0, len(body)) + body)
            h2.send_headers(self.id, tail, end_stream=True)
        except H2Error as error:
            raise PeerUnavailable(f"{connection.peer}: the stream is closed") from error
        connection.flush_soon()
        connection.data_send_process()
        return True

    def _window(self) -> int:
        try:
            return self._h2_connection.local_flow_control_window(self.id)
        except H2Error as error:
            raise PeerUnavailable(f"{self.connection.peer}: the stream is closed") from error

    def _write(self, left: memoryview, end: bool, hold: bool) -> int:
        """Write what the window takes, in one call of the transport; how many bytes that was."""
        h2 = self._h2_connection
        size = min(self._window(), len(left))
        last = end and size == len(left)
        try:
            for start in range(0, size, h2.max_outbound_frame_size):
                stop = min(start + h2.max_outbound_frame_size, size)
                h2.send_data(self.id, left[start:stop].tobytes(), end_stream=last and stop == size)
        except H2Error as error:
            raise PeerUnavailable(f"{self.connection.peer}: the stream is closed") from error
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
