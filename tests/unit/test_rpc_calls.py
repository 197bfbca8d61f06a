"""Unary calls over real sockets: answers, refusals, deadlines, sizes, replies nobody took."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from taskd import aio
from taskd.errors import ConfigError, PeerTimeout, PeerUnavailable, Refused
from taskd.rpc.base import Reply, Services, Unary
from taskd.rpc.client import Client, connect
from taskd.rpc.server import serve

GENEROUS_S = 20.0


@asynccontextmanager
async def open_pair(services: Services, **limits: int) -> AsyncIterator[Client]:
    async with (
        aio.open_loop(),
        serve(services, "127.0.0.1", 0, **limits) as port,
        connect(f"127.0.0.1:{port}") as client,
    ):
        yield client


async def echo(request: bytes) -> bytes:
    return request


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("size", [0, 1, 16_384, 70_000, 5_000_000, 10 * 1024 * 1024])
async def test_a_call_is_answered(size: int) -> None:
    body = bytes(i % 251 for i in range(1000)) * (size // 1000) + b"x" * (size % 1000)
    async with open_pair({"/test/Echo": Unary(echo)}) as client:
        assert await client.call("/test/Echo", body, timeout_s=GENEROUS_S) == body


async def test_many_calls_share_a_connection() -> None:
    """More at once than HTTP/2 streams are allowed: the rest waits its turn."""
    async with open_pair({"/test/Echo": Unary(echo)}) as client:
        answers: dict[int, bytes] = {}

        async def ask(number: int) -> None:
            answers[number] = await client.call("/test/Echo", b"%d" % number, timeout_s=GENEROUS_S)

        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(ask, number)
    assert answers == {number: b"%d" % number for number in range(300)}


async def test_a_refusal_keeps_its_code_and_message() -> None:
    async def refuse(request: bytes) -> bytes:
        raise Refused("NOT_FOUND", "nothing here: 50 % of the time – really")

    async with open_pair({"/test/Refuse": Unary(refuse)}) as client:
        with pytest.raises(Refused, match="nothing here: 50 % of the time – really") as caught:
            await client.call("/test/Refuse", b"", timeout_s=GENEROUS_S)
    assert caught.value.code == "NOT_FOUND"


async def test_a_refusal_out_of_nurseries_keeps_its_code() -> None:
    async def refuse(request: bytes) -> bytes:
        async def inner() -> None:
            raise Refused("FAILED_PRECONDITION", "not now")

        async with trio.open_nursery() as outer:
            outer.start_soon(trio.sleep_forever)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(inner)
        raise AssertionError

    async with open_pair({"/test/Refuse": Unary(refuse)}) as client:
        with pytest.raises(Refused) as caught:
            await client.call("/test/Refuse", b"", timeout_s=GENEROUS_S)
    assert (caught.value.code, caught.value.message) == ("FAILED_PRECONDITION", "not now")


async def test_an_unexpected_error_is_internal_and_tells_no_secret() -> None:
    async def fail(request: bytes) -> bytes:
        raise ValueError("password is 1234")

    async def fail_with_a_group(request: bytes) -> bytes:
        raise ExceptionGroup("several", [ValueError("password"), Refused("NOT_FOUND")])

    services = {"/test/Fail": Unary(fail), "/test/Group": Unary(fail_with_a_group), "/test/Echo": Unary(echo)}
    async with open_pair(services) as client:
        for path in ("/test/Fail", "/test/Group"):
            with pytest.raises(Refused) as caught:
                await client.call(path, b"", timeout_s=GENEROUS_S)
            assert caught.value.code == "INTERNAL"
            assert "password" not in str(caught.value)
        assert await client.call("/test/Echo", b"alive", timeout_s=GENEROUS_S) == b"alive"


async def test_a_refusal_with_an_unknown_code_is_internal() -> None:
    async def refuse(request: bytes) -> bytes:
        raise Refused("NO_SUCH_CODE")

    async with open_pair({"/test/Refuse": Unary(refuse)}) as client:
        with pytest.raises(Refused) as caught:
            await client.call("/test/Refuse", b"", timeout_s=GENEROUS_S)
    assert caught.value.code == "INTERNAL"


async def test_unavailable_and_deadline_of_the_peer_have_their_own_errors() -> None:
    async def drain(request: bytes) -> bytes:
        raise Refused("UNAVAILABLE", "draining")

    async def late(request: bytes) -> bytes:
        raise Refused("DEADLINE_EXCEEDED", "too late")

    async with open_pair({"/test/Drain": Unary(drain), "/test/Late": Unary(late)}) as client:
        with pytest.raises(PeerUnavailable, match="draining"):
            await client.call("/test/Drain", b"", timeout_s=GENEROUS_S)
        with pytest.raises(PeerTimeout, match="too late"):
            await client.call("/test/Late", b"", timeout_s=GENEROUS_S)


async def test_an_unknown_method_is_unimplemented() -> None:
    async with open_pair({"/test/Echo": Unary(echo)}) as client:
        with pytest.raises(Refused, match="/test/Nothing") as caught:
            await client.call("/test/Nothing", b"x", timeout_s=GENEROUS_S)
        assert caught.value.code == "UNIMPLEMENTED"
        assert await client.call("/test/Echo", b"alive", timeout_s=GENEROUS_S) == b"alive"


async def test_the_deadline_of_a_call_cancels_its_handler() -> None:
    cancelled = trio.Event()

    async def hang(request: bytes) -> bytes:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with open_pair({"/test/Hang": Unary(hang), "/test/Echo": Unary(echo)}) as client:
        assert await client.call("/test/Echo", b"", timeout_s=GENEROUS_S) == b""
        with pytest.raises(PeerTimeout, match=r"no answer to /test/Hang within 0\.1 s|deadline"):
            await client.call("/test/Hang", b"", timeout_s=0.1)
        await cancelled.wait()
        assert await client.call("/test/Echo", b"alive", timeout_s=GENEROUS_S) == b"alive"


async def test_cancelling_a_call_cancels_its_handler() -> None:
    running, cancelled = trio.Event(), trio.Event()

    async def hang(request: bytes) -> bytes:
        running.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with open_pair({"/test/Hang": Unary(hang)}) as client, trio.open_nursery() as nursery:

        async def ask() -> None:
            await client.call("/test/Hang", b"", timeout_s=GENEROUS_S)

        nursery.start_soon(ask)
        await running.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await cancelled.wait()


async def test_nobody_there() -> None:
    async with aio.open_loop(), connect(f"127.0.0.1:{free_port()}") as client:
        with pytest.raises(PeerUnavailable, match="nobody answers"):
            await client.call("/test/Echo", b"", timeout_s=GENEROUS_S)


async def test_a_port_that_speaks_something_else() -> None:
    async def shout(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 mail.example ESMTP\r\n")

    async with aio.open_loop(), trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(trio.serve_tcp, shout, 0)
        port = listeners[0].socket.getsockname()[1]
        async with connect(f"127.0.0.1:{port}") as client:
            with pytest.raises(PeerUnavailable, match="is it a gRPC port"):
                await client.call("/test/Echo", b"", timeout_s=GENEROUS_S)
        nursery.cancel_scope.cancel()


async def test_a_port_that_never_answers() -> None:
    """Without a connection nothing was delivered, so it is not a timeout of the call."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with aio.open_loop(), connect(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            with pytest.raises(PeerUnavailable, match=r"no connection within 0\.1 s"):
                await client.call("/test/Echo", b"", timeout_s=0.1)


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", "localhost:http", ":50051", "h:0", "h:65536"]
)
async def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="expected an address like host:port"):
        async with connect(address):
            pass


