"""What systemd is told, over the datagram socket it names."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing

from taskd.daemon import notify


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
