"""Push delivery as the daemon puts it together: over mutual TLS, signed, to a worker that looks at both."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from taskd import aio
from taskd.activation.lifecycle import Status
from taskd.clock import SystemClock
from taskd.config.schema import BrokerConfig
from taskd.daemon.pushing import push_dispatch
from taskd.inflight.base import Arrival, Policy
from taskd.inflight.writer import open_inflight
from taskd.rpc import tls
from taskd.rpc.access import push_tls
from taskd.rpc.auth import Guard
from taskd.rpc.base import Unary
from taskd.rpc.server import serve
from taskd.wire.pushing import PUSH_TASK, encode_push
from taskd.wire.signing import Secrets

trustme = pytest.importorskip("trustme")

GENEROUS_S = 20.0
ARRIVAL = Arrival(
    "a", "ns", "task", "shop", None, 10, None, None, 0, False, False, "taskd", 0, 0, None, b"activation"
)


def write(folder: Path, name: str, *blobs: bytes) -> Path:
    (folder / name).write_bytes(b"".join(blobs))
    return folder / name


@pytest.mark.parametrize("secret", ["super secret", "wrong"])
async def test_a_worker_that_wants_certificates_and_signatures(tmp_path: Path, secret: str) -> None:
    authority = trustme.CA()
    ca = write(tmp_path, "ca.pem", authority.cert_pem.bytes())
    pairs = {
        name: (
            write(tmp_path, f"{name}.pem", *(blob.bytes() for blob in issued.cert_chain_pems)),
            write(tmp_path, f"{name}.key", issued.private_key_pem.bytes()),
        )
        for name, issued in (
            ("worker", authority.issue_cert("127.0.0.1")),
            ("broker", authority.issue_cert("broker-1")),
        )
    }
    got: list[bytes] = []

    async def take(request: bytes) -> bytes:
        got.append(request)
        return b""

    clock = SystemClock()
    async with (
        aio.open_loop(),
        serve(
            {PUSH_TASK: Unary(take)},
            "127.0.0.1",
            0,
            guard=Guard(Secrets(["the next one", "super secret"]), clock),
            tls=tls.server_context(*pairs["worker"], client_ca=ca),
        ) as port,
        open_inflight(tmp_path / "store.sqlite", clock, Policy(), inline=True) as inflight,
        trio.open_nursery() as nursery,
    ):
        certificate, key = pairs["broker"]
        config = BrokerConfig.model_validate(
            {
                "dispatch": {"mode": "push"},
                "push": {
                    "worker_map": {"shop": f"https://127.0.0.1:{port}"},
                    "tls": {"ca": ca, "certificate": certificate, "key": key},
                },
            }
        )
        context = push_tls(config.push)
        push = push_dispatch(config, clock, inflight, trio.Event(), Secrets([secret]), context)
        assert push is not None
        nursery.start_soon(push.run)
        moved = inflight.watch(Status.PROCESSING, Status.PENDING)
        await inflight.insert([ARRIVAL])
        with trio.fail_after(GENEROUS_S):
            await moved.wait()
            await moved.wait()
        if secret == "wrong":
            assert (inflight.counts(), got) == ({Status.PENDING: 1}, [])
            assert "Authentication failed" in push.troubles()[0]
        else:
            assert (inflight.counts(), got) == ({Status.PROCESSING: 1}, [encode_push(b"activation")])
        nursery.cancel_scope.cancel()


def test_pull_needs_none_of_it() -> None:
    assert push_dispatch(BrokerConfig(), SystemClock(), None, None, Secrets(), None) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    ["10.0.0.7:50053", "http://host", "ftp://host:1", "http://host:0", "http://host:1/path", "http://:1"],
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected http://HOST:PORT"):
        BrokerConfig.model_validate({"push": {"worker_map": {"shop": url}}})


def test_a_url_may_end_with_a_slash() -> None:
    config = BrokerConfig.model_validate(
        {"push": {"worker_map": {"shop": "http://[::1]:50053/", "": "http://w:1"}}}
    )
    assert config.push.worker_map == {"shop": "http://[::1]:50053", "": "http://w:1"}
