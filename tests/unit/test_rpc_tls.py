"""TLS and mutual TLS between our server and our client, and every way the files can be wrong."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from taskd import aio
from taskd.errors import PeerUnavailable, StartupError
from taskd.rpc import tls
from taskd.rpc.access import Access
from taskd.rpc.base import Duplex, Stream, Unary
from taskd.rpc.client import connect
from taskd.rpc.limits import HELLO_S
from taskd.rpc.server import serve
from taskd.wire.signing import Secrets

trustme = pytest.importorskip("trustme")

GENEROUS_S = 20.0
BIG = bytes(range(256)) * 20_000  # more than a TLS record, a window and the socket's buffers hold


class Files:
    """An authority, a server's and a client's certificate, and those of a stranger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority, stranger = trustme.CA(), trustme.CA()
        self.ca = self._write("ca.pem", authority.cert_pem)
        self.stranger_ca = self._write("stranger-ca.pem", stranger.cert_pem)
        self.server = self._pair("server", authority.issue_cert("127.0.0.1", "localhost"))
        self.client = self._pair("client", authority.issue_cert("worker-1"))
        self.stranger = self._pair("stranger", stranger.issue_cert("127.0.0.1"))
        self.other_name = self._pair("other", authority.issue_cert("broker.example.org"))

    def _pair(self, name: str, certificate: object) -> tuple[Path, Path]:
        chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)  # type: ignore[attr-defined]
        key = certificate.private_key_pem.bytes()  # type: ignore[attr-defined]
        return self.write(f"{name}.pem", chain), self.write(f"{name}.key", key)

    def _write(self, name: str, blob: object) -> Path:
        return self.write(name, blob.bytes())  # type: ignore[attr-defined]

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


async def echo(request: bytes) -> bytes:
    return request


async def echo_all(stream: Duplex) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


SERVICES = {"/test/Echo": Unary(echo), "/test/Stream": Stream(echo_all)}


def reached_with(context: ssl.SSLContext | None) -> Access:
    return Access(Secrets(), context)


@pytest.mark.parametrize("mutual", [False, True])
async def test_calls_and_streams_over_tls(files: Files, mutual: bool) -> None:
    context = tls.server_context(*files.server, files.ca if mutual else None)
    ours = files.client if mutual else (None, None)
    access = reached_with(tls.client_context(files.ca, *ours))
    with trio.fail_after(GENEROUS_S):
        async with (
            aio.open_loop(),
            serve(SERVICES, "127.0.0.1", 0, tls=context) as port,
            connect(f"127.0.0.1:{port}", access) as client,
        ):
            assert await client.call("/test/Echo", BIG, timeout_s=GENEROUS_S) == BIG
            async with client.stream("/test/Stream") as stream:
                for _ in range(20):
                    await stream.send(b"x" * 100_000)
                    assert await stream.receive() == b"x" * 100_000
            protocol = client._protocol
            assert protocol is not None
            channel = protocol.connection.transport.get_extra_info("ssl_object")
            assert channel.selected_alpn_protocol() == "h2"
            assert channel.version() in ("TLSv1.2", "TLSv1.3")


async def test_a_renewed_certificate_counts_for_the_next_connection(files: Files) -> None:
    context = tls.server_context(*files.stranger)
    access = reached_with(tls.client_context(files.ca))
    with trio.fail_after(GENEROUS_S):
        async with aio.open_loop(), serve(SERVICES, "127.0.0.1", 0, tls=context) as port:
            address = f"127.0.0.1:{port}"
            async with connect(address, access) as client:
                with pytest.raises(PeerUnavailable):
                    await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S)
            context.renew(tls.server_context(*files.server))
            async with connect(address, access) as client:
                assert await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S) == b"x"


async def test_an_authority_that_was_taken_away_is_not_trusted_any_more(files: Files) -> None:
    context = tls.server_context(*files.server, files.stranger_ca)
    access = reached_with(tls.client_context(files.ca, *files.stranger))
    with trio.fail_after(GENEROUS_S):
        async with aio.open_loop(), serve(SERVICES, "127.0.0.1", 0, tls=context) as port:
            address = f"127.0.0.1:{port}"
            async with connect(address, access) as client, connect(address, access) as later:
                assert await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S) == b"x"
                context.renew(tls.server_context(*files.server, files.ca))
                with pytest.raises(PeerUnavailable):
                    await later.call("/test/Echo", b"x", timeout_s=GENEROUS_S)
                assert await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S) == b"x"  # connected before
            async with connect(address, reached_with(tls.client_context(files.ca, *files.client))) as client:
                assert await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S) == b"x"


async def test_a_client_shows_what_was_renewed_when_it_connects_again(files: Files) -> None:
    ours = tls.client_context(files.ca, *files.stranger)
    with trio.fail_after(GENEROUS_S):
        async with (
            aio.open_loop(),
            serve(SERVICES, "127.0.0.1", 0, tls=tls.server_context(*files.server, files.ca)) as port,
            connect(f"127.0.0.1:{port}", reached_with(ours)) as client,
        ):
            with pytest.raises(PeerUnavailable):
                await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S)
            ours.renew(tls.client_context(files.ca, *files.client))
            assert await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S) == b"x"


