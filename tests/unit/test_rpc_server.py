"""The life of a server: start, bad peers, stop, restart."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading

import pytest
import trio
import trio.testing

from taskd import aio
from taskd.errors import PeerUnavailable, Refused, StartupError
from taskd.rpc.base import Duplex, Stream, Unary
from taskd.rpc.client import connect
from taskd.rpc.exchange import Exchange
from taskd.rpc.server import serve

GENEROUS_S = 20.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def frame(kind: int, body: bytes, *, stream: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


async def echo(request: bytes) -> bytes:
    return request


async def hang(stream: Duplex) -> None:
    await stream.send(b"welcome")
    await trio.sleep_forever()


SERVICES = {"/test/Echo": Unary(echo), "/test/Hang": Stream(hang)}


async def test_a_taken_port_is_a_sentence_and_exit_code_75() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port}.*choose another port") as caught:
            async with aio.open_loop(), serve(SERVICES, "127.0.0.1", port):
                raise AssertionError
    assert caught.value.exit_code == 75


async def test_a_host_that_is_not_ours_is_a_sentence_and_exit_code_69() -> None:
    with pytest.raises(StartupError, match=r"192\.0\.2\.1:0.*of this machine") as caught:
        async with aio.open_loop(), serve(SERVICES, "192.0.2.1", 0):
            raise AssertionError
    assert caught.value.exit_code == 69


async def test_an_error_of_the_block_leaves_it_unwrapped() -> None:
    with pytest.raises(ZeroDivisionError):
        async with aio.open_loop(), serve(SERVICES, "127.0.0.1", 0):
            raise ZeroDivisionError


async def test_cancelling_the_block_closes_the_server() -> None:
    with trio.CancelScope() as scope:
        async with aio.open_loop(), serve(SERVICES, "127.0.0.1", 0) as port:
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    with pytest.raises(OSError, match="all attempts"):
        await trio.open_tcp_stream("127.0.0.1", port)


BAD = {
    "not HTTP/2": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown frame": PREFACE + EMPTY_SETTINGS + frame(0xEE, b"what is this"),
    "settings of a wrong length": PREFACE + frame(4, b"xxxxx"),
    "data on no stream": PREFACE + EMPTY_SETTINGS + frame(0, b"x" * 10, stream=1),
    "headers that are noise": PREFACE + EMPTY_SETTINGS + frame(1, b"\xff" * 40, stream=1, flags=4),
    "headers without anything": PREFACE + EMPTY_SETTINGS + frame(1, b"", stream=1, flags=5),
    "a frame larger than announced": PREFACE + EMPTY_SETTINGS + frame(0, b"x" * 2_000_000, stream=1),
    "goaway": PREFACE + EMPTY_SETTINGS + frame(7, struct.pack(">II", 0, 1)),
    "reset of no stream": PREFACE + EMPTY_SETTINGS + frame(3, struct.pack(">I", 8), stream=1),
    "window of zero": PREFACE + EMPTY_SETTINGS + frame(8, struct.pack(">I", 0)),
}


@pytest.mark.parametrize("noise", BAD.values(), ids=BAD.keys())
async def test_bad_bytes_cost_at_most_their_own_connection(noise: bytes) -> None:
    async with (
        aio.open_loop(),
        serve(SERVICES, "127.0.0.1", 0) as port,
        connect(f"127.0.0.1:{port}") as client,
    ):
        assert await client.call("/test/Echo", b"before", timeout_s=GENEROUS_S) == b"before"
        connection = client._protocol
        async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
            with trio.move_on_after(0.05), contextlib.suppress(trio.BrokenResourceError):
                await stranger.send_all(noise)
                async for _ in stranger:
                    pass
        assert await client.call("/test/Echo", b"after", timeout_s=GENEROUS_S) == b"after"
        assert client._protocol is connection


async def test_an_unknown_frame_is_ignored() -> None:
    async with (
        aio.open_loop(),
        serve(SERVICES, "127.0.0.1", 0) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stranger,
    ):
        ping = frame(6, b"are you?")
        await stranger.send_all(PREFACE + EMPTY_SETTINGS + frame(0xEE, b"what is this") + ping)
        seen = b""
        while frame(6, b"are you?", flags=1) not in seen:
            received = await stranger.receive_some()
            assert received, "the connection was closed"
            seen += received


async def test_a_client_that_sends_garbage_as_messages() -> None:
    """Half a message, and a compressed one, get a status; the connection lives on."""
    async with (
        aio.open_loop(),
        serve(SERVICES, "127.0.0.1", 0) as port,
        connect(f"127.0.0.1:{port}") as client,
    ):
        for raw, code in (
            (b"\x00\x00\x00\x00\x09half", "INTERNAL"),
            (b"\x01\x00\x00\x00\x01x", "UNIMPLEMENTED"),
        ):
            async with client.stream("/test/Echo") as stream:
                exchange = stream._exchange  # type: ignore[attr-defined]
                assert isinstance(exchange, Exchange)
                exchange.connection.h2.send_data(exchange.id, raw, end_stream=True)
                exchange.connection.flush()
                with pytest.raises(Refused) as caught:
                    await stream.receive()
                assert caught.value.code == code
        assert await client.call("/test/Echo", b"after", timeout_s=GENEROUS_S) == b"after"


@pytest.mark.parametrize("state", ["idle", "stream open", "not reading", "never spoke"])
async def test_stopping_is_prompt_whatever_clients_do(state: str) -> None:
    async def flood(stream: Duplex) -> None:
        while True:
            await stream.send(b"x" * 1_000_000)

    with trio.fail_after(GENEROUS_S):
        async with aio.open_loop():
            async with serve({**SERVICES, "/test/Flood": Stream(flood)}, "127.0.0.1", 0) as port:
                client_scope = connect(f"127.0.0.1:{port}")
                client = await client_scope.__aenter__()
                if state == "idle":
                    await client.call("/test/Echo", b"", timeout_s=GENEROUS_S)
                elif state == "stream open":
                    stream_scope = client.stream("/test/Hang")
                    stream = await stream_scope.__aenter__()
                    assert await stream.receive() == b"welcome"
                elif state == "not reading":
                    stream_scope = client.stream("/test/Flood")
                    stream = await stream_scope.__aenter__()
                    await trio.testing.wait_all_tasks_blocked(0.01)
                else:
                    silent = await trio.open_tcp_stream("127.0.0.1", port)
                    await trio.testing.wait_all_tasks_blocked(0.01)
            if state == "never spoke":
                while await silent.receive_some():
                    pass  # until the end: the server hung up
                await silent.aclose()
            if state == "stream open":
                with pytest.raises(PeerUnavailable, match="stopping"):
                    await stream.receive()
            if state in ("stream open", "not reading"):
                await stream_scope.__aexit__(None, None, None)
            await client_scope.__aexit__(None, None, None)


async def test_what_was_asked_before_the_stop_is_answered() -> None:
    """The report that ends a broker's drain is itself such a call."""
    asked, stopping = trio.Event(), trio.Event()

    async def report(request: bytes) -> bytes:
        asked.set()
        await stopping.wait()
        await trio.sleep(0.01)  # its commit
        return b"taken"

    answers: list[bytes] = []

    async def ask(port: int) -> None:
        async with connect(f"127.0.0.1:{port}") as client:
            answers.append(await client.call("/test/Report", b"", timeout_s=GENEROUS_S))

    async with aio.open_loop(), trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + GENEROUS_S
        async with serve({"/test/Report": Unary(report)}, "127.0.0.1", 0) as port:
            nursery.start_soon(ask, port)
            await asked.wait()
            stopping.set()
    assert answers == [b"taken"]


