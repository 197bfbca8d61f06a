"""HTTP/2 connections: grpclib keeps them, and gives each stream's events to its exchange.

Below are the connection's sizes and habits, and what makes a misbehaving peer cost no more than its
own connection.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import structlog
import trio
from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler, Connection, EventsProcessor, H2Protocol
from grpclib.utils import Wrapper
from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, ConnectionInputs, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    StreamReset,
    UnknownFrameReceived,
)
from h2.events import Event as H2Event
from h2.exceptions import FrameTooLargeError, TooManyStreamsError
from h2.settings import SettingCodes, Settings
from h2.stream import StreamInputs
from trio.lowlevel import ParkingLot

from taskd.rpc.blocks import RememberingDecoder, RememberingEncoder
from taskd.rpc.exchange import Exchange, Signal
from taskd.rpc.limits import FRAME_S, HELLO_S, MAX_UNSENT_BYTES, Budget, Glitches, Keepalive
from taskd.rpc.shortcut import END_HEADERS, HEADERS, MANY_STREAMS, Shortcut, frame_head

log = structlog.get_logger("taskd.rpc")

STREAM_WINDOW_BYTES = 4 * 1024 * 1024
# Larger than a stream's, so that one stream nobody reads does not stop the others.
CONNECTION_WINDOW_BYTES = 16 * 1024 * 1024
FRAME_BYTES = 256 * 1024  # HTTP/2 begins with 16 KiB, and each frame costs as much as a small message
MAX_HEADER_BYTES = 64 * 1024  # of one block
INITIAL_WINDOW_BYTES = 65_535  # of a connection, by RFC 9113
SETTINGS = {
    SettingCodes.ENABLE_PUSH: 0,
    SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
    SettingCodes.MAX_FRAME_SIZE: FRAME_BYTES,
    SettingCodes.MAX_CONCURRENT_STREAMS: 100,
    SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
}
GLITCHES = (PingReceived, RemoteSettingsChanged, PriorityUpdated, UnknownFrameReceived)
READ_BYTES = 256 * 1024
GOODBYE_S = 1.0  # for what is still in the transport's buffer when a connection is closed


def configuration(keepalive: Keepalive) -> Configuration:
    """Pings find a peer whose machine or network is gone."""
    return Configuration(
        _keepalive_time=keepalive.time_s,
        _keepalive_timeout=keepalive.timeout_s,
        _keepalive_permit_without_calls=keepalive.without_calls,
        _http2_max_pings_without_data=0,
        _http2_min_sent_ping_interval_without_data=keepalive.time_s / 2,
        http2_connection_window_size=CONNECTION_WINDOW_BYTES,
        http2_stream_window_size=STREAM_WINDOW_BYTES,
    )


class Flusher:
    """Flushes the connections of a server once in each turn of the loop. Run it with `run`."""

    def __init__(self) -> None:
        self._dirty: set[Channel] = set()
        self._lot = ParkingLot()

    def add(self, channel: Channel) -> None:
        self._dirty.add(channel)
        if self._lot:
            self._lot.unpark()

    async def run(self) -> None:
        while True:
            while not self._dirty:
                await self._lot.park()
            dirty, self._dirty = self._dirty, set()
            for channel in dirty:
                channel.flush()


class Channel(Connection):
    """One HTTP/2 connection."""

    encoder: RememberingEncoder  # that of `h2`

    def __init__(
        self,
        h2: H2Connection,
        transport: asyncio.Transport,
        config: Configuration,
        max_message_bytes: int,
        budget: Budget | None,
        flusher: Flusher | None,
    ):
        super().__init__(h2, transport, config=config)
        self._loop = asyncio.get_running_loop()
        self.h2 = h2
        self.transport = transport
        self.max_message_bytes = max_message_bytes
        self.budget = budget
        self._flusher = flusher
        self.calls = 0  # that a server works on
        self.stream_closed = ParkingLot()
        self.stream_close_waiter = Signal(self.stream_closed, wakes=1)
        self.ready = trio.Event()  # the peer's settings came, or never will
        address = transport.get_extra_info("peername")
        self.peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "peer"

    def create_stream(self, *, stream_id: int | None = None, wrapper: Wrapper | None = None) -> Exchange:
        assert stream_id is not None
        return Exchange(self, stream_id)

    def begin_stream(self, headers: tuple[tuple[str, str], ...], last: bytes) -> int:
        """Begin a call; its id. Its head goes out with the next flush.

        `headers`: those that come again and again; `last`: more of the block, encoded already.
        Raises TooManyStreamsError when the peer takes no more now, H2Error when it will take none again.
        """
        h2 = self.h2
        stream_id = h2.get_next_available_stream_id()
        most = h2.remote_settings.max_concurrent_streams
        if len(h2.streams) >= min(most, MANY_STREAMS) and h2.open_outbound_streams >= most:
            raise TooManyStreamsError(f"{most} calls are open, and the peer takes no more")
        h2.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
        stream = h2._begin_new_stream(stream_id, AllowedStreamIDs.ODD)
        stream.state_machine.process_input(StreamInputs.SEND_HEADERS)
        block = self.encoder.block(headers) + last
        assert len(block) <= h2.max_outbound_frame_size  # 16 KiB at least; paths and addresses are short
        h2._data_to_send += frame_head(len(block), HEADERS, END_HEADERS, stream_id) + block
        return stream_id

    def ack(self, stream_id: int, size: int) -> None:
        if size and not self.is_closing():
            self.h2.acknowledge_received_data(size, stream_id)
            if self.h2._data_to_send:  # rarely: windows are opened again when half of them is used
                self.flush_soon()

    def flush(self) -> None:
        if not self.is_closing():
            super().flush()

    def flush_soon(self) -> None:
        """Flush together with what others write until then: each write to a socket costs as much as a
        third of a small call."""
        if self._flusher is None or self.calls <= 1:
            self.flush()
        else:
            self._flusher.add(self)

    def close(self) -> None:
        """Close once what is written was sent, or after `GOODBYE_S`: a peer that is gone takes nothing."""
        if not self.is_closing():
            self.close_within_goodbye()
        super().close()

    def close_within_goodbye(self) -> None:
        """Whoever closes the transport: it does not take longer."""
        self.flush()
        self._loop.call_later(GOODBYE_S, self.transport.abort)


class Processor(EventsProcessor):
    """Gives each event to its stream. Events grpclib does not know are ignored, as HTTP/2 asks."""

    connection: Channel
    streams: dict[int, Exchange]  # type: ignore[assignment]  # no others are made here

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
    processor: Processor

    def __init__(
        self,
        handler: AbstractHandler,
        config: Configuration,
        *,
        client_side: bool,
        max_message_bytes: int,
        budget: Budget | None = None,
        flusher: Flusher | None = None,
        on_lost: Callable[[Protocol], None] = lambda protocol: None,
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
        self._budget = budget
        self._flusher = flusher
        self._on_lost = on_lost
        self.lost = trio.Event()
        self._unwanted = False
        self._reading_fd: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        h2 = H2Connection(config=self.h2_config)
        h2.local_settings = Settings(client=self.h2_config.client_side, initial_values=SETTINGS)
        # At once, not when the peer confirms: its confirmation and a large frame may come in one read.
        h2.max_inbound_frame_size = FRAME_BYTES
        h2.encoder = encoder = RememberingEncoder()
        h2.decoder = decoder = RememberingDecoder()
        decoder.max_header_list_size = MAX_HEADER_BYTES
        h2.initiate_connection()
        h2.increment_flow_control_window(CONNECTION_WINDOW_BYTES - INITIAL_WINDOW_BYTES)
        self.connection = Channel(
            h2, transport, self.config, self._max_message_bytes, self._budget, self._flusher
        )
        self.connection.encoder = encoder
        self._frames = h2.incoming_buffer
        self._began_s = self._last_frame_s = self._now_s()
        self._glitches = Glitches(self._began_s)
        self.connection.flush()
        self.connection.initialize()
        self.processor = Processor(self.handler, self.connection)
        self._shortcut = Shortcut(self.connection, self.processor, decoder)
        if self._unwanted:
            self.processor.close("the server is stopping")

    async def read(self) -> None:
        """Read for the transport until the connection is over, which spares trio-asyncio's two turns of
        the loop after each read. Not for TLS, whose bytes the transport has to see first."""
        transport = self.connection.transport
        if transport.is_closing():
            return
        transport.pause_reading()
        self._reading_fd = fd = transport.get_extra_info("socket").fileno()
        while not transport.is_closing():
            try:
                await trio.lowlevel.wait_readable(fd)
                if transport.is_closing():
                    break
                data = os.read(fd, READ_BYTES)
            except trio.BusyResourceError:
                await trio.lowlevel.checkpoint()  # until trio-asyncio's reader has let go
            except BlockingIOError:
                pass
            except (OSError, trio.ClosedResourceError):
                transport.abort()
                break
            else:
                if not data:
                    self.eof_received()
                    transport.close()
                    break
                self.data_received(data)

    def data_received(self, data: bytes) -> None:
        try:
            rest = self._shortcut.take(data)
            if rest is not data:
                self._last_frame_s = self._now_s()
                if not rest:
                    return
            was_unfinished = self._unfinished
            events = self.connection.feed(rest)
            self._check_frame_size()
            self.connection.flush()
            if events or not (was_unfinished and self._unfinished):
                self._last_frame_s = self._now_s()  # or when the next was begun
            for event in events:
                if self._is_glitch(event) and not self._glitches.spend(self._last_frame_s):
                    self._hang_up("too many resets, pings or empty frames", ErrorCodes.ENHANCE_YOUR_CALM)
                    return
                self.processor.process(event)
        except Exception as error:
            log.warning("connection closed: bad HTTP/2", peer=self.connection.peer, error=repr(error)[:500])
            self.connection.flush()  # what h2 has to say about it
            self.processor.close("bad HTTP/2")
        self.connection.flush()

    def _check_frame_size(self) -> None:
        # h2 does so too, but only after the whole frame, of up to 16 MiB, has come.
        head = self._frames._data[:3]
        if len(head) == 3 and (length := int.from_bytes(head, "big")) > FRAME_BYTES:
            raise FrameTooLargeError(f"a frame of {length} bytes, {FRAME_BYTES} at most were announced")

    @property
    def _unfinished(self) -> bool:
        """A frame, or a block of headers, was begun and is not complete."""
        return bool(self._frames._data or self._frames._headers_buffer)

    def _is_glitch(self, event: H2Event) -> bool:
        if isinstance(event, DataReceived):
            return not event.data and event.stream_ended is None
        if isinstance(event, StreamReset):  # for one that is over, it answers what was still on its way
            return event.stream_id in self.processor.streams
        return isinstance(event, GLITCHES)

    def check(self) -> None:
        """Hang up on a peer that let a deadline pass. Called every now and then."""
        if not hasattr(self, "connection") or self.connection.is_closing():
            return
        now_s = self._now_s()
        if not self.connection.ready.is_set() and now_s - self._began_s > HELLO_S:
            self._hang_up(f"no HTTP/2 settings within {HELLO_S:g} s", ErrorCodes.SETTINGS_TIMEOUT)
        elif self._unfinished and now_s - self._last_frame_s > FRAME_S:
            self._hang_up(f"a frame was not complete within {FRAME_S:g} s", ErrorCodes.ENHANCE_YOUR_CALM)
        elif self.connection.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._hang_up("it does not read", ErrorCodes.ENHANCE_YOUR_CALM)

    def _hang_up(self, why: str, code: ErrorCodes) -> None:
        log.warning("connection closed", peer=self.connection.peer, why=why)
        self.connection.h2.close_connection(code)
        self.connection.flush()
        self.processor.close(why)

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def resume_writing(self) -> None:
        super().resume_writing()
        for stream in self.processor.streams.values():
            stream.window_updated.set()

    def eof_received(self) -> None:
        """The peer sends nothing more; the transport is closed after this, once all is sent that is to be.

        Within `GOODBYE_S`: who does not read either would keep its connection, and what is unsent, for good.
        """
        self.connection.close_within_goodbye()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._reading_fd is not None:
            trio.lowlevel.notify_closing(self._reading_fd)  # the transport closes it right after this
        super().connection_lost(exc)
        self.lost.set()
        self._on_lost(self)

    async def say_goodbye(self, reason: str) -> None:
        """Send GOAWAY and close; what is not taken within `GOODBYE_S` is dropped. Call it shielded."""
        self._unwanted = True
        if not hasattr(self, "connection"):
            return  # not made yet: whoever makes it is cancelled, or it is closed as soon as it is there
        if not self.connection.is_closing():
            self.connection.h2.close_connection()
            self.connection.flush()
            self.processor.close(reason)
        with trio.move_on_after(2 * GOODBYE_S):
            await self.lost.wait()
