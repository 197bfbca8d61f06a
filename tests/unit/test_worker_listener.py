"""Where a pool is pushed to: who may call, over what, and how much a call may bring."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog.testing

from taskd import aio
from taskd.config.schema import ListenTlsSection, PoolListenSection, PoolSection
from taskd.errors import PeerUnavailable, Refused, StartupError
from taskd.rpc import tls
from taskd.rpc.access import Access
from taskd.rpc.base import Unary
from taskd.rpc.client import connect
from taskd.rpc.health import CHECK, health_services
from taskd.wire.pushing import MAX_PUSH_BYTES, PUSH_TASK
from taskd.wire.signing import Secrets
from taskd.worker.push import listener

trustme = pytest.importorskip("trustme")

SECRET, FORMER, OTHER = "super secret", "the one before", "another one"


def pool(files: Path | None = None) -> PoolSection:
    section = None
    if files is not None:
        pem = files / "worker.pem"
        section = ListenTlsSection(certificate=pem, key=pem, client_ca=files / "ca.pem")
    listen = PoolListenSection(port=0, tls=section)
    return PoolSection.model_validate({"protocol": "push", "secrets": [SECRET, FORMER], "listen": listen})


@asynccontextmanager
async def listening(config: PoolSection) -> AsyncIterator[str]:
    async def size(request: bytes) -> bytes:
        return str(len(request)).encode()

    services = {PUSH_TASK: Unary(size), **health_services(lambda service: False)}
    with structlog.testing.capture_logs() as lines:
        async with listener(config)(services):
            (said,) = [line for line in lines if line["event"] == "pool listens"]
            yield str(said["push"])


async def push(address: str, access: Access, body: bytes = b"task") -> str:
    async with connect(address, access) as client:
        try:
            return (await client.call(PUSH_TASK, body, timeout_s=20)).decode()
        except Refused as error:
            return error.code


async def test_calls_are_signed_with_a_secret_of_the_pool_but_for_health() -> None:
    async with aio.open_loop(), listening(pool()) as address:
        for secret in (SECRET, FORMER):
            assert await push(address, Access(Secrets([secret]))) == "4"
        for access in (Access(), Access(Secrets([OTHER]))):
            assert await push(address, access) == "UNAUTHENTICATED"
        async with connect(address) as client:
            assert await client.call(CHECK, b"", timeout_s=20)


async def test_a_push_may_be_large_and_not_larger() -> None:
    access = Access(Secrets([SECRET]))
    async with aio.open_loop(), listening(pool()) as address:
        assert await push(address, access, bytes(12_000_000)) == "12000000"
        assert await push(address, access, bytes(MAX_PUSH_BYTES + 1)) == "RESOURCE_EXHAUSTED"


async def test_with_tls_the_broker_shows_its_certificate_too(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("worker", "broker"):
        pem = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
        pem.write_to_path(tmp_path / f"{name}.pem")
    ca, own = tmp_path / "ca.pem", tmp_path / "broker.pem"
    async with aio.open_loop(), listening(pool(tmp_path)) as address:
        known = Access(Secrets([SECRET]), tls.client_context(ca, own, own))
        assert await push(address, known) == "4"
        assert await push(address, Access(Secrets([OTHER]), known.tls)) == "UNAUTHENTICATED"
        for stranger in (None, tls.client_context(ca, None, None)):
            with pytest.raises(PeerUnavailable):
                await push(address, Access(Secrets([SECRET]), stranger))


def test_files_that_cannot_be_used_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"worker\.pem"):
        listener(pool(tmp_path))
