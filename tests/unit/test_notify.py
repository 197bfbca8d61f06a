"""What systemd is told, over the datagram socket it names."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from taskd.activation.lifecycle import Event, Status
from taskd.daemon import notify, status
from taskd.inflight.sqlite import Changes


@pytest.fixture
def manager(tmp_path):
    """systemd's end: its environment, and a function that takes what was said."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.setblocking(False)
        path = tmp_path / "notify"
        listening.bind(str(path))

        def heard() -> list[bytes]:
            found = []
            while True:
                try:
                    found.append(listening.recv(100))
                except BlockingIOError:
                    return found

        yield {"NOTIFY_SOCKET": str(path)}, heard


def test_a_state_is_told(manager):
    environ, heard = manager
    assert notify.tell("READY=1", environ)
    assert heard() == [b"READY=1"]


def test_an_abstract_name():
    name = f"taskd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        assert notify.tell("STOPPING=1", {"NOTIFY_SOCKET": f"@{name}"})
        assert listening.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["", "vsock:2:1", "/nonexistent/notify"])
def test_nobody_listens(address):
    assert not notify.tell("READY=1", {"NOTIFY_SOCKET": address})


async def test_pings_stop_while_something_is_stuck(manager, autojump_clock):
    environ, heard = manager
    environ["WATCHDOG_USEC"] = "90000000"
    trouble = ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notify.keep_watchdog, lambda: trouble, environ)
        await trio.sleep(80)
        assert heard() == [b"WATCHDOG=1"] * 3
        trouble = "expire: no progress for 31 s"
        await trio.sleep(300)
        assert heard() == []
        trouble = ""
        await trio.sleep(31)
        assert heard() == [b"WATCHDOG=1"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("usec", ["", "0", "soon"])
async def test_no_watchdog_no_pings(usec):
    await notify.keep_watchdog(lambda: "", {"WATCHDOG_USEC": usec})


async def test_a_watchdog_of_another_process_is_not_ours():
    await notify.keep_watchdog(lambda: "", {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})


async def test_the_status_is_told_when_it_changed_and_not_too_often(manager, autojump_clock):
    environ, heard = manager
    lines = iter(["a", "a", "b", "b"])
    line = ""

    def describe() -> str:
        nonlocal line
        line = next(lines, line)
        return line

    async with trio.open_nursery() as nursery:
        nursery.start_soon(status.keep_status, describe, environ)
        await trio.sleep(1)
        assert heard() == [b"STATUS=a"]
        await trio.sleep(status.EVERY_S)
        assert heard() == []
        await trio.sleep(status.EVERY_S)
        assert heard() == [b"STATUS=b"]
        await trio.sleep(1_000)
        assert heard() == []
        nursery.cancel_scope.cancel()


async def test_nobody_listens_to_the_status():
    await status.keep_status(lambda: pytest.fail("nobody asked"), {})


@dataclass
class Part:
    capacity: tuple[int, int] = (4, 0)
    running: int = 3
    waiting: int = 12
    ended: int = 0
    brokers: tuple[int, int] = (2, 2)


async def test_a_worker_s_line(autojump_clock):
    part, stop = Part(), trio.Event()
    describe = status.WorkerStatus(part, stop)
    part.ended = 850
    await trio.sleep(10)
    assert describe() == "4 slots, 3 running, 12 waiting, 85 tasks/s, 2 of 2 brokers connected"
    stop.set()
    part.capacity = (4, 100)
    assert describe().startswith("draining: 4 slots and 100 async, 3 running, 12 waiting, 0 tasks/s")


async def test_a_broker_s_line(autojump_clock):
    counts = {Status.PENDING: 5, Status.DELAYED: 2, Status.PROCESSING: 3, Status.GONE: 99}
    describe = status.BrokerStatus(lambda: counts, lambda: 2, trio.Event())
    changes = Changes()
    changes.events[Event.ARRIVED, Status.PENDING] = 100
    changes.events[Event.ARRIVED_DELAYED, Status.DELAYED] = 20
    changes.events[Event.HANDED_OUT, Status.PROCESSING] = 70
    changes.events[Event.COMPLETED, Status.COMPLETE] = 40
    changes.events[Event.SETTLED, Status.GONE] = 40
    describe.observe(changes)
    await trio.sleep(4)
    assert describe() == "7 waiting, 3 with workers, 30/s come, 10/s end, 2 workers connected"
