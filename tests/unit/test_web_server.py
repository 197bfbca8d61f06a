"""The pages on a real loopback port."""

from __future__ import annotations

import json
import socket
import ssl
from contextlib import asynccontextmanager

import pytest
import trio

from taskd.config.schema import HttpSection, ListenTlsSection
from taskd.errors import StartupError
from taskd.rpc.access import http_tls
from taskd.web import server
from taskd.web.health import PartHealth
from taskd.web.server import serve_http


class Parts(dict[str, PartHealth]):
    def parts(self):
        return self


@asynccontextmanager
async def serving(health):
    async with trio.open_nursery() as nursery:
        port = await nursery.start(
            lambda task_status: serve_http("127.0.0.1", 0, health=health, task_status=task_status)
        )
        yield port
        nursery.cancel_scope.cancel()


async def get(port: int, path: str) -> tuple[int, str, str]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join([chunk async for chunk in stream]).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


async def test_readyz_follows_the_parts():
    health = Parts(store=PartHealth(True, "committed 0.2 s ago"))
    async with serving(health) as port:
        status, _, body = await get(port, "/readyz")
        assert (status, json.loads(body)["status"]) == (200, "ready")
        health["ingest"] = PartHealth(False, "Kafka does not answer")
        status, _, body = await get(port, "/readyz")
        assert status == 503
        assert json.loads(body) == {
            "status": "not ready",
            "parts": {
                "store": {"ok": True, "reason": "committed 0.2 s ago"},
                "ingest": {"ok": False, "reason": "Kafka does not answer"},
            },
        }
        assert (await get(port, "/healthz"))[::2] == (200, '{"status":"ok"}')


async def test_a_broken_check_is_not_ready():
    class Broken:
        def parts(self):
            raise OSError("no such part")

    async with serving(Broken()) as port:
        status, _, body = await get(port, "/readyz")
    assert status == 503
    assert "no such part" in json.loads(body)["parts"]["health"]["reason"]


async def test_metrics_index_and_what_is_not_there():
    async with serving(Parts()) as port:
        status, head, body = await get(port, "/metrics")
        assert (status, "text/plain; version=0.0.4" in head) == (200, True)
        assert "taskd_commit_seconds_bucket" in body
        assert "/readyz" in (await get(port, "/"))[2]
        assert (await get(port, "/nope"))[0] == 404


async def test_stops_at_once_under_an_idle_keep_alive_client():
    health = Parts()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            async with serving(health) as port:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"200" in await stream.receive_some()
            # The server is gone, and the client was told.
            async for _ in stream:
                pass
            await stream.aclose()
            nursery.cancel_scope.cancel()


async def test_stops_under_a_client_in_the_middle_of_a_request():
    with trio.fail_after(20):
        async with serving(Parts()) as port:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(b"GET /healthz HT")
            await get(port, "/healthz")
        await stream.aclose()


@pytest.mark.slow
async def test_stops_under_a_client_that_never_reads(monkeypatch):
    monkeypatch.setattr(server.make_app.__globals__["metrics"], "render", lambda: b"x" * 50_000_000)
    with trio.fail_after(30):
        async with serving(Parts()) as port:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            await stream.receive_some(10)
        await stream.aclose()


async def test_a_taken_port_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            StartupError, match=rf"127\.0\.0\.1:{port}: another program uses the port"
        ) as caught:
            await serve_http("127.0.0.1", port, health=Parts())
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1"])
async def test_an_address_that_is_not_ours_is_a_sentence(host):
    with pytest.raises(StartupError, match=r"HTTP cannot listen on .*http\.host") as caught:
        await serve_http(host, 0, health=Parts())
    assert caught.value.exit_code == 69


async def test_the_pages_over_tls(tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    both = tmp_path / "both.pem"
    section = HttpSection(tls=ListenTlsSection(certificate=both, key=both))
    context = http_tls(section)
    trusting = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    async with trio.open_nursery() as nursery:
        port = await nursery.start(
            lambda task_status: serve_http("127.0.0.1", 0, Parts(), tls=context, task_status=task_status)
        )
        with pytest.raises(trio.BrokenResourceError):
            async with await trio.open_ssl_over_tcp_stream("127.0.0.1", port) as stranger:
                await stranger.do_handshake()
        async with await trio.open_ssl_over_tcp_stream(
            "127.0.0.1", port, ssl_context=trusting, https_compatible=True
        ) as stream:
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            answer = b"".join([chunk async for chunk in stream])
        assert answer.startswith(b"HTTP/1.1 200")
        trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(both)
        context.renew(http_tls(section))
        with pytest.raises(trio.BrokenResourceError):  # nobody it knows signed the new one
            async with await trio.open_ssl_over_tcp_stream("127.0.0.1", port, ssl_context=trusting) as later:
                await later.do_handshake()
        nursery.cancel_scope.cancel()
