"""The usual frames of gRPC, taken without the objects that h2 makes of each.

Most of what a peer sends is data on streams that are open, and blocks of headers that came before. Here
they are read straight off the bytes; windows and the states of streams are kept in h2 all the same, so
it can go on at any frame. Whatever is not plain - padding, continuations, settings, what would exceed a
window or a limit, streams that are not open - is left to it, and so is every error.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from h2.connection import AllowedStreamIDs, ConnectionState
from h2.events import RequestReceived, ResponseReceived, TrailersReceived
from h2.stream import StreamInputs, StreamState

from taskd.rpc.blocks import RememberingDecoder

if TYPE_CHECKING:
    from taskd.rpc.connection import Channel, Processor

FRAME_HEAD = struct.Struct(">HBBBI")  # the length has three bytes
DATA, HEADERS = 0, 1
END_STREAM, END_HEADERS = 1, 4
STREAM_ID = 0x7FFF_FFFF
RECEIVING = (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL)
MANY_STREAMS = 64  # h2 forgets closed ones when it counts them, and the least limit on open ones is 100


def frame_head(size: int, kind: int, flags: int, stream_id: int) -> bytes:
    return FRAME_HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id)


class Shortcut:
    """Of one connection. `decoder` is the one that its h2 uses."""

    def __init__(self, channel: Channel, processor: Processor, decoder: RememberingDecoder) -> None:
        self._channel = channel
        self._processor = processor
        self._decoder = decoder
        self._h2 = h2 = channel.h2
        self._buffer = h2.incoming_buffer
        self._is_client = h2.config.client_side
        self._open = ConnectionState.CLIENT_OPEN if self._is_client else ConnectionState.SERVER_OPEN

    def take(self, data: bytes) -> bytes:
        """Take the usual frames at the head of what was read. Returns the rest, which is for h2."""
        if self._h2.state_machine.state is not self._open or self._buffer._headers_buffer:
            return data
        if self._buffer._data:
            joined = self._joined(data)
            if joined is None:
                return data
            data = joined
        at, end = 0, len(data)
        while end - at >= FRAME_HEAD.size:
            high, low, kind, flags, stream_id = FRAME_HEAD.unpack_from(data, at)
            stream_id &= STREAM_ID  # the first bit is reserved, and ignored
            body = at + FRAME_HEAD.size
            stop = body + (high << 8 | low)
            if stop > end:
                break
            if kind == DATA:
                taken = self._take_data(stream_id, flags, data[body:stop])
            elif kind == HEADERS:
                taken = self._take_headers(stream_id, flags, data[body:stop])
            else:
                break
            if not taken:
                break
            at = stop
        return data[at:] if at else data

    def _joined(self, data: bytes) -> bytes | None:
        """With the part of a frame that h2 kept; None while that frame still is not complete, as a peer
        that sends it drop by drop must not have it copied each time."""
        kept = self._buffer._data
        if len(kept) < FRAME_HEAD.size:
            return None
        size = FRAME_HEAD.size + int.from_bytes(kept[:3], "big")
        if size > len(kept) + len(data):
            return None
        joined = bytes(kept) + data
        kept.clear()
        return joined

    def _take_data(self, stream_id: int, flags: int, body: bytes) -> bool:
        stream = self._h2.streams.get(stream_id)
        exchange = self._processor.streams.get(stream_id)
        if stream is None or exchange is None or flags & ~END_STREAM:
            return False
        machine, size = stream.state_machine, len(body)
        window = stream._inbound_window_manager
        windows = self._h2._inbound_flow_control_window_manager
        if (
            machine.state not in RECEIVING
            or not machine.headers_received
            or stream._expected_content_length is not None
            or size > window.current_window_size
            or size > windows.current_window_size
            or size > self._h2.max_inbound_frame_size
            or not (size or flags)  # empty ones are counted
        ):
            return False
        windows.window_consumed(size)
        window.window_consumed(size)
        if flags:
            machine.process_input(StreamInputs.RECV_END_STREAM)
        if size:
            exchange.buffer.add(body, size)
        if flags:
            exchange.__ended__()
        return True

    def _take_headers(self, stream_id: int, flags: int, block: bytes) -> bool:
        if flags & ~END_STREAM != END_HEADERS:
            return False
        known = self._decoder.known(block)
        if known is None or not known.is_usual:
            return False
        h2, ends = self._h2, flags & END_STREAM
        stream = h2.streams.get(stream_id)
        if self._is_client:
            if (
                stream is None
                or stream.state_machine.state not in RECEIVING
                or stream.state_machine.trailers_received
                or (stream.state_machine.headers_received and not ends)
            ):
                return False
        elif stream is not None or not self._may_open(stream_id):
            return False
        else:
            stream = h2._begin_new_stream(stream_id, AllowedStreamIDs.ODD)
        (event,) = stream.state_machine.process_input(StreamInputs.RECV_HEADERS)
        assert isinstance(event, RequestReceived | ResponseReceived | TrailersReceived)
        event.headers = known.text  # type: ignore[assignment]  # decoded, as h2 was told to do it
        if ends:
            stream.state_machine.process_input(StreamInputs.RECV_END_STREAM)
        self._processor.process(event)
        if ends and (exchange := self._processor.streams.get(stream_id)) is not None:
            exchange.__ended__()
        return True

    def _may_open(self, stream_id: int) -> bool:
        h2 = self._h2
        if (
            len(h2.streams) >= MANY_STREAMS
            and h2.open_inbound_streams >= h2.local_settings.max_concurrent_streams
        ):
            return False
        return stream_id > h2.highest_inbound_stream_id and bool(stream_id & 1)
