"""The door to asyncio: nothing asyncio does may end the process, skip a clean-up or change an error."""

from __future__ import annotations

import asyncio
import gc
from typing import NoReturn

import pytest
import trio
import trio.testing

from taskd import aio
from taskd.errors import PeerUnavailable


async def test_an_error_asyncio_leaves_to_the_loop_is_counted_not_raised() -> None:
    async def fail() -> NoReturn:
        raise ValueError("nobody awaits me")

    async def start() -> None:
        task = asyncio.get_running_loop().create_task(fail())
        await asyncio.wait([task])

    before = aio.unhandled_errors
    async with aio.open_loop():
        await aio.call(start)
        gc.collect()  # asyncio reports the lost error when the task is collected
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert aio.unhandled_errors == before + 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_forgotten_channel_of_grpclib_does_not_end_the_loop() -> None:
    from grpclib.client import Channel

    async def connect_and_forget(port: int) -> None:
        channel = Channel("127.0.0.1", port)
        await channel.__connect__()

    async def swallow(stream: trio.SocketStream) -> None:
        async for _ in stream:
            pass

    before = aio.unhandled_errors
    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(trio.serve_tcp, swallow, 0)
        async with aio.open_loop():
            await aio.call(connect_and_forget, listeners[0].socket.getsockname()[1])
            gc.collect()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert aio.unhandled_errors == before + 1
        nursery.cancel_scope.cancel()


async def test_the_block_s_error_is_not_wrapped() -> None:
    with pytest.raises(ZeroDivisionError):
        async with aio.open_loop():
            raise ZeroDivisionError
    with trio.CancelScope() as scope:
        async with aio.open_loop():
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_call_passes_arguments_results_and_errors() -> None:
    async def divide(a: int, *, by: int) -> float:
        await asyncio.sleep(0)
        return a / by

    async with aio.open_loop():
        assert await aio.call(divide, 6, by=3) == 2
        with pytest.raises(ZeroDivisionError):
            await aio.call(divide, 6, by=0)


async def test_a_cancellation_of_asyncio_s_own_is_an_error() -> None:
    async def cancelled_by_a_neighbour() -> None:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.cancel)
        await future

    async with aio.open_loop():
        with pytest.raises(aio.Interrupted, match="cancelled_by_a_neighbour"):
            await aio.call(cancelled_by_a_neighbour)
        assert not await aio.finish(cancelled_by_a_neighbour, within_s=5)


async def test_cancelling_a_call_waits_until_asyncio_has_unwound() -> None:
    steps: list[str] = []
    scope = trio.CancelScope()

    async def hang() -> None:
        try:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await asyncio.get_running_loop().create_future()
        finally:
            steps.append("unwound")

    async with aio.open_loop():
        with scope:
            await aio.call(hang)
        steps.append("returned")
    assert scope.cancelled_caught
    assert steps == ["unwound", "returned"]


async def test_a_clean_up_is_neither_skipped_nor_endless_nor_loud() -> None:
    done: list[str] = []

    async def clean_up() -> None:
        await asyncio.sleep(0)
        done.append("clean")

    async def hang() -> None:
        await asyncio.get_running_loop().create_future()

    async def fail() -> None:
        raise ValueError

    async with aio.open_loop():
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await aio.finish(clean_up, within_s=5)
        assert done == ["clean"]
        assert not await aio.finish(hang, within_s=0.01)
        assert not await aio.finish(fail, within_s=5)


async def test_a_handler_s_lone_error_comes_out_of_its_nurseries() -> None:
    async def handle(fail: bool) -> str:
        async with trio.open_nursery() as nursery:
            if fail:
                nursery.start_soon(trio.sleep_forever)
                raise PeerUnavailable("gone")
        return "fine"

    async with aio.open_loop():
        assert await aio.call(aio.trio_handler(handle), False) == "fine"
        with pytest.raises(PeerUnavailable, match="gone"):
            await aio.call(aio.trio_handler(handle), True)


def test_foreign_errors_become_ours() -> None:
    table = {
        ConnectionRefusedError: lambda e: PeerUnavailable("refused"),
        OSError: lambda e: PeerUnavailable("os"),
    }
    with pytest.raises(PeerUnavailable, match="refused"), aio.mapped(table):
        raise ConnectionRefusedError
    with pytest.raises(PeerUnavailable, match="os"), aio.mapped(table):
        raise ExceptionGroup("nursery", [OSError()])
    with pytest.raises(KeyError), aio.mapped(table):
        raise KeyError
