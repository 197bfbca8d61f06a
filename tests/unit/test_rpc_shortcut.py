"""The short way of reading frames against h2 alone: whatever comes, and however it is cut, both agree."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from typing import Any

import hpack
import pytest
from h2.errors import ErrorCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from taskd.rpc import blocks, connection
from taskd.rpc.blocks import RememberingDecoder, RememberingEncoder, literal
from taskd.rpc.connection import Protocol, configuration
from taskd.rpc.exchange import Exchange
from taskd.rpc.limits import FRAME_S, Keepalive
from taskd.rpc.shortcut import DATA, END_HEADERS, END_STREAM, HEADERS

PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION, UNKNOWN = 2, 3, 4, 6, 8, 9, 77
PADDED = 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LITTLE_WINDOW = 40  # bytes
STREAMS = 8


def frame(kind: int, body: bytes = b"", *, stream: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0


class Handler:
    """Keeps the calls."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[Exchange, Any]] = {}

    def accept(self, stream: Any, headers: Any, release_stream: Callable[[], None]) -> None:
        stream.release = release_stream
        self.calls[stream.id] = (stream, [tuple(header) for header in headers])

    def cancel(self, stream: Any) -> None:
        pass

    def close(self) -> None:
        pass


class Glitches:
    def __init__(self) -> None:
        self.spent = 0

    def spend(self, now_s: float) -> bool:
        self.spent += 1
        return True


class End:
    """A server's end of a connection that reads `data`; `short`: by the short way where it can."""

    def __init__(self, *, short: bool, client: bool = False) -> None:
        self.transport, self.handler = Transport(), Handler()
        config = configuration(Keepalive())
        self.protocol = Protocol(
            self.handler,  # type: ignore[arg-type]  # duck-typed
            config.__for_client__() if client else config.__for_server__(),
            client_side=client,
            max_message_bytes=100,
        )
        self.client_calls: dict[int, Exchange] = {}
        self.protocol.connection_made(self.transport)
        self.protocol._glitches = self.glitches = Glitches()  # type: ignore[assignment]  # duck-typed
        if not short:
            self.protocol._shortcut.take = lambda data: data  # type: ignore[method-assign]
        if not client:
            self.read(PREFACE + frame(SETTINGS))
        # So that it can be exceeded by what a test sends.
        self.protocol.connection.h2._inbound_flow_control_window_manager.current_window_size = LITTLE_WINDOW

    def read(self, data: bytes) -> None:
        if not self.transport.closed:
            self.protocol.data_received(data)

    def answer(self, stream: int) -> None:
        if stream in self.handler.calls and not self.transport.closed:
            exchange, _ = self.handler.calls[stream]
            if exchange.gone is None and exchange.closable:
                exchange.reply("application/grpc", b"answer")
                exchange.give_up(ErrorCodes.NO_ERROR, "over")

    def call(self) -> None:
        """As a client."""
        channel = self.protocol.connection
        stream = channel.begin_stream(((":method", "POST"), (":path", "/a.B/c")), b"")
        self.client_calls[stream] = exchange = channel.create_stream(stream_id=stream)
        exchange.release = self.protocol.processor.register(exchange)
        exchange.ask(b"question")

    def close(self) -> None:
        self.protocol.connection._connection.close_connection()
        self.protocol.processor.close()

    @property
    def state(self) -> dict[str, Any]:
        h2 = self.protocol.connection.h2
        return {
            "calls": {id_: headers for id_, (_, headers) in self.handler.calls.items()},
            "received": {id_: self.received(exchange) for id_, (exchange, _) in self.handler.calls.items()},
            "answers": {
                id_: (self.received(exchange), _texts(exchange.headers), _texts(exchange.trailers))
                for id_, exchange in self.client_calls.items()
            },
            "window": h2._inbound_flow_control_window_manager.current_window_size,
            "windows": {id_: h2.streams[id_].inbound_flow_control_window for id_ in self.open},
            "open": {id_: h2.streams[id_].state_machine.state for id_ in self.open},
            "written": bytes(self.transport.written),
            "glitches": self.glitches.spent,
            "closed": self.transport.closed,
        }

    @property
    def open(self) -> list[int]:  # which closed ones it remembers is h2's own affair
        return [id_ for id_, stream in self.protocol.connection.h2.streams.items() if not stream.closed]

    def received(self, exchange: Exchange) -> Any:
        inbox = exchange.buffer
        return list(inbox._messages), bytes(inbox._partial), inbox.ended, str(inbox.fault), exchange.gone