async def test_a_request_too_large_is_refused_and_the_connection_lives() -> None:
    calls = 0

    async def count(request: bytes) -> bytes:
        nonlocal calls
        calls += 1
        return request

    async with open_pair({"/test/Count": Unary(count)}, max_request_bytes=1000) as client:
        assert await client.call("/test/Count", b"x" * 1000, timeout_s=GENEROUS_S)
        connection = client._protocol
        for size in (1001, 20_000_000):
            with pytest.raises(Refused, match=f"{size} bytes is larger than the 1000") as caught:
                await client.call("/test/Count", b"x" * size, timeout_s=GENEROUS_S)
            assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert await client.call("/test/Count", b"alive", timeout_s=GENEROUS_S) == b"alive"
        assert client._protocol is connection
    assert calls == 2


async def test_a_reply_too_large_is_refused_and_taken_back() -> None:
    taken_back = trio.Event()

    async def huge(request: bytes) -> Reply:
        async def undelivered() -> None:
            taken_back.set()

        return Reply(b"x" * 1001, undelivered)

    async with open_pair({"/test/Huge": Unary(huge)}, max_reply_bytes=1000) as client:
        with pytest.raises(Refused, match="1001 bytes") as caught:
            await client.call("/test/Huge", b"", timeout_s=GENEROUS_S)
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        await taken_back.wait()


