"""The published client's push worker, unmodified, is pushed to by `taskd broker`; every call is signed.

A worker that shares secrets answers OK to a wrong signature and runs nothing, so what proves that our
signatures are right is that the tasks ran.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import trio
from daemons import HERE, Daemon, free_port
from kill_scene import Scene, open_scene
from test_published_client import (
    PYTHON,
    SCRIPT,
    _client_is_there,  # noqa: F401  # the fixture that looks for the client
    by_our_producer,
    by_the_client,
)

pytestmark = [pytest.mark.process, pytest.mark.slow]

SECRETS = ["super secret", "the one before"]


def client(scene: Scene, mode: str, port: int = 0) -> Daemon:
    """Its worker; in mode `push` it listens at `port`."""
    more = {
        "TASKD_TEST_RECORD": str(scene.record),
        "TASKD_TEST_PUSH_PORT": str(port),
        "TASKD_TEST_SECRETS": json.dumps(SECRETS),
        "PYTHONPATH": str(HERE),
        "GRPC_VERBOSITY": "NONE",
    }
    return scene.daemons.run([PYTHON, SCRIPT, mode, scene.address, "2"], "client", more=more)


def push_to(port: int) -> dict[str, str]:
    """The broker's settings."""
    return {
        "TASKD_DISPATCH__MODE": "push",
        "TASKD_PUSH__WORKER_MAP": json.dumps({"published": f"http://127.0.0.1:{port}"}),
        "TASKD_PUSH__TIMEOUT_S": "6",  # the worker lets a caller wait for 5 s while it is full
        "TASKD_PUSH__CLAIM_MARGIN_S": "0.5",
    }


async def test_it_is_pushed_to_also_while_the_broker_is_killed(tmp_path: Path) -> None:
    port = free_port()
    async with open_scene(tmp_path, TASKD_RPC__SECRETS=json.dumps(SECRETS), **push_to(port)) as scene:
        scene.secret = SECRETS[0]
        broker = scene.broker()
        worker = client(scene, "push", port)
        await scene.produce_these(*by_our_producer(100), *by_the_client(50))
        await recorded(scene, 40)
        await broker.killed()
        broker = scene.broker()
        history = await scene.close_the_books(broker, worker)
        ran = {line.key for line in history.lines if line.word == "START"}
        assert ran == {produced.key for produced in history.produced}


@pytest.mark.long
async def test_worker_and_broker_are_killed_again_and_again(tmp_path: Path) -> None:
    """Its children outlive its worker when that is killed, so they are killed too."""
    port = free_port()
    async with open_scene(tmp_path, TASKD_RPC__SECRETS=json.dumps(SECRETS), **push_to(port)) as scene:
        scene.secret = SECRETS[0]
        broker = scene.broker()
        worker = client(scene, "push", port)
        await scene.produce_these(*by_our_producer(300))
        for lines in (60, 180, 260):
            await recorded(scene, lines)
            children = worker.children()
            worker.send(signal.SIGKILL)
            for child in children:
                os.kill(child, signal.SIGKILL)
            await worker.ended()
            if lines == 180:
                await broker.killed()
                broker = scene.broker()
            worker = client(scene, "push", port)
        await scene.close_the_books(broker, worker)


async def recorded(scene: Scene, lines: int) -> None:
    """Until tasks have written so many lines."""
    with trio.fail_after(60):
        while len(scene.lines()) < lines:  # noqa: ASYNC110  # files give no event to wait for
            await trio.sleep(0.02)


async def test_it_fetches_with_signed_calls(tmp_path: Path) -> None:
    async with open_scene(tmp_path, TASKD_RPC__SECRETS=json.dumps(SECRETS)) as scene:
        scene.secret = SECRETS[1]
        broker = scene.broker()
        worker = client(scene, "work")
        await scene.produce_these(*by_our_producer(25))
        history = await scene.close_the_books(broker, worker)
        assert history.duplicates() == 0