async def test_a_client_comes_back_after_a_restart() -> None:
    async with aio.open_loop():
        async with serve(SERVICES, "127.0.0.1", 0) as port:
            client_scope = connect(f"127.0.0.1:{port}")
            client = await client_scope.__aenter__()
            assert await client.call("/test/Echo", b"one", timeout_s=GENEROUS_S) == b"one"
        with pytest.raises(PeerUnavailable):
            await client.call("/test/Echo", b"two", timeout_s=GENEROUS_S)
        async with serve(SERVICES, "127.0.0.1", port):
            assert await client.call("/test/Echo", b"three", timeout_s=GENEROUS_S) == b"three"
        await client_scope.__aexit__(None, None, None)
        with pytest.raises(PeerUnavailable, match="closed"):
            await client.call("/test/Echo", b"four", timeout_s=GENEROUS_S)


async def test_waiting_callers_share_one_failed_attempt() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    failures = 0

    async with aio.open_loop(), connect(f"127.0.0.1:{port}") as client, trio.open_nursery() as nursery:

        async def ask() -> None:
            nonlocal failures
            with pytest.raises(PeerUnavailable):
                await client.call("/test/Echo", b"", timeout_s=GENEROUS_S)
            failures += 1

        for _ in range(50):
            nursery.start_soon(ask)
    assert failures == 50


PROGRAM = """
import {first}
import trio
from taskd import aio
from taskd.rpc.base import Unary
from taskd.rpc.client import connect
from taskd.rpc.server import serve

async def echo(request):
    return request

async def main():
    async with aio.open_loop(), serve({{"/t/E": Unary(echo)}}, "127.0.0.1", 0) as port:
        async with connect(f"127.0.0.1:{{port}}") as client:
            assert await client.call("/t/E", b"x", timeout_s=20) == b"x"

trio.run(main)
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    "first", ["taskd.rpc.client", "taskd.rpc.server", "taskd.rpc.health", "taskd.rpc.base"]
)
def test_any_order_of_imports_works(first: str) -> None:
    """From Python 3.12 on grpclib must not be imported before trio-asyncio."""
    subprocess.run([sys.executable, "-c", PROGRAM.format(first=first)], check=True, timeout=60)


@pytest.mark.parametrize("served", ["unary", "stream"])
async def test_threads_elsewhere_do_not_matter(served: str) -> None:
    """A client in a loop and thread of its own, as the producer's is."""
    answers: list[bytes | None] = []

    async def ask(port: int) -> None:
        async with aio.open_loop(), connect(f"127.0.0.1:{port}") as client:
            if served == "unary":
                answers.append(await client.call("/test/Echo", b"hello", timeout_s=GENEROUS_S))
            else:
                async with client.stream("/test/Hang") as stream:
                    answers.append(await stream.receive())

    async with aio.open_loop(), serve(SERVICES, "127.0.0.1", 0) as port:
        thread = threading.Thread(target=trio.run, args=(ask, port))
        thread.start()
        await trio.to_thread.run_sync(thread.join)
    assert answers == [b"hello" if served == "unary" else b"welcome"]
