"""Peers that mean harm, or are broken: each costs its own connection, or only its call, and nobody else."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count

import hpack
import pytest
import trio
import trio.testing

from taskd import aio
from taskd.errors import PeerUnavailable, Refused
from taskd.rpc import connection, server
from taskd.rpc.answer import Limits
from taskd.rpc.base import Duplex, Reply, Services, Stream, Unary
from taskd.rpc.client import Client, connect
from taskd.rpc.limits import GLITCHES, Budget, Glitches, Keepalive
from taskd.rpc.server import serve

GENEROUS_S = 20.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0, 1, 2, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
END_STREAM, END_HEADERS = 1, 4
ENHANCE_YOUR_CALM = 11


def frame(kind: int, body: bytes = b"", *, stream: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


HELLO = PREFACE + frame(SETTINGS)


def head(path: str = "/test/Echo", *more: tuple[str, str]) -> bytes:
    """A block that needs no memory of earlier ones."""
    pairs = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
    pairs += [("te", "trailers"), ("content-type", "application/grpc"), *more]
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder.encode(pairs)


def request(stream: int, path: str = "/test/Stay", *, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, head(path), stream=stream, flags=flags)


async def echo(request: bytes) -> bytes:
    return request


async def hang(stream: Duplex) -> None:
    await stream.send(b"welcome")
    await trio.sleep_forever()


SERVICES: Services = {"/test/Echo": Unary(echo), "/test/Hang": Stream(hang)}


class Peer:
    """A stranger that speaks bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def send(self, data: bytes) -> None:
        with suppress(trio.BrokenResourceError):  # it was hung up on: that is told by `hung_up`
            await self._stream.send_all(data)

    async def hung_up(self) -> bytes:
        """Wait until the server closes; what it said until then."""
        said = b""
        with trio.fail_after(GENEROUS_S), suppress(trio.BrokenResourceError):
            async for data in self._stream:
                said += data
        return said

    async def says(self, what: bytes) -> None:
        """Wait until the server says this."""
        said = b""
        with trio.fail_after(GENEROUS_S):
            while what not in said:
                data = await self._stream.receive_some()
                assert data, "the server hung up"
                said += data


@asynccontextmanager
async def open_scene(services: Services = SERVICES, **options: object) -> AsyncIterator[tuple[int, Client]]:
    """A server, and an honest client, whose connection must outlast whatever the test does."""
    with trio.fail_after(2 * GENEROUS_S):
        async with (
            aio.open_loop(),
            serve({**SERVICES, **services}, "127.0.0.1", 0, **options) as port,  # type: ignore[arg-type]
            connect(f"127.0.0.1:{port}") as client,
            client.stream("/test/Hang") as stream,
        ):
            assert await stream.receive() == b"welcome"
            before = aio.unhandled_errors
            yield port, client
            assert await client.call("/test/Echo", b"after", timeout_s=GENEROUS_S) == b"after"
            with trio.move_on_after(0.01):
                assert await stream.receive() is None, "the honest stream was ended"
            assert aio.unhandled_errors == before


@asynccontextmanager
async def open_peer(port: int) -> AsyncIterator[Peer]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield Peer(stream)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HELLO_S", 0.05)
    monkeypatch.setattr(connection, "FRAME_S", 0.05)
    monkeypatch.setattr(server, "SWEEP_S", 0.02)


# ---- those that never finish

