"""Who may call: signatures before handlers, rotation, replays, services with secrets of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from taskd import aio
from taskd.clock import Now
from taskd.errors import PeerUnavailable, Refused
from taskd.rpc.access import Access
from taskd.rpc.auth import WINDOW_MS, Guard, Nonces, Signer
from taskd.rpc.base import Duplex, Stream, Unary
from taskd.rpc.client import Client, connect
from taskd.rpc.health import CHECK, health_services
from taskd.rpc.limits import Seldom
from taskd.rpc.server import serve
from taskd.wire.signing import PROOF_HEADER, SIGNATURE_HEADER, Secrets

GENEROUS_S = 20.0
FOREIGN, OWN, WORK = "/sentry_protos.X/Call", "/taskd.v1.X/Call", "/taskd.v1.X/Work"
ORDER = "/taskd.v1.AdminService/Order"


class HandClock:
    """Moved by hand; ten minutes after it was started."""

    def __init__(self) -> None:
        self.wall_ms = 1_767_225_600_000
        self.mono_ms = 0

    def now(self) -> Now:
        return Now(self.wall_ms, self.mono_ms)

    def pass_by(self, ms: int) -> None:
        self.wall_ms += ms
        self.mono_ms += ms


class Handlers:
    def __init__(self) -> None:
        self.called: list[bytes] = []

    async def call(self, request: bytes) -> bytes:
        self.called.append(request)
        return request

    async def work(self, stream: Duplex) -> None:
        self.called.append(b"stream")
        await stream.send(b"welcome")

    @property
    def services(self) -> dict[str, Unary | Stream]:
        paths = {path: Unary(self.call) for path in (FOREIGN, OWN, ORDER)}
        return {**paths, WORK: Stream(self.work), **health_services(lambda name: True)}


@asynccontextmanager
async def open_served(handlers: Handlers, guard: Guard) -> AsyncIterator[str]:
    async with aio.open_loop(), serve(handlers.services, "127.0.0.1", 0, guard=guard) as port:
        yield f"127.0.0.1:{port}"


async def work(client: Client) -> bytes | None:
    async with client.stream(WORK) as stream:
        return await stream.receive()


def guard_of(*secrets: str, clock: HandClock | None = None, orders: tuple[str, ...] = ()) -> Guard:
    clock = clock or HandClock()
    guard = Guard(Secrets(secrets), clock, of_services={"taskd.v1.AdminService": Secrets(orders)})
    clock.pass_by(600_000)
    return guard


def signed(*secrets: str) -> Access:
    return Access(Secrets(secrets))


async def refused(client: Client, path: str) -> str:
    with pytest.raises(Refused) as caught:
        await (work(client) if path == WORK else client.call(path, b"x", timeout_s=GENEROUS_S))
    assert caught.value.message == "Authentication failed"
    return caught.value.code


async def test_calls_are_checked_before_their_handlers() -> None:
    handlers, clock = Handlers(), HandClock()
    async with open_served(handlers, guard_of("right", clock=clock)) as address:
        for access in (Access(), signed("wrong"), signed("wrong", "right")):
            async with connect(address, access, clock=clock) as client:
                for path in (FOREIGN, OWN, WORK):
                    assert await refused(client, path) == "UNAUTHENTICATED"
                await client.call(CHECK, b"", timeout_s=GENEROUS_S)  # health is for everybody
        assert handlers.called == []
        async with connect(address, signed("right"), clock=clock) as client:
            assert await client.call(FOREIGN, b"one", timeout_s=GENEROUS_S) == b"one"
            assert await client.call(OWN, b"two", timeout_s=GENEROUS_S) == b"two"
            assert await work(client) == b"welcome"
    assert handlers.called == [b"one", b"two", b"stream"]


async def test_a_secret_is_rotated_without_a_gap() -> None:
    """Brokers learn the new one, callers change over, brokers forget the old one."""
    handlers, clock = Handlers(), HandClock()
    for accepted, given, code in (
        (("old", "new"), "old", None),
        (("old", "new"), "new", None),
        (("new",), "new", None),
        (("new",), "old", "UNAUTHENTICATED"),
    ):
        async with (
            open_served(handlers, guard_of(*accepted, clock=clock)) as address,
            connect(address, signed(given), clock=clock) as client,
        ):
            for path in (FOREIGN, OWN, WORK):
                if code is not None:
                    assert await refused(client, path) == code
                elif path != WORK:
                    assert await client.call(path, b"x", timeout_s=GENEROUS_S) == b"x"


async def test_who_may_work_may_not_order() -> None:
    clock = HandClock()
    guard = guard_of("workers", clock=clock, orders=("operators",))
    async with open_served(Handlers(), guard) as address:
        async with connect(address, signed("workers"), clock=clock) as client:
            assert await refused(client, ORDER) == "UNAUTHENTICATED"
        async with connect(address, signed("operators"), clock=clock) as client:
            assert await client.call(ORDER, b"x", timeout_s=GENEROUS_S) == b"x"
            assert await refused(client, OWN) == "UNAUTHENTICATED"


async def test_a_call_without_a_signature_is_refused_before_its_body_is_read() -> None:
    async with (
        open_served(Handlers(), guard_of("right")) as address,
        connect(address) as client,
        client.stream(FOREIGN) as stream,
    ):
        with pytest.raises(Refused, match="Authentication failed"):
            await stream.receive()  # nothing was sent but the head


@pytest.mark.parametrize("path", [OWN, WORK])
def test_a_captured_call_cannot_be_sent_again(path: str) -> None:
    clock = HandClock()
    guard, signer = guard_of("right", clock=clock), Signer(Secrets(["right"]), clock)
    body = None if path == WORK else b"x"
    headers = dict(signer.headers(path, body))
    guard.check(path, headers, body)
    for later_ms in (0, 1, WINDOW_MS - 1, WINDOW_MS, 86_400_000):
        clock.pass_by(later_ms)
        with pytest.raises(Refused, match="Authentication failed"):
            guard.check(path, headers, body)
    guard.check(path, dict(signer.headers(path, body)), body)


def test_a_captured_call_cannot_be_sent_to_the_next_process() -> None:
    clock = HandClock()
    headers = dict(Signer(Secrets(["right"]), clock).headers(OWN, b"x"))
    clock.pass_by(1_000)
    restarted = Guard(Secrets(["right"]), clock)
    with pytest.raises(Refused, match="sign again") as caught:
        restarted.check(OWN, headers, b"x")
    assert caught.value.code == "UNAVAILABLE"  # whoever signed it signs anew, and comes again
    clock.pass_by(1)
    restarted.check(OWN, dict(Signer(Secrets(["right"]), clock).headers(OWN, b"x")), b"x")


@pytest.mark.parametrize("off_ms", [-WINDOW_MS, -30_000, 30_000, WINDOW_MS])
def test_clocks_may_differ_by_a_minute(off_ms: int) -> None:
    clock, caller = HandClock(), HandClock()
    guard = guard_of("right", clock=clock)
    caller.wall_ms = clock.wall_ms + off_ms
    guard.check(OWN, dict(Signer(Secrets(["right"]), caller).headers(OWN, b"")), b"")
    caller.wall_ms += 1_000 if off_ms > 0 else -1_000
    if abs(off_ms) == WINDOW_MS:
        with pytest.raises(Refused, match="Authentication failed"):
            guard.check(OWN, dict(Signer(Secrets(["right"]), caller).headers(OWN, b"")), b"")


def test_the_memory_of_nonces_is_bounded_and_refuses_rather_than_forgets() -> None:
    nonces = Nonces(window_ms=1_000, most=100)
    assert all(nonces.take(f"{number:032x}", 10_000) for number in range(100))
    assert not nonces.has_room(10_000)
    assert not nonces.take(f"{5:032x}", 10_000)
    assert not nonces.has_room(11_000)
    assert nonces.has_room(12_000)
    assert len(nonces) == 0


def test_each_scheme_has_its_header() -> None:
    signer = Signer(Secrets(["right"]), HandClock())
    assert [name for name, _ in signer.headers(FOREIGN, b"")] == [SIGNATURE_HEADER]
    assert [name for name, _ in signer.headers(OWN, b"")] == [PROOF_HEADER]
    assert signer.headers(CHECK, b"") == []
    assert Signer(Secrets(), HandClock()).headers(OWN, b"") == []


async def test_a_full_memory_of_nonces_is_told_as_unavailable() -> None:
    clock = HandClock()
    guard = guard_of("right", clock=clock)
    guard._nonces = Nonces(most=1)
    async with (
        open_served(Handlers(), guard) as address,
        connect(address, signed("right"), clock=clock) as client,
    ):
        await client.call(OWN, b"", timeout_s=GENEROUS_S)
        with pytest.raises(PeerUnavailable, match="try again"):
            await client.call(OWN, b"", timeout_s=GENEROUS_S)
        await trio.lowlevel.checkpoint()


def test_refusals_do_not_fill_the_log() -> None:
    seldom = Seldom()
    assert [seldom.say(second / 10) for second in range(12)] == [0, *[None] * 9, 9, None]
