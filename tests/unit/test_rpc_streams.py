"""Bidirectional streams over real sockets: order, flow control, ends of every kind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from taskd import aio
from taskd.errors import PeerUnavailable, Refused
from taskd.rpc.base import Duplex, Services, Stream, Unary
from taskd.rpc.client import Client, connect
from taskd.rpc.server import serve

GENEROUS_S = 20.0
MIB = 1024 * 1024


@asynccontextmanager
async def open_pair(services: Services, **limits: int) -> AsyncIterator[Client]:
    async with (
        aio.open_loop(),
        serve(services, "127.0.0.1", 0, **limits) as port,
        connect(f"127.0.0.1:{port}") as client,
    ):
        yield client


async def echo(stream: Duplex) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


async def echo_once(request: bytes) -> bytes:
    return request


@pytest.mark.parametrize("size", [0, 1000, pytest.param(50_000, marks=pytest.mark.slow)])
async def test_a_thousand_frames_come_back_in_order(size: int) -> None:
    frames = [b"%08d" % number + b"x" * size for number in range(1000)]
    received = []
    async with open_pair({"/test/Echo": Stream(echo)}) as client, client.stream("/test/Echo") as stream:

        async def send() -> None:
            for frame in frames:
                await stream.send(frame)
            await stream.finish()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while (frame := await stream.receive()) is not None:
                received.append(frame)
        assert await stream.receive() is None
    assert received == frames


async def test_the_server_may_speak_first_and_end() -> None:
    async def count(stream: Duplex) -> None:
        for number in range(3):
            await stream.send(b"%d" % number)

    async with open_pair({"/test/Count": Stream(count)}) as client, client.stream("/test/Count") as stream:
        assert [await stream.receive() for _ in range(4)] == [b"0", b"1", b"2", None]


async def test_a_refusal_comes_after_the_messages_before_it() -> None:
    async def refuse(stream: Duplex) -> None:
        await stream.send(b"welcome")
        raise Refused("FAILED_PRECONDITION", "version 9 is not spoken here")

    async with open_pair({"/test/S": Stream(refuse)}) as client, client.stream("/test/S") as stream:
        assert await stream.receive() == b"welcome"
        with pytest.raises(Refused, match="version 9") as caught:
            await stream.receive()
        assert caught.value.code == "FAILED_PRECONDITION"
        with pytest.raises(Refused, match="version 9"):
            await stream.send(b"anyway")


async def test_an_unexpected_error_is_internal() -> None:
    async def fail(stream: Duplex) -> None:
        raise ValueError("secret")

    async with open_pair({"/test/S": Stream(fail)}) as client, client.stream("/test/S") as stream:
        with pytest.raises(Refused, match="internal error") as caught:
            await stream.receive()
        assert caught.value.code == "INTERNAL"


async def test_an_unknown_stream_is_unimplemented() -> None:
    async with open_pair({}) as client, client.stream("/test/Nothing") as stream:
        with pytest.raises(Refused) as caught:
            await stream.receive()
        assert caught.value.code == "UNIMPLEMENTED"


async def test_a_sender_waits_for_a_peer_that_does_not_read() -> None:
    """What lies between is bounded by the stream's window, and other calls of the connection go on."""
    may_read = trio.Event()
    sent = received = 0

    async def slow(stream: Duplex) -> None:
        nonlocal received
        await may_read.wait()
        while (message := await stream.receive()) is not None:
            received += len(message)

    async def send(client: Client) -> None:
        nonlocal sent
        async with client.stream("/test/Slow") as stream:
            for _ in range(64):
                await stream.send(b"x" * (MIB // 2))
                sent += MIB // 2
            await stream.finish()
            assert await stream.receive() is None

    services = {"/test/Slow": Stream(slow), "/test/Echo": Unary(echo_once)}
    async with open_pair(services) as client, trio.open_nursery() as nursery:
        nursery.start_soon(send, client)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert 0 < sent <= 5 * MIB
        assert await client.call("/test/Echo", b"alive", timeout_s=GENEROUS_S) == b"alive"
        may_read.set()
    assert received == sent == 32 * MIB


async def test_messages_larger_than_the_window_pass() -> None:
    async with open_pair({"/test/Echo": Stream(echo)}) as client, client.stream("/test/Echo") as stream:
        for size in (9 * MIB, 10 * MIB):
            await stream.send(b"x" * size)
            answer = await stream.receive()
            assert answer is not None
            assert len(answer) == size


async def test_a_message_too_large_ends_the_stream_and_nothing_else() -> None:
    services = {"/test/Echo": Stream(echo), "/test/Once": Unary(echo_once)}
    async with open_pair(services, max_request_bytes=1000) as client:
        async with client.stream("/test/Echo") as stream:
            await stream.send(b"x" * 1001)
            with pytest.raises(Refused) as caught:
                await stream.receive()
            assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert await client.call("/test/Once", b"alive", timeout_s=GENEROUS_S) == b"alive"


async def test_leaving_the_block_cancels_the_handler() -> None:
    begun, cancelled = trio.Event(), trio.Event()

    async def hang(stream: Duplex) -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with open_pair({"/test/Hang": Stream(hang)}) as client:
        async with client.stream("/test/Hang"):
            await begun.wait()
        await cancelled.wait()


@pytest.mark.parametrize("victim", ["receiving", "sending", "shielded"])
async def test_the_server_notices_a_client_that_died(victim: str) -> None:
    begun, ended = trio.Event(), trio.Event()
    errors: list[BaseException] = []

    async def handle(stream: Duplex) -> None:
        begun.set()
        try:
            if victim == "shielded":
                with trio.CancelScope(shield=True):
                    await stream.receive()
            while victim == "sending":
                await stream.send(b"x" * MIB)
            await stream.receive()
        except BaseException as error:
            errors.append(error)
            raise
        finally:
            ended.set()

    async with open_pair({"/test/S": Stream(handle)}) as client, client.stream("/test/S"):
        await begun.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client._protocol is not None
        client._protocol.connection.transport.abort()
        await ended.wait()
    assert isinstance(errors[0], PeerUnavailable if victim == "shielded" else trio.Cancelled)


@pytest.mark.parametrize("victim", ["receiving", "sending"])
async def test_the_client_notices_a_server_that_died(victim: str) -> None:
    proxied: list[trio.SocketStream] = []

    async def hang(stream: Duplex) -> None:
        await stream.send(b"welcome")
        await trio.sleep_forever()

    async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            async for data in source:
                await sink.send_all(data)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass

    async with (
        aio.open_loop(),
        serve({"/test/Hang": Stream(hang)}, "127.0.0.1", 0) as port,
        trio.open_nursery() as nursery,
    ):

        async def proxy(stream: trio.SocketStream) -> None:
            behind = await trio.open_tcp_stream("127.0.0.1", port)
            proxied.append(stream)
            async with behind, trio.open_nursery() as pumps:
                pumps.start_soon(pump, stream, behind)
                await pump(behind, stream)
                pumps.cancel_scope.cancel()

        listeners: list[trio.SocketListener] = await nursery.start(trio.serve_tcp, proxy, 0)
        proxy_port = listeners[0].socket.getsockname()[1]
        async with (
            connect(f"127.0.0.1:{proxy_port}") as client,
            client.stream("/test/Hang") as stream,
        ):
            assert await stream.receive() == b"welcome"

            async def use() -> None:
                while True:
                    await (stream.send(b"x" * MIB) if victim == "sending" else stream.receive())

            async def fail() -> None:
                with pytest.raises(PeerUnavailable):
                    await use()

            async with trio.open_nursery() as failing:
                failing.start_soon(fail)
                await trio.testing.wait_all_tasks_blocked(0.01)
                await proxied[0].aclose()
            with pytest.raises(PeerUnavailable):
                await stream.send(b"x")
        nursery.cancel_scope.cancel()


async def test_a_message_cancelled_in_the_middle_gives_the_stream_up() -> None:
    """Half a message must not be followed by the next one."""

    async def hang(stream: Duplex) -> None:
        await trio.sleep_forever()

    async with open_pair({"/test/Hang": Stream(hang)}) as client, client.stream("/test/Hang") as stream:

        async def send() -> None:
            await stream.send(b"first")
            await stream.send(b"x" * 9 * MIB)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        with pytest.raises(PeerUnavailable, match="cancelled in the middle"):
            await stream.send(b"next")


async def test_two_senders_do_not_mix_their_messages() -> None:
    async with open_pair({"/test/Echo": Stream(echo)}) as client, client.stream("/test/Echo") as stream:

        async def send(letter: bytes) -> None:
            for _ in range(5):
                await stream.send(letter * MIB)

        seen: list[bytes] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, b"a")
            nursery.start_soon(send, b"b")
            for _ in range(10):
                message = await stream.receive()
                assert message is not None
                seen.append(message)
        assert sorted(seen) == [b"a" * MIB] * 5 + [b"b" * MIB] * 5
