"""HTTP/2 streams used straight from Trio, on connections that grpclib keeps.

grpclib's own streams are awaited by asyncio tasks, and each step across the border costs more than
the work itself. Here the bytes are split into messages in the transport's callback, which wakes the
waiting Trio task, and a Trio task writes to the transport directly: trio-asyncio runs both in one
thread, so no task and no queue lies between. grpclib keeps the connection: settings, windows,
pings, and which event belongs to which stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import structlog
import trio
from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler, Connection, EventsProcessor, H2Protocol
from grpclib.protocol import Stream as GrpclibStream
from grpclib.utils import Wrapper
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event as H2Event
from h2.events import RemoteSettingsChanged
from h2.exceptions import H2Error
from h2.settings import SettingCodes
from trio.lowlevel import ParkingLot

from taskd.errors import PeerUnavailable
from taskd.rpc.inbox import PREFIX, Inbox

log = structlog.get_logger("taskd.rpc")

STREAM_WINDOW_BYTES = 4 * 1024 * 1024
# Larger than a stream's, so that one stream nobody reads does not stop the others.
CONNECTION_WINDOW_BYTES = 16 * 1024 * 1024
FRAME_BYTES = 256 * 1024  # HTTP/2 begins with 16 KiB, and each frame costs as much as a small message
GOODBYE_S = 1.0  # for what is still in the transport's buffer when a connection is closed

Headers = list[tuple[str, str]]


def configuration(*, keepalive_time_s: float, without_calls: bool) -> Configuration:
    """Pings find a peer whose machine or network is gone: every `keepalive_time_s`, 20 s to answer."""
    return Configuration(
        _keepalive_time=keepalive_time_s,
        _keepalive_timeout=20.0,
        _keepalive_permit_without_calls=without_calls,
        _http2_max_pings_without_data=0,
        _http2_min_sent_ping_interval_without_data=keepalive_time_s / 2,
        http2_connection_window_size=CONNECTION_WINDOW_BYTES,
        http2_stream_window_size=STREAM_WINDOW_BYTES,
    )


class Signal(asyncio.Event):
    """An event that grpclib sets and Trio tasks wait for."""

    def __init__(self, lot: ParkingLot) -> None:
        super().__init__()
        self.lot = lot

    def set(self) -> None:
        super().set()
        self.lot.unpark_all()


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
        self.buffer = Inbox(self.connection.max_message_bytes, partial(self.connection.ack, stream_id))

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


class Channel(Connection):
    """One HTTP/2 connection."""

    def __init__(
        self, h2: H2Connection, transport: asyncio.Transport, config: Configuration, max_message_bytes: int
    ):
        super().__init__(h2, transport, config=config)
        self.h2 = h2
        self.transport = transport
        self.max_message_bytes = max_message_bytes
        self.stream_closed = ParkingLot()
        self.stream_close_waiter = Signal(self.stream_closed)
        self.ready = trio.Event()  # the peer's settings came, or never will
        address = transport.get_extra_info("peername")
        self.peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "peer"

    def create_stream(self, *, stream_id: int | None = None, wrapper: Wrapper | None = None) -> Exchange:
        assert stream_id is not None
        return Exchange(self, stream_id)

    def ack(self, stream_id: int, size: int) -> None:
        if not self.is_closing():
            super().ack(stream_id, size)

    def flush(self) -> None:
        if not self.is_closing():
            super().flush()


class _Processor(EventsProcessor):
    """Gives each event to its stream. Events grpclib does not know are ignored, as HTTP/2 asks."""

    connection: Channel

    def process(self, event: H2Event) -> None:
        processors = getattr(self, "processors", {})  # grpclib deletes them on close
        process = processors.get(type(event))
        if process is not None:
            process(event)

    def process_remote_settings_changed(self, event: RemoteSettingsChanged) -> None:
        super().process_remote_settings_changed(event)
        self.connection.ready.set()

    def close(self, reason: str = "the connection was closed") -> None:
        super().close(reason)
        self.connection.stream_closed.unpark_all()
        self.connection.ready.set()


class Protocol(H2Protocol):
    """What asyncio's transport calls. An error here costs this connection and nothing else."""

    connection: Channel
    processor: _Processor

    def __init__(
        self, handler: AbstractHandler, config: Configuration, *, client_side: bool, max_message_bytes: int
    ) -> None:
        # latin-1 decodes any byte: a strange header is its call's problem, not the connection's.
        h2_config = H2Configuration(
            client_side=client_side,
            header_encoding="latin-1",
            validate_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_inbound_headers=False,
            normalize_outbound_headers=False,
        )
        super().__init__(handler, config, h2_config)
        self._max_message_bytes = max_message_bytes
        self.lost = trio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        h2 = H2Connection(config=self.h2_config)
        h2.initiate_connection()
        h2.increment_flow_control_window(
            self.config.http2_connection_window_size - h2.local_settings.initial_window_size
        )
        h2.update_settings(
            {
                SettingCodes.INITIAL_WINDOW_SIZE: self.config.http2_stream_window_size,
                SettingCodes.MAX_FRAME_SIZE: FRAME_BYTES,
            }
        )
        self.connection = Channel(h2, transport, self.config, self._max_message_bytes)
        self.connection.flush()
        self.connection.initialize()
        self.processor = _Processor(self.handler, self.connection)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception as error:
            log.warning("connection closed: bad HTTP/2", peer=self.connection.peer, error=repr(error))
            self.processor.close("bad HTTP/2")

    def resume_writing(self) -> None:
        super().resume_writing()
        for stream in self.processor.streams.values():
            stream.window_updated.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.lost.set()

    async def say_goodbye(self, reason: str) -> None:
        """Send GOAWAY and close; what is not taken within `GOODBYE_S` is dropped. Call it shielded."""
        if not self.connection.is_closing():
            self.connection.h2.close_connection()
            self.connection.flush()
            self.processor.close(reason)
        with trio.move_on_after(GOODBYE_S):
            await self.lost.wait()
            return
        self.connection.transport.abort()
        await self.lost.wait()
