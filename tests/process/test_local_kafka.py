"""The broker for tests ends with whoever started it."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from taskd.testing.kafka import CLUSTER_VARIABLE, open_local_kafka

STARTER = """
from taskd.testing.kafka import open_local_kafka
with open_local_kafka() as address:
    print(address, flush=True)
    input()
"""

pytestmark = [pytest.mark.process, pytest.mark.kafka]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:  # refused, or reset while its process is dying
        return False
    return True


def test_it_ends_with_the_block() -> None:
    with open_local_kafka() as address:
        assert answers(address)
    assert not answers(address)


def test_a_named_cluster_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLUSTER_VARIABLE, "kafka.example:9092")
    with open_local_kafka() as address:
        assert address == "kafka.example:9092"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it with its parent on Linux only")
def test_it_ends_with_a_killed_parent() -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    assert starter.stdin is not None
    with starter.stdout, starter.stdin:
        address = starter.stdout.readline().strip()
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            starter.kill()
            starter.wait()
            with suppress(ConnectionResetError):  # closed by its end, one way or the other
                assert connection.recv(1) == b""
    assert any(not answers(address) for _ in range(10_000))  # a dying process closes one by one