def _texts(headers: Any) -> Any:
    return None if headers is None else [tuple(header) for header in headers]


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    """Connections look for a loop; none runs."""
    new = asyncio.SelectorEventLoop()
    asyncio._set_running_loop(new)
    yield
    asyncio._set_running_loop(None)
    new.close()


class Blocks:
    """Blocks of headers as an encoder makes them that remembers, or one that does not."""

    def __init__(self) -> None:
        self._encoder = hpack.Encoder()

    def make(self, kind: int) -> bytes:
        head = [(":method", "POST"), (":scheme", "http"), (":path", f"/a.B/{kind % 2}"), ("te", "trailers")]
        match kind:
            case 2:
                head.append(("content-length", "7"))
            case 3:
                head.append(("x-new", "x" * 5))
            case 4:
                self._encoder.header_table_size = 4096 if self._encoder.header_table_size != 4096 else 60
        return self._encoder.encode(head)


MESSAGE = b"\0\0\0\0\2ab"
STREAM = st.integers(0, STREAMS - 1).map(lambda number: 2 * number + 1)
FLAGS = st.sampled_from([0, END_STREAM])
STEP = st.one_of(
    st.tuples(st.just("open"), STREAM, st.integers(0, 4), FLAGS),
    st.tuples(st.just("open"), STREAM, st.just(0), FLAGS),
    st.tuples(st.just("data"), STREAM, st.sampled_from([MESSAGE, MESSAGE[:3], MESSAGE * 4, b""]), FLAGS),
    st.tuples(st.just("data"), STREAM, st.just(MESSAGE), FLAGS),
    st.tuples(st.just("padded"), STREAM, st.just(MESSAGE), FLAGS),
    st.tuples(st.just("continued"), STREAM, st.just(0), FLAGS),
    st.tuples(st.just("priority"), STREAM, st.just(0), FLAGS),
    st.tuples(st.just("reset"), STREAM),
    st.tuples(st.just("other"), st.sampled_from([PING, SETTINGS, WINDOW_UPDATE, UNKNOWN])),
    st.tuples(st.just("answer"), STREAM),
)


def written(step: Any, blocks: Blocks) -> list[bytes]:
    match step:
        case ("open", stream, kind, flags):
            return [frame(HEADERS, blocks.make(kind), stream=stream, flags=END_HEADERS | flags)]
        case ("data", stream, body, flags):
            return [frame(DATA, body, stream=stream, flags=flags)]
        case ("padded", stream, body, flags):
            return [frame(DATA, b"\2" + body + b"\0\0", stream=stream, flags=flags | PADDED)]
        case ("continued", stream, kind, flags):
            block = blocks.make(kind)
            first = frame(HEADERS, block[:2], stream=stream, flags=flags)
            return [first, frame(CONTINUATION, block[2:], stream=stream, flags=END_HEADERS)]
        case ("priority", stream, kind, flags):
            body = struct.pack(">IB", 0, 7) + blocks.make(kind)
            return [frame(HEADERS, body, stream=stream, flags=END_HEADERS | flags | 0x20)]
        case ("reset", stream):
            return [frame(RST_STREAM, struct.pack(">I", 8), stream=stream)]
        case ("other", kind):
            body = {PING: b"12345678", WINDOW_UPDATE: struct.pack(">I", 5)}.get(kind, b"")
            return [frame(kind, body)]
    return []