WRONG: dict[str, Callable[[Files], tuple[ssl.SSLContext, ssl.SSLContext | None]]] = {
    "server of a stranger": lambda f: (tls.server_context(*f.stranger), tls.client_context(f.ca)),
    "server of another name": lambda f: (tls.server_context(*f.other_name), tls.client_context(f.ca)),
    "not an authority of this machine": lambda f: (tls.server_context(*f.server), tls.client_context()),
    "client without certificate": lambda f: (
        tls.server_context(*f.server, f.ca),
        tls.client_context(f.ca),
    ),
    "client of a stranger": lambda f: (
        tls.server_context(*f.server, f.ca),
        tls.client_context(f.ca, *f.stranger),
    ),
    "client in the clear": lambda f: (tls.server_context(*f.server), None),
}


@pytest.mark.parametrize("case", WRONG)
async def test_who_is_not_known_is_not_served(files: Files, case: str) -> None:
    server, wrong = WRONG[case](files)
    called = False

    async def never(request: bytes) -> bytes:
        nonlocal called
        called = True
        return request

    async with aio.open_loop(), serve({"/test/Echo": Unary(never)}, "127.0.0.1", 0, tls=server) as port:
        async with connect(f"127.0.0.1:{port}", reached_with(wrong)) as client:
            with pytest.raises(PeerUnavailable):
                await client.call("/test/Echo", b"secret", timeout_s=GENEROUS_S)
        assert not called
        right = reached_with(tls.client_context(files.ca, *files.client))
        if case not in ("server of a stranger", "server of another name"):
            async with connect(f"127.0.0.1:{port}", right) as client:
                assert await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S) == b"x"


async def test_a_client_with_tls_says_what_a_server_without_it_answered(files: Files) -> None:
    async with (
        aio.open_loop(),
        serve(SERVICES, "127.0.0.1", 0) as port,
        connect(f"127.0.0.1:{port}", reached_with(tls.client_context(files.ca))) as client,
    ):
        with pytest.raises(PeerUnavailable, match=rf"127\.0\.0\.1:{port}"):
            await client.call("/test/Echo", b"", timeout_s=GENEROUS_S)


async def test_old_versions_are_refused(files: Files) -> None:
    context = tls.server_context(*files.server)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert tls.client_context(files.ca).minimum_version == ssl.TLSVersion.TLSv1_2


async def test_handshakes_that_never_end_hold_nothing_up(files: Files) -> None:
    """A stop does not wait for them, and others are served meanwhile."""
    context = tls.server_context(*files.server)
    access = reached_with(tls.client_context(files.ca))
    silent = []
    with trio.fail_after(HELLO_S):
        async with aio.open_loop(), serve(SERVICES, "127.0.0.1", 0, tls=context) as port:
            silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
            for number, connection in enumerate(silent):
                connection.send(b"\x16\x03\x01\x02\x00"[: number % 6])
            async with connect(f"127.0.0.1:{port}", access) as client:
                assert await client.call("/test/Echo", b"x", timeout_s=GENEROUS_S) == b"x"
    for connection in silent:
        connection.close()


def test_every_wrong_file_is_a_sentence(files: Files) -> None:
    missing = files.folder / "missing.pem"
    noise = files.write("noise.pem", b"no certificate")
    certificate, key = files.server
    cases: list[tuple[Callable[[], ssl.SSLContext], str]] = [
        (lambda: tls.server_context(missing, key), f"certificate {missing} cannot be read: No such file"),
        (lambda: tls.server_context(certificate, missing), f"key {missing} cannot be read: No such file"),
        (lambda: tls.server_context(certificate, files.folder), "cannot be read: Is a directory"),
        (
            lambda: tls.server_context(certificate, files.client[1]),
            "does not belong to the first certificate",
        ),
        (lambda: tls.server_context(noise, key), f"expected a PEM certificate in {noise}"),
        (lambda: tls.server_context(certificate, noise), f"PEM key in {noise}"),
        (lambda: tls.server_context(certificate, key, missing), f"CA certificates {missing} cannot be read"),
        (lambda: tls.server_context(certificate, key, noise), f"expected PEM certificates in {noise}"),
        (lambda: tls.client_context(missing), f"CA certificates {missing} cannot be read"),
        (lambda: tls.client_context(files.ca, certificate), "set both or neither"),
    ]
    for make, sentence in cases:
        with pytest.raises(StartupError) as caught:
            make()
        assert sentence in str(caught.value)
        assert caught.value.exit_code == 78


def test_a_key_with_a_passphrase_does_not_ask_for_it(files: Files) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    key = serialization.load_pem_private_key(files.server[1].read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    with pytest.raises(StartupError, match="passphrase"):
        tls.server_context(files.server[0], files.write("locked.key", locked))
