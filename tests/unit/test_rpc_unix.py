"""Calls over a Unix socket: who may open it, and what is found in its place."""

from __future__ import annotations

import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskd import aio
from taskd.errors import PeerUnavailable, StartupError
from taskd.rpc.base import Unary
from taskd.rpc.client import connect
from taskd.rpc.local import MAX_PATH_BYTES
from taskd.rpc.server import serve_unix

METHOD = "/test.Echo/Say"


async def echo(request: bytes) -> bytes:
    return request


@pytest.fixture
async def loop() -> AsyncIterator[None]:
    async with aio.open_loop():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "admin.sock"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else "(nothing)"


async def said(path: Path) -> bytes:
    async with connect(f"unix:{path}") as client:
        return await client.call(METHOD, b"hello", timeout_s=5)


async def test_calls_are_answered_and_the_socket_is_the_owners(loop: None, path: Path) -> None:
    async with serve_unix({METHOD: Unary(echo)}, path):
        assert await said(path) == b"hello"
        assert mode(path) == 0o600
    assert read(path) == "(nothing)"
    with pytest.raises(PeerUnavailable, match=r"admin\.sock: nobody answers"):
        await said(path)


async def test_a_stale_socket_is_replaced(loop: None, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # never listened on again: as a killed broker leaves it
    async with serve_unix({METHOD: Unary(echo)}, path):
        assert await said(path) == b"hello"


async def test_a_socket_in_use_is_left_alone(loop: None, path: Path) -> None:
    async with serve_unix({METHOD: Unary(echo)}, path):
        with pytest.raises(StartupError, match="another process listens") as refused:
            async with serve_unix({}, path):
                pass
        assert refused.value.exit_code == 75
        assert await said(path) == b"hello"


async def test_what_is_no_socket_is_left_alone(loop: None, path: Path) -> None:
    write(path, "precious")
    with pytest.raises(StartupError, match="something else"):
        async with serve_unix({}, path):
            pass
    assert read(path) == "precious"


async def test_a_socket_that_was_replaced_meanwhile_is_not_removed(loop: None, path: Path) -> None:
    async with serve_unix({}, path):
        write(path, "another's")
    assert read(path) == "another's"


@pytest.mark.parametrize("where", ["x" * MAX_PATH_BYTES, "missing/admin.sock"])
async def test_a_path_that_cannot_be_is_a_startup_error(loop: None, tmp_path: Path, where: str) -> None:
    with pytest.raises(StartupError, match=r"admin\.socket") as refused:
        async with serve_unix({}, tmp_path / where):
            pass
    assert refused.value.exit_code == 73