@settings(max_examples=400, deadline=None)
@given(
    kinds=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    steps=st.lists(STEP, max_size=25),
    cuts=st.lists(st.integers(1, 60), min_size=1),
)
def test_cut_anywhere_it_is_what_h2_alone_makes_of_each_frame(
    kinds: list[int], steps: list[Any], cuts: list[int]
) -> None:
    alone, short, blocks = End(short=False), End(short=True), Blocks()
    held, number = b"", 0
    for step in [("open", 2 * number + 1, kind, 0) for number, kind in enumerate(kinds * 3)] + steps:
        for each in written(step, blocks):
            alone.read(each)
            held += each
        while held and (step[0] == "answer" or len(held) > cuts[number % len(cuts)]):
            size = cuts[number % len(cuts)]
            short.read(held[:size])
            held = held[size:]
            number += 1
        if step[0] == "answer":
            alone.answer(step[1])
            short.answer(step[1])
    short.read(held)
    expected, found = alone.state, short.state
    assert found["closed"] == expected["closed"]
    if expected["closed"]:  # where one read held more than the frame that was wrong, less was done before
        assert expected["calls"].items() >= found["calls"].items()
        assert found["written"][-4:] == expected["written"][-4:]  # the reason in the GOAWAY
    else:
        assert found == expected
        alone.close()
        short.close()


ANSWER = st.one_of(
    st.tuples(st.just("head"), STREAM, st.integers(0, 3), FLAGS),
    st.tuples(st.just("head"), STREAM, st.just(0), st.just(0)),
    st.tuples(st.just("head"), STREAM, st.just(4), st.just(END_STREAM)),
    st.tuples(st.just("data"), STREAM, st.sampled_from([MESSAGE, MESSAGE[:3], MESSAGE * 4, b""]), FLAGS),
    st.tuples(st.just("reset"), STREAM),
)
HEADS: list[list[tuple[str, str]]] = [
    [(":status", "200"), ("content-type", "application/grpc")],
    [(":status", "103"), ("link", "x")],
    [(":status", "200"), ("content-length", "7")],
    [(":status", "502")],
    [("grpc-status", "0")],
]


@settings(max_examples=400, deadline=None)
@given(
    firsts=st.lists(st.integers(0, 4), max_size=2),
    steps=st.lists(ANSWER, max_size=25),
    cuts=st.lists(st.integers(1, 60), min_size=1),
)
def test_a_client_reads_what_h2_alone_reads(firsts: list[int], steps: list[Any], cuts: list[int]) -> None:
    alone, short, encoder = End(short=False, client=True), End(short=True, client=True), hpack.Encoder()
    said = [frame(SETTINGS)]
    for end in (alone, short):
        for _ in range(STREAMS):
            end.call()
    for step in [("head", 2 * n + 1, kind, 0) for n, kind in enumerate(firsts * 3)] + steps:
        match step:
            case ("head", stream, kind, flags):
                said.append(
                    frame(HEADERS, encoder.encode(HEADS[kind]), stream=stream, flags=END_HEADERS | flags)
                )
            case _:
                said += written(step, Blocks())
    for each in said:
        alone.read(each)
    whole, number = b"".join(said), 0
    while whole:
        size = cuts[number % len(cuts)]
        short.read(whole[:size])
        whole, number = whole[size:], number + 1
    expected, found = alone.state, short.state
    assert found["closed"] == expected["closed"]
    if not expected["closed"]:
        assert found == expected
        alone.close()
        short.close()


def test_a_call_like_the_one_before_takes_the_short_way() -> None:
    end, blocks = End(short=True), Blocks()
    for stream in (1, 3):
        end.read(frame(HEADERS, blocks.make(0), stream=stream, flags=END_HEADERS))
    end.protocol.connection.feed = lambda data: pytest.fail("h2 was asked")  # type: ignore[method-assign]
    end.read(frame(HEADERS, blocks.make(0), stream=5, flags=END_HEADERS))
    end.read(frame(DATA, MESSAGE, stream=5, flags=END_STREAM))
    exchange, headers = end.handler.calls[5]
    assert headers == end.handler.calls[1][1]
    assert exchange.buffer.take() == b"ab"
    assert exchange.buffer.finished
    end.close()


