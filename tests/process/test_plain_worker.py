"""Our worker by the published protocol: it fetches from a running broker, or is pushed to by it."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from daemons import WITHIN_S, free_port, install_plugin, open_daemons, python_path
from kill_scene import Scene, make, open_scene

from taskd import aio
from taskd.errors import PeerUnavailable, Refused
from taskd.rpc.access import Access
from taskd.rpc.client import Client, connect
from taskd.rpc.health import CHECK
from taskd.wire import pushing
from taskd.wire.generated.grpc.health.v1 import HealthCheckRequest, HealthCheckResponse
from taskd.wire.generated.sentry_protos.taskbroker.v1 import TaskActivation
from taskd.wire.signing import Secrets

pytestmark = [pytest.mark.process, pytest.mark.slow]

SECRET, OTHER = "super secret", "another one"
SERVING, NOT_SERVING = 1, 2


def pool(protocol: str, *, port: int = 0, secret: str = SECRET, **more: str) -> dict[str, str]:
    """The worker's environment."""
    settings = {"PROTOCOL": protocol, "SECRETS": json.dumps([secret]), "LISTEN__PORT": str(port), **more}
    return {f"TASKD_POOLS__DEFAULT__{name}": value for name, value in settings.items()}


@asynccontextmanager
async def open_signed(
    folder: Path, push_port: int | None = None, quiet_s: str = "30"
) -> AsyncIterator[Scene]:
    # No lease is judged for long after a start: what workers keep must do.
    settings = {"TASKD_RPC__SECRETS": json.dumps([SECRET]), "TASKD_UPKEEP__STARTUP_QUIET_S": quiet_s}
    if push_port is not None:
        settings |= {
            "TASKD_DISPATCH__MODE": "push",
            "TASKD_PUSH__WORKER_MAP": json.dumps({"kill-tests": f"http://127.0.0.1:{push_port}"}),
        }
    async with open_scene(folder, **settings) as scene:
        scene.secret = SECRET
        yield scene


async def recorded(scene: Scene, lines: int) -> None:
    """Until tasks have written so many lines."""
    with trio.fail_after(60):
        while len(scene.lines()) < lines:  # noqa: ASYNC110  # files give no event to wait for
            await trio.sleep(0.02)


@pytest.mark.parametrize("protocol", ["pull", "push"])
async def test_every_kind_of_task_ends_as_it_should_and_results_outlast_a_killed_broker(
    tmp_path: Path, protocol: str
) -> None:
    port = free_port()
    async with open_signed(tmp_path, port if protocol == "push" else None) as scene:
        broker = scene.broker()
        worker = scene.worker(slots=3, more=pool(protocol, port=port, APPLICATION="kill-tests"))
        assert (await worker.said("pool starts"))["protocol"] == protocol
        rng = random.Random(5)
        naps = [make(rng, "nap", seconds=0.7) for _ in range(3)]
        await scene.produce_these(*naps)
        for made, _ in naps:
            await scene.started(made.key)
        await broker.killed()
        await worker.said("reporting results failed, trying again")
        broker = scene.broker()
        kinds = ["noop", "retried", "fails", "fails_once", "once", "delayed", "unknown", "nap"]
        await scene.produce_these(*[make(rng, kind) for kind in kinds * 8])
        history = await scene.close_the_books(broker, worker)
        assert history.duplicates() == 0
        assert {history.statuses[made.id].outcome for made, _ in naps} == {"complete"}


@pytest.mark.long
async def test_a_fetching_worker_is_killed_and_its_tasks_run_again(tmp_path: Path) -> None:
    async with open_signed(tmp_path, quiet_s="0.5") as scene:
        broker = scene.broker()
        worker = scene.worker(slots=4, more=pool("pull"))
        await scene.produce(random.Random(7), 200, trio.Event())
        for lines in (60, 150):
            await recorded(scene, lines)
            await worker.killed()
            worker = scene.worker(slots=4, more=pool("pull"))
        await scene.close_the_books(broker, worker)


async def test_a_fetching_worker_with_a_wrong_secret_gets_nothing(tmp_path: Path) -> None:
    async with open_signed(tmp_path) as scene:
        broker = scene.broker()
        await broker.said("broker listens")
        await scene.produce_these(make(random.Random(1), "noop"))
        worker = scene.worker(slots=1, more=pool("pull", secret=OTHER))
        said = await worker.said("fetching tasks failed, trying again")
        assert "Authentication failed" in said["error"]
        assert scene.lines() == []
        assert await worker.stopped() == 0


class Stranger:
    """Calls a push worker as somebody who knows these secrets."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def push(self, taskname: str = "noop") -> str:
        """The code it was answered with."""
        task = TaskActivation(id="x", namespace="recorded", taskname=taskname, application="kill-tests")
        try:
            await self._client.call(pushing.PUSH_TASK, pushing.encode_push(bytes(task)), timeout_s=10)
        except Refused as error:
            return f"{error.code} {error.message}"
        return "OK"

    async def health(self, service: str = "") -> int:
        """Asked until it listens."""
        request = bytes(HealthCheckRequest(service=service))
        with trio.fail_after(WITHIN_S):
            while True:
                try:
                    body = await self._client.call(CHECK, request, timeout_s=10)
                except PeerUnavailable:
                    await trio.sleep(0.02)
                    continue
                return int(HealthCheckResponse.parse(body).status)


@asynccontextmanager
async def stranger(port: int, *secrets: str) -> AsyncIterator[Stranger]:
    async with connect(f"127.0.0.1:{port}", Access(Secrets(secrets))) as client:
        yield Stranger(client)


async def test_a_pushed_worker_refuses_who_does_not_sign_and_serves_once_it_is_warm(tmp_path: Path) -> None:
    plugin, warm = tmp_path / "plugin", tmp_path / "warm"
    source = f"import pathlib, time\nwhile not pathlib.Path({str(warm)!r}).exists():\n    time.sleep(0.02)\n"
    install_plugin(plugin, "slow-plugin", "slow_plugin", source)
    port = free_port()
    environment = {"PYTHONPATH": python_path(plugin)} | pool("push", port=port, APPLICATION="kill-tests")
    async with (
        aio.open_loop(),
        open_daemons(tmp_path) as daemons,
        stranger(port) as unsigned,
        stranger(port, OTHER) as wrong,
        stranger(port, SECRET) as right,
    ):
        worker = daemons.start("worker", "--broker", "127.0.0.1:1", "--slots", "1", more=environment)
        for service in ("", pushing.SERVICE):
            assert await unsigned.health(service) == NOT_SERVING
        warm.touch()
        await worker.said("pool ready")
        for service in ("", pushing.SERVICE):
            assert await unsigned.health(service) == SERVING
        for caller in (unsigned, wrong):
            assert await caller.push() == "UNAUTHENTICATED Authentication failed"
        assert await right.push() == "OK"
        assert (await worker.said("task did not complete"))["reason"] == "unknown_task"