UNFINISHED = {
    "nothing": b"",
    "half a preface": PREFACE[:10],
    "a preface without settings": PREFACE,
    "half of the settings": PREFACE + frame(SETTINGS, b"\0" * 6)[:11],
    "half a frame header": HELLO + b"\0\0",
    "half a frame": HELLO + frame(PING, b"12345678")[:-1],
    "headers without their end": HELLO + request(1, flags=0),
    "headers continued without end": HELLO + request(1, flags=0) + frame(CONTINUATION, b"", stream=1) * 3,
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("drop_by_drop", [False, True])
@pytest.mark.parametrize("beginning", UNFINISHED.values(), ids=UNFINISHED.keys())
async def test_who_never_finishes_is_hung_up_on(beginning: bytes, drop_by_drop: bool) -> None:
    async with open_scene() as (port, _), open_peer(port) as peer, trio.open_nursery() as nursery:
        if drop_by_drop and beginning:
            await peer.send(beginning[: -len(beginning) // 4])
            nursery.start_soon(drip, peer, beginning[-len(beginning) // 4 :])
        else:
            await peer.send(beginning)
        await peer.hung_up()
        nursery.cancel_scope.cancel()


async def drip(peer: Peer, data: bytes) -> None:
    for byte in data:
        await peer.send(bytes([byte]))
        await trio.sleep(0.03)


@pytest.mark.usefixtures("impatient")
async def test_who_is_slow_but_gets_on_is_not_hung_up_on() -> None:
    async with open_scene() as (port, _), open_peer(port) as peer:
        await peer.send(HELLO)
        for number in range(20):
            ping = frame(PING, b"%08d" % number)
            await peer.send(ping[:9])
            await trio.sleep(0.01)
            await peer.send(ping[9:])
            await peer.says(frame(PING, b"%08d" % number, flags=1))


async def test_a_frame_too_large_is_refused_by_its_length() -> None:
    async with open_scene() as (port, _), open_peer(port) as peer:
        await peer.send(HELLO + frame(DATA, b"x" * 300_000, stream=1)[:9])
        await peer.hung_up()


# ---- floods

FLOODS: dict[str, Callable[[int], bytes]] = {
    "rapid resets": lambda n: request(2 * n + 1) + frame(RST_STREAM, struct.pack(">I", 8), stream=2 * n + 1),
    "resets that we are made to send": lambda n: (
        request(2 * n + 1) + frame(WINDOW_UPDATE, struct.pack(">I", 2**31 - 1), stream=2 * n + 1)
    ),
    "pings": lambda n: frame(PING, b"%08d" % n),
    "settings": lambda n: frame(SETTINGS, struct.pack(">HI", 4, 65_535 + n)),
    "priorities": lambda n: frame(PRIORITY, struct.pack(">IB", 0, 1), stream=2 * n + 1),
    "unknown frames": lambda n: frame(0xEE, b"?"),
    "empty data": lambda n: (request(1, "/test/Hang") if n == 0 else b"") + frame(DATA, stream=1),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
async def test_a_flood_ends_its_connection(flood: Callable[[int], bytes]) -> None:
    running = 0

    async def stay(request: bytes) -> bytes:
        nonlocal running
        running += 1
        try:
            await trio.sleep_forever()
        finally:
            running -= 1
        return b""

    services = {"/test/Stay": Unary(stay)}
    async with open_scene(services) as (port, _), open_peer(port) as peer, trio.open_nursery() as nursery:

        async def pour() -> None:
            await peer.send(HELLO)
            for start in range(0, 20 * GLITCHES, 100):
                await peer.send(b"".join(map(flood, range(start, start + 100))))

        nursery.start_soon(pour)
        said = await peer.hung_up()
        nursery.cancel_scope.cancel()
        if said:  # a reset may overtake the farewell
            goodbye = said.rfind(b"\0\0\x08" + bytes([GOAWAY, 0]))
            assert goodbye >= 0
            assert struct.unpack_from(">I", said, goodbye + 13)[0] == ENHANCE_YOUR_CALM
    assert running == 0


def test_the_bucket_of_glitches_fills_up_again() -> None:
    bucket = Glitches(0.0)
    assert all(bucket.spend(0.0) for _ in range(GLITCHES))
    assert not bucket.spend(0.0)
    assert bucket.spend(1.0)
    bucket = Glitches(0.0)
    assert all(bucket.spend(second / 50) for second in range(5_000))  # 50 in a second, for good


@pytest.mark.slow
async def test_who_asks_and_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT_BYTES", 100_000)
    monkeypatch.setattr(server, "SWEEP_S", 0.02)

    async def refuse(request: bytes) -> bytes:
        raise Refused("ABORTED", "a" * 1_000)  # goes in headers, which no window holds back

    async with open_scene({"/test/Refuse": Unary(refuse)}) as (port, _):
        plug = trio.socket.socket()
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        await plug.connect(("127.0.0.1", port))
        async with trio.SocketStream(plug) as stream:
            await stream.send_all(HELLO)
            body = b"\0\0\0\0\0"

            async def ask_for_ever() -> None:
                for number in count(1, 2):
                    ask = request(number, "/test/Refuse") + frame(DATA, body, stream=number, flags=END_STREAM)
                    await stream.send_all(ask)
                    if number % 40 == 1:
                        await trio.testing.wait_all_tasks_blocked()

            with trio.fail_after(GENEROUS_S), pytest.raises(trio.BrokenResourceError):
                await ask_for_ever()


# ---- headers

GIANTS: dict[str, bytes] = {
    "one large value": frame(HEADERS, head("/test/Echo", ("x", "v" * 100_000)), stream=1, flags=4),
    "one large path": frame(HEADERS, head("/" + "p" * 100_000), stream=1, flags=4),
    "many": frame(HEADERS, head("/x", *((f"x-{n}", "v") for n in range(5_000))), stream=1, flags=4),
    "a bomb": frame(
        # One large value in the table, named again by one byte each.
        HEADERS,
        b"\x40\x01x\x7f\xa1\x1e" + b"v" * 4_000 + b"\xbe" * 5_000,
        stream=1,
        flags=4,
    ),
    "continued for ever": frame(HEADERS, head(), stream=1) + frame(CONTINUATION, b"", stream=1) * 100,
}


@pytest.mark.parametrize("giant", GIANTS.values(), ids=GIANTS.keys())
async def test_giant_headers_end_their_connection(giant: bytes) -> None:
    async with open_scene() as (port, _), open_peer(port) as peer:
        await peer.send(HELLO + giant)
        await peer.hung_up()


# ---- requests and replies in drops


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "Limits", partial(Limits, receive_s=0.05, deliver_s=0.05))


async def test_a_request_that_never_ends_costs_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    be_impatient(monkeypatch)
    async with open_scene() as (_, client), client.stream("/test/Echo") as stream:
        exchange = stream._exchange  # type: ignore[attr-defined]
        exchange.connection.h2.send_data(exchange.id, b"\0\0\0\0\x09half")
        exchange.connection.flush()
        with pytest.raises(Exception, match="not complete within") as caught:
            await stream.receive()
        assert not isinstance(caught.value, Refused)


async def test_a_reply_that_nobody_takes_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    be_impatient(monkeypatch)
    taken_back = trio.Event()

    async def undo() -> None:
        taken_back.set()

    async def claim(request: bytes) -> Reply:
        return Reply(b"activation" * 10, undo)

    async with open_scene({"/test/Claim": Unary(claim)}) as (port, _), open_peer(port) as peer:
        no_window = frame(SETTINGS, struct.pack(">HI", 4, 0))
        body = frame(DATA, b"\0\0\0\0\0", stream=1, flags=END_STREAM)
        await peer.send(PREFACE + no_window + request(1, "/test/Claim") + body)
        with trio.fail_after(GENEROUS_S):
            await taken_back.wait()


async def test_what_all_peers_send_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_RECEIVING_BYTES", 1_000_000)
    budgets: list[Budget] = []
    monkeypatch.setattr(server, "Budget", lambda most: budgets.append(Budget(most)) or budgets[0])
    part = b"\0" + struct.pack(">I", 2_000_000) + b"x" * 600_000
    async with open_scene() as (_, client):
        async with client.stream("/test/Echo") as first, client.stream("/test/Echo") as second:
            for stream in (first, second):
                exchange = stream._exchange  # type: ignore[attr-defined]
                left = memoryview(part)
                while left:
                    await exchange._wait_for_room()
                    left = left[exchange._write(left, False, False) :]
            with pytest.raises(PeerUnavailable, match="try again"):
                await second.receive()
            assert 0 < budgets[0].used_bytes <= 1_000_000
        assert await client.call("/test/Echo", b"x" * 900_000, timeout_s=GENEROUS_S) == b"x" * 900_000
        assert budgets[0].used_bytes == 0


# ---- numbers of connections


async def test_connections_beyond_the_limit_are_closed_and_there_is_room_again() -> None:
    async with open_scene(max_connections=4) as (port, _):
        async with open_peer(port) as one, open_peer(port) as two, open_peer(port) as three:
            for peer in (one, two, three):
                await peer.send(HELLO + frame(PING, b"are you?"))
                await peer.says(frame(PING, b"are you?", flags=1))
            for _ in range(5):
                async with open_peer(port) as turned_away:
                    assert await turned_away.hung_up() == b""
        while True:  # the server notices in its own time
            async with open_peer(port) as peer:
                await peer.send(HELLO + frame(GOAWAY, struct.pack(">II", 0, 0)))
                if await peer.hung_up():
                    break


@pytest.mark.slow
async def test_a_thousand_idle_connections() -> None:
    """They cost descriptors and nothing else; all is given back."""
    before = len(os.listdir("/proc/self/fd"))
    async with open_scene() as (port, client):
        idle: list[socket.socket] = []
        for number in range(1_000):
            connected = trio.socket.socket()
            await connected.connect(("127.0.0.1", port))
            await connected.send(HELLO if number % 2 else b"")
            idle.append(connected)  # type: ignore[arg-type]
        for _ in range(20):
            assert await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S) == b"x"
        assert len(os.listdir("/proc/self/fd")) >= before + 2_000
        for connected in idle:
            connected.close()
    await trio.testing.wait_all_tasks_blocked()
    assert len(os.listdir("/proc/self/fd")) <= before + 5


# ---- half-open


class Cable:
    """A TCP proxy that can be cut: it then forwards nothing, and says nothing of it."""

    def __init__(self, port: int) -> None:
        self.whole = True
        self._port = port

    async def forward(self, near: trio.SocketStream) -> None:
        async with (
            await trio.open_tcp_stream("127.0.0.1", self._port) as far,
            near,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._pump, near, far)
            nursery.start_soon(self._pump, far, near)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                if self.whole:
                    await sink.send_all(data)
        if not self.whole:
            await trio.sleep_forever()  # the end of a connection is not told either


QUICK = Keepalive(time_s=0.05, timeout_s=0.05)
SLOW = Keepalive(time_s=3_600.0, timeout_s=3_600.0)


@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_peer_behind_a_cut_cable_is_given_up(who: str) -> None:
    """Each end notices by itself; the server's handler, and so its lease, ends too."""
    ended = trio.Event()

    async def work(stream: Duplex) -> None:
        try:
            await hang(stream)
        finally:
            ended.set()

    keepalives = (QUICK, SLOW) if who == "client" else (SLOW, QUICK)
    with trio.fail_after(GENEROUS_S):
        async with (
            aio.open_loop(),
            serve({"/test/Work": Stream(work)}, "127.0.0.1", 0, keepalive=keepalives[1]) as port,
            trio.open_nursery() as nursery,
        ):
            cable = Cable(port)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, cable.forward, listeners)
            through = listeners[0].socket.getsockname()[1]
            async with (
                connect(f"127.0.0.1:{through}", keepalive=keepalives[0]) as client,
                client.stream("/test/Work") as stream,
            ):
                assert await stream.receive() == b"welcome"
                cable.whole = False
                if who == "client":
                    with pytest.raises(PeerUnavailable):
                        await stream.receive()
                else:
                    await ended.wait()
            nursery.cancel_scope.cancel()


async def test_who_hangs_up_its_side_and_does_not_read_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "GOODBYE_S", 0.01)
    protocols: list[connection.Protocol] = []

    class Noted(connection.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            protocols.append(self)

    async def much(request: bytes) -> bytes:
        return b"x" * 8_000_000

    monkeypatch.setattr(server, "Protocol", Noted)
    wide = frame(SETTINGS, struct.pack(">HI", 4, 2**31 - 1))
    wider = frame(WINDOW_UPDATE, struct.pack(">I", 2**31 - 1 - 65_535))
    asked = request(1, "/test/Much") + frame(DATA, b"\0\0\0\0\0", stream=1, flags=END_STREAM)
    async with (
        aio.open_loop(),
        serve({"/test/Much": Unary(much)}, "127.0.0.1", 0) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        await stream.send_all(PREFACE + wide + wider + asked)
        await stream.receive_some(100_000)
        await stream.send_eof()
        with trio.fail_after(GENEROUS_S):
            await protocols[0].lost.wait()


async def test_a_server_without_room_for_a_body_learns_of_the_call_all_the_same() -> None:
    async with aio.open_loop(), trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        head_came = trio.Event()

        async def serve_one() -> None:
            async with listener, await listener.accept() as stream:
                await stream.send_all(frame(SETTINGS, struct.pack(">HI", 4, 0)))  # INITIAL_WINDOW_SIZE
                said = b""
                async for data in stream:
                    said += data
                    if bytes([HEADERS, END_HEADERS]) + struct.pack(">I", 1) in said:
                        head_came.set()

        nursery.start_soon(serve_one)
        async with connect(f"127.0.0.1:{listener.socket.getsockname()[1]}") as client:
            nursery.start_soon(partial(client.call, "/test/Echo", b"hello", timeout_s=GENEROUS_S))
            with trio.fail_after(GENEROUS_S):
                await head_came.wait()
            nursery.cancel_scope.cancel()