@pytest.mark.parametrize(
    ("kind", "bodies", "code"),
    [
        (0, [b"x" * LITTLE_WINDOW, b"x"], ErrorCodes.FLOW_CONTROL_ERROR),
        (2, [b"longer than it said"], ErrorCodes.PROTOCOL_ERROR),
    ],
)
def test_what_is_against_the_rules_is_left_to_h2(kind: int, bodies: list[bytes], code: ErrorCodes) -> None:
    end, blocks = End(short=True), Blocks()
    for stream in (1, 3, 5):
        end.read(frame(HEADERS, blocks.make(kind), stream=stream, flags=END_HEADERS))
    end.read(b"".join(frame(DATA, body, stream=5) for body in bodies))
    assert end.transport.closed
    assert end.transport.written.endswith(struct.pack(">I", code))


def test_the_reserved_bit_of_a_stream_s_number_means_nothing() -> None:
    end, blocks = End(short=True), Blocks()
    for stream in (1, 3, 5, 7 | 1 << 31):
        end.read(frame(HEADERS, blocks.make(0), stream=stream, flags=END_HEADERS))
    end.read(frame(DATA, MESSAGE, stream=7 | 1 << 31, flags=END_STREAM))
    assert list(end.handler.calls) == [1, 3, 5, 7]
    assert end.handler.calls[7][0].buffer.take() == b"ab"
    end.close()


@pytest.mark.parametrize("short", [True, False])
def test_a_frame_has_its_time_from_when_it_was_begun(short: bool) -> None:
    end, now_s = End(short=short), 0.0
    end.protocol._now_s = lambda: now_s  # type: ignore[method-assign]
    ping = frame(PING, b"12345678")
    end.read(ping)
    now_s = 10 * FRAME_S  # nothing was to be said meanwhile
    end.read(ping[:9])
    now_s += FRAME_S / 2
    end.protocol.check()
    assert not end.transport.closed
    end.read(ping[9:10])
    now_s += FRAME_S
    end.protocol.check()
    assert end.transport.closed


def test_empty_data_is_counted() -> None:
    end, blocks = End(short=True), Blocks()
    for stream in (1, 3, 5):
        end.read(frame(HEADERS, blocks.make(0), stream=stream, flags=END_HEADERS))
    spent = end.glitches.spent
    end.read(frame(DATA, b"", stream=5) * 3)
    assert end.glitches.spent == spent + 3
    end.close()


def test_more_streams_than_are_allowed_are_left_to_h2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.SETTINGS, connection.SettingCodes.MAX_CONCURRENT_STREAMS, 70)
    end, blocks = End(short=True), Blocks()
    end.protocol.connection.h2.local_settings.acknowledge()
    for number in range(70):
        end.read(frame(HEADERS, blocks.make(0), stream=2 * number + 1, flags=END_HEADERS))
    assert not end.transport.closed
    end.answer(1)
    end.read(frame(RST_STREAM, struct.pack(">I", 8), stream=3))
    end.read(frame(HEADERS, blocks.make(0), stream=141, flags=END_HEADERS))
    assert len(end.handler.calls) == 71
    end.read(frame(HEADERS, blocks.make(0), stream=143, flags=END_HEADERS))
    end.read(frame(HEADERS, blocks.make(0), stream=145, flags=END_HEADERS))
    assert end.transport.closed


def test_calls_that_ended_are_not_kept() -> None:
    end, blocks = End(short=True), Blocks()
    for number in range(1_000):
        stream = 2 * number + 1
        end.read(frame(HEADERS, blocks.make(0), stream=stream, flags=END_HEADERS | END_STREAM))
        end.answer(stream)
        end.handler.calls[stream][0].release()
    assert len(end.protocol.connection.h2.streams) <= 64
    assert not end.protocol.processor.streams
    end.close()


