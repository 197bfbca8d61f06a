"""The server as other implementations see it: the C core's Python client, unmodified."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import trio

from taskd import aio
from taskd.errors import Refused
from taskd.rpc.base import Duplex, Reply, Services, Stream, Unary
from taskd.rpc.health import CHECK, WATCH, health_services
from taskd.rpc.server import serve

grpc = pytest.importorskip("grpc")

T = TypeVar("T")
GENEROUS_S = 20.0
SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


@asynccontextmanager
async def open_pair(services: Services, **limits: int) -> AsyncIterator[Any]:
    options = [("grpc.max_receive_message_length", 20 << 20), ("grpc.max_send_message_length", 20 << 20)]
    async with aio.open_loop(), serve(services, "127.0.0.1", 0, **limits) as port:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        try:
            yield channel
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(channel.close)


async def ask(channel: Any, path: str, body: bytes, timeout_s: float = GENEROUS_S) -> bytes:
    return await in_thread(lambda: channel.unary_unary(path)(body, timeout=timeout_s))


async def in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)


async def echo(request: bytes) -> bytes:
    return request


async def test_unary_calls() -> None:
    async def nothing(request: bytes) -> bytes:
        raise Refused("NOT_FOUND", "No pending activations")

    async with open_pair({"/test/Echo": Unary(echo), "/test/GetTask": Unary(nothing)}) as channel:
        for body in (b"", b"hello", b"x" * 5_000_000):
            assert await ask(channel, "/test/Echo", body) == body
        with pytest.raises(grpc.RpcError) as caught:
            await ask(channel, "/test/GetTask", b"")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "No pending activations"
        with pytest.raises(grpc.RpcError) as caught:
            await ask(channel, "/test/Nothing", b"x")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_too_large_is_refused_and_the_connection_lives() -> None:
    async with open_pair({"/test/Echo": Unary(echo)}, max_request_bytes=100_000) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await ask(channel, "/test/Echo", b"x" * 10_000_000)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await ask(channel, "/test/Echo", b"alive") == b"alive"


async def test_deadline_and_cancel_reach_the_handler_and_take_the_reply_back() -> None:
    begun, taken_back = threading.Event(), trio.Event()

    async def claim(request: bytes) -> Reply:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            return Reply(b"activation", undelivered)  # noqa: B012  # finishes in spite of the cancellation

    async def undelivered() -> None:
        taken_back.set()

    def cancel_midway(channel: Any) -> None:
        future = channel.unary_unary("/test/Claim").future(b"")
        begun.wait()
        future.cancel()

    async with open_pair({"/test/Claim": Unary(claim)}) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await ask(channel, "/test/Claim", b"", timeout_s=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await taken_back.wait()

        taken_back = trio.Event()
        begun.clear()
        await in_thread(lambda: cancel_midway(channel))
        await taken_back.wait()


async def test_streams() -> None:
    async def echo_all(stream: Duplex) -> None:
        while (message := await stream.receive()) is not None:
            await stream.send(message)
        raise Refused("ABORTED", "the end")

    def talk(channel: Any) -> list[bytes]:
        call = channel.stream_stream("/test/Echo")(frames())
        received = [next(call) for _ in range(200)]
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.ABORTED
        return received

    def frames() -> Iterator[bytes]:
        return (b"%d" % number + b"x" * 20_000 for number in range(200))

    async with open_pair({"/test/Echo": Stream(echo_all)}) as channel:
        assert await in_thread(lambda: talk(channel)) == list(frames())


async def test_health_checks() -> None:
    states: dict[str, bool] = {"": True, "busy.Service": False}
    async with open_pair(health_services(states.get)) as channel:
        assert await ask(channel, CHECK, b"") == SERVING
        assert await ask(channel, CHECK, b"\x0a\x0cbusy.Service") == NOT_SERVING
        for body, code in (
            (b"\x0a\x07unknown", grpc.StatusCode.NOT_FOUND),
            (b"\x0a\xff", grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                await ask(channel, CHECK, body)
            assert caught.value.code() is code


async def test_health_watch_tells_each_change_once() -> None:
    states: dict[str, bool] = {}
    change = trio.Event()
    received: list[bytes] = []

    async def set_status(serving: bool) -> None:
        nonlocal change
        states["s"] = serving
        change.set()
        change = trio.Event()

    def watch(channel: Any) -> None:
        call = channel.unary_stream(WATCH)(b"\x0a\x01s")
        for number, message in enumerate(call):
            received.append(message)
            if number == 0:
                trio.from_thread.run(set_status, True)
            elif number == 1:
                trio.from_thread.run(set_status, True)
                trio.from_thread.run(set_status, False)
            else:
                call.cancel()
                return

    async with open_pair(health_services(states.get, lambda: change, recheck_s=3600)) as channel:
        await in_thread(lambda: watch(channel))
    assert received == [SERVICE_UNKNOWN, SERVING, NOT_SERVING]


async def test_health_watch_looks_again_by_itself() -> None:
    answers = iter([True, True, False])
    async with open_pair(health_services(lambda service: next(answers), recheck_s=0.01)) as channel:

        def watch() -> list[bytes]:
            call = channel.unary_stream(WATCH)(b"")
            received = [next(call), next(call)]
            call.cancel()
            return received

        assert await in_thread(watch) == [SERVING, NOT_SERVING]