async def test_a_delivered_reply_is_not_taken_back() -> None:
    taken_back = trio.Event()

    async def give(request: bytes) -> Reply:
        async def undelivered() -> None:
            taken_back.set()

        return Reply(b"here", undelivered)

    async with open_pair({"/test/Give": Unary(give)}) as client:
        assert await client.call("/test/Give", b"", timeout_s=GENEROUS_S) == b"here"
    assert not taken_back.is_set()


class Claim:
    """A handler that finishes behind a shield, as a group commit does, and only then learns of its caller."""

    def __init__(self) -> None:
        self.begun, self.may_end, self.taken_back = trio.Event(), trio.Event(), trio.Event()
        self.given_up = trio.Event()

    async def handle(self, request: bytes) -> Reply:
        self.begun.set()
        with trio.CancelScope(shield=True):
            await self.may_end.wait()
        return Reply(b"activation", self.undelivered)

    async def undelivered(self) -> None:
        await trio.lowlevel.checkpoint()
        self.taken_back.set()

    async def ask(self, client: Client, timeout_s: float) -> None:
        with pytest.raises((PeerTimeout, PeerUnavailable)):
            await client.call("/test/Claim", b"", timeout_s=timeout_s)
        self.given_up.set()

    async def end_when_idle(self) -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        self.may_end.set()


@pytest.mark.parametrize("end", ["cancelled", "timed out", "connection lost"])
async def test_a_reply_that_nobody_waits_for_is_taken_back(end: str) -> None:
    claim = Claim()
    async with open_pair({"/test/Claim": Unary(claim.handle)}) as client, trio.open_nursery() as nursery:
        nursery.start_soon(claim.ask, client, 0.2 if end == "timed out" else GENEROUS_S)
        await claim.begun.wait()
        if end == "cancelled":
            nursery.cancel_scope.cancel()
        elif end == "connection lost":
            assert client._protocol is not None
            client._protocol.connection.transport.abort()
        with trio.CancelScope(shield=True):
            if end == "timed out":
                await claim.given_up.wait()
            await claim.end_when_idle()
            await claim.taken_back.wait()


async def test_a_reply_that_comes_too_late_for_a_stop_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taskd.rpc.server.ANSWERS_S", 0)
    claim = Claim()
    async with aio.open_loop(), trio.open_nursery() as nursery:
        async with serve({"/test/Claim": Unary(claim.handle)}, "127.0.0.1", 0) as port:
            client = await nursery.start(open_client, port)
            nursery.start_soon(claim.ask, client, GENEROUS_S)
            await claim.begun.wait()
            nursery.start_soon(claim.end_when_idle)
        assert claim.taken_back.is_set()
        nursery.cancel_scope.cancel()


async def open_client(port: int, task_status: trio.TaskStatus[Client]) -> None:
    async with connect(f"127.0.0.1:{port}") as client:
        task_status.started(client)
        await trio.sleep_forever()