# ---- blocks


def decoded(decoder: RememberingDecoder, block: bytes) -> list[tuple[bytes, bytes]]:
    known = decoder.known(block)
    if known is not None:
        return [(name.encode(), value.encode()) for name, value in known.text]
    return [tuple(header) for header in decoder.decode(block, raw=True)]  # type: ignore[misc]


HEADER = st.tuples(st.sampled_from([b"a", b"b", b":path", b"te"]), st.sampled_from([b"1", b"2", b"x" * 20]))


@given(
    lists=st.lists(st.lists(HEADER, max_size=4), max_size=40),
    sizes=st.dictionaries(st.integers(0, 40), st.sampled_from([0, 40, 64, 100, 4096])),
)
def test_what_is_known_again_is_what_would_be_decoded(
    lists: list[list[tuple[bytes, bytes]]], sizes: dict[int, int]
) -> None:
    encoder, remembering, plain = hpack.Encoder(), RememberingDecoder(), hpack.Decoder()
    for number, headers in enumerate(lists):
        if number in sizes:
            encoder.header_table_size = sizes[number]
        block = encoder.encode(headers)
        assert decoded(remembering, block) == [tuple(header) for header in plain.decode(block, raw=True)]
        assert list(remembering.header_table.dynamic_entries) == list(plain.header_table.dynamic_entries)
        assert remembering.header_table.maxsize == plain.header_table.maxsize


def test_only_a_few_small_blocks_are_kept() -> None:
    decoder, encoder = RememberingDecoder(), hpack.Encoder()
    encoder.header_table_size = 0
    for number in range(10 * blocks.BLOCKS_KEPT):
        decoder.decode(encoder.encode([(f"name-{number}", "value")]), raw=True)
    assert len(decoder._blocks) <= blocks.BLOCKS_KEPT
    large = encoder.encode([("name", "-" * 1_000)])
    decoder.decode(large, raw=True)
    assert decoder.known(large) is None


@given(
    lists=st.lists(st.lists(HEADER, max_size=4), max_size=40),
    sizes=st.dictionaries(st.integers(0, 40), st.sampled_from([0, 40, 64, 100, 4096])),
)
def test_what_is_made_again_is_read_as_what_it_was_made_of(
    lists: list[list[tuple[bytes, bytes]]], sizes: dict[int, int]
) -> None:
    encoder, decoder = RememberingEncoder(), hpack.Decoder()
    for number, headers in enumerate(lists):
        if number in sizes:
            encoder.header_table_size = sizes[number]
        texts = tuple((name.decode(), value.decode()) for name, value in headers)
        make = encoder.encode if number % 7 == 3 else encoder.block
        block = make(texts) + literal("only-once", str(number))  # type: ignore[operator]  # both take headers
        assert tuple(map(tuple, decoder.decode(block))) == (*texts, ("only-once", str(number)))
        assert decoder.header_table.dynamic_entries == encoder.header_table.dynamic_entries


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 300, 20_000])
def test_a_header_of_any_length_is_spelled_out(size: int) -> None:
    name, value = "n" * (size or 1), "v" * size
    assert list(map(tuple, hpack.Decoder().decode(literal(name, value)))) == [(name, value)]


def test_a_client_that_made_many_calls_keeps_none() -> None:
    end = End(short=True, client=True)
    end.read(frame(SETTINGS))
    answer = hpack.Encoder().encode([(":status", "200"), ("grpc-status", "0")])
    for number in range(1_000):
        stream = 2 * number + 1
        end.call()
        end.read(frame(HEADERS, answer, stream=stream, flags=END_HEADERS | END_STREAM))
        end.client_calls.pop(stream).release()
    assert len(end.protocol.connection.h2.streams) <= 64
    end.close()
