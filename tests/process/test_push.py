"""Push delivery against a running broker (contract §7): the worker is a gRPC server of the C core."""

from __future__ import annotations

import hashlib
import hmac
import json
import signal
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from daemons import WITHIN_S, Daemon, free_port
from history import Produced
from kill_scene import TOPIC, Scene, open_scene

from taskd.admin.wait import Seen, get_status
from taskd.errors import Refused
from taskd.log.base import Outgoing
from taskd.rpc.access import Access
from taskd.rpc.client import Client, connect
from taskd.wire.generated.sentry_protos.taskbroker.v1 import (
    FetchNextTask,
    GetTaskRequest,
    PushTaskRequest,
    RetryState,
    SetBatchActivationStatusRequest,
    SetTaskStatusRequest,
    SetTaskStatusResponse,
    TaskActivation,
    TaskActivationStatus,
)
from taskd.wire.signing import Secrets

grpc = pytest.importorskip("grpc")

pytestmark = [pytest.mark.process, pytest.mark.slow]

METHOD = "/sentry_protos.taskbroker.v1.WorkerService/PushTask"
CONSUMER = "/sentry_protos.taskbroker.v1.ConsumerService"
SECRET = "super secret"


@dataclass(frozen=True)
class Pushed:
    id: str
    body: bytes
    signature: str


Answer = Callable[[Pushed, Any], None]


class Worker:
    """A push worker that answers as `answer` says, in a thread; default: OK at once."""

    def __init__(self, port: int) -> None:
        self.got: list[Pushed] = []
        self.answer: Answer = lambda pushed, context: None
        self._news = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        service, _, method = METHOD[1:].partition("/")
        handler = grpc.unary_unary_rpc_method_handler(self._push)
        self._server = grpc.server(ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        assert self._server.add_insecure_port(f"127.0.0.1:{port}") == port
        self._server.start()

    def _push(self, body: bytes, context: Any) -> bytes:
        task = PushTaskRequest.parse(body).task
        assert task is not None
        signature = dict(context.invocation_metadata()).get("sentry-signature", "")
        pushed = Pushed(task.id, body, signature)
        trio.from_thread.run_sync(self._arrived, pushed, trio_token=self._token)
        self.answer(pushed, context)
        return b""

    def _arrived(self, pushed: Pushed) -> None:
        self.got.append(pushed)
        self._news.set()

    async def was_pushed(self, id_: str, times: int = 1) -> Pushed:
        """Once it was given this for so many times."""
        with trio.fail_after(WITHIN_S):
            while len(found := [pushed for pushed in self.got if pushed.id == id_]) < times:
                self._news = trio.Event()
                await self._news.wait()
        return found[-1]

    async def stop(self) -> None:
        """At once: calls under way are cut off."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._server.stop(0).wait)


@asynccontextmanager
async def open_worker(port: int) -> AsyncIterator[Worker]:
    worker = Worker(port)
    try:
        yield worker
    finally:
        await worker.stop()


def busy(pushed: Pushed, context: Any) -> None:
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "worker busy")


def slow(pushed: Pushed, context: Any) -> None:
    time.sleep(1.5)  # longer than the broker waits


class Push:
    """A broker that delivers by push, and what a test asks of it."""

    def __init__(self, scene: Scene, client: Client, broker: Daemon) -> None:
        self.scene, self.client, self.broker = scene, client, broker

    async def produce(self, *ids: str, application: str = "shop", **fields: Any) -> list[bytes]:
        raw = [
            bytes(TaskActivation(id=id_, namespace="ns", taskname="t", application=application, **fields))
            for id_ in ids
        ]
        await self.scene.produce_these(
            *[
                (Produced(id_, "pushed", id_, value), Outgoing(TOPIC, value))
                for id_, value in zip(ids, raw, strict=True)
            ]
        )
        return raw

    async def look(self, id_: str) -> Seen:
        (seen,) = await get_status(self.client, [id_])
        return seen

    async def becomes(self, id_: str, state: str) -> Seen:
        """Once it is in this state; a broker gives no event to a stranger."""
        with trio.fail_after(WITHIN_S):
            while (seen := await self.look(id_)).state != state:  # noqa: ASYNC110
                await trio.sleep(0.02)
        return seen

    async def report(self, *ids: str, status: int = 5) -> None:
        updates = [SetTaskStatusRequest(id=id_, status=TaskActivationStatus(status)) for id_ in ids]
        body = bytes(SetBatchActivationStatusRequest(updates=updates))
        await self.client.call(f"{CONSUMER}/SetBatchActivationStatus", body, timeout_s=WITHIN_S)


@asynccontextmanager
async def open_push(folder: Path, worker_map: dict[str, str], **more: str) -> AsyncIterator[Push]:
    settings = {
        "TASKD_DISPATCH__MODE": "push",
        "TASKD_PUSH__WORKER_MAP": json.dumps(worker_map),
        "TASKD_PUSH__TIMEOUT_S": "1",
        "TASKD_PUSH__CLAIM_MARGIN_S": "0.2",
        "TASKD_RPC__SECRETS": json.dumps([SECRET]),
    }
    async with open_scene(folder, **settings, **more) as scene:
        scene.secret = SECRET
        broker = scene.broker()
        await broker.said("broker listens")
        async with connect(scene.address, Access(Secrets([SECRET]))) as client:
            yield Push(scene, client, broker)


def ready(http: str) -> dict[str, dict[str, str]]:
    """The parts of a broker that says it is ready; raises HTTPError when it is not."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://{http}/readyz", timeout=WITHIN_S) as page:
        parts: dict[str, dict[str, str]] = json.load(page)["parts"]
    return parts


def at_most_once() -> RetryState:
    return RetryState(attempts=0, max_attempts=1, on_attempts_exceeded=2, at_most_once=True)


async def test_pushed_signed_reported_and_nothing_else_hands_out(tmp_path: Path) -> None:
    port = free_port()
    async with (
        open_worker(port) as worker,
        open_push(tmp_path, {"shop": f"http://127.0.0.1:{port}"}) as push,
    ):
        (raw,) = await push.produce("a", headers={"k": "v"})
        pushed = await worker.was_pushed("a")
        request = PushTaskRequest.parse(pushed.body)
        assert (raw in pushed.body, request.callback_url) == (True, "")
        signed = METHOD.encode() + b":" + pushed.body
        assert pushed.signature == hmac.digest(SECRET.encode(), signed, hashlib.sha256).hex()
        assert (await push.becomes("a", "processing")).attempts == 1

        with pytest.raises(Refused) as refused:
            await push.client.call(
                f"{CONSUMER}/GetTask", bytes(GetTaskRequest(application="shop")), timeout_s=WITHIN_S
            )
        assert refused.value.code == "PERMISSION_DENIED"

        worker.answer = busy
        await push.produce("b")
        await worker.was_pushed("b")
        done = SetTaskStatusRequest(
            id="a", status=TaskActivationStatus(5), fetch_next_task=FetchNextTask(application="shop")
        )
        reply = await push.client.call(f"{CONSUMER}/SetTaskStatus", bytes(done), timeout_s=WITHIN_S)
        assert SetTaskStatusResponse.parse(reply).task is None
        assert (await push.look("a")).outcome == "complete"

        await worker.was_pushed("b", 2)  # `worker busy` puts it back, and it is tried again
        worker.answer = lambda pushed, context: None
        assert (await push.becomes("b", "processing")).attempts == 1
        await push.report("b")
        assert (await push.look("b")).outcome == "complete"
        assert await push.broker.stopped() == 0


async def test_calls_that_are_cut_off(tmp_path: Path) -> None:
    """What a worker may have is not given back at once; at most once, it counts as started."""
    port = free_port()
    async with (
        open_worker(port) as worker,
        open_push(tmp_path, {"shop": f"http://127.0.0.1:{port}"}) as push,
    ):
        worker.answer = slow
        await push.produce("usual")
        await push.produce("once", "done", retry_state=at_most_once(), processing_deadline_duration=1)
        await worker.was_pushed("usual")
        assert (await push.look("usual")).state == "claimed"
        await worker.was_pushed("once")
        await worker.was_pushed("done")
        worker.answer = lambda pushed, context: None
        await push.report("done")  # before its call has returned
        assert (await push.look("done")).outcome == "complete"
        assert (await push.becomes("once", "processing")).attempts == 1
        await worker.was_pushed("usual", 2)
        await push.becomes("usual", "processing")
        await push.report("usual")

        worker.answer = slow
        await push.produce("lost")
        await worker.was_pushed("lost")
        await worker.stop()
        seen = await push.becomes("once", "gone")
        assert (seen.outcome, seen.reason, seen.dead_lettered) == ("failed", "at_most_once", True)
        async with open_worker(port) as another:
            await another.was_pushed("lost")
            await push.becomes("lost", "processing")
            assert [pushed.id for pushed in another.got] == ["lost"]
        assert [pushed.id for pushed in worker.got].count("once") == 1
        assert (await push.look("done")).outcome == "complete"


async def test_a_broker_that_is_killed_in_the_middle_of_its_calls(tmp_path: Path) -> None:
    port = free_port()
    async with (
        open_worker(port) as worker,
        open_push(tmp_path, {"shop": f"http://127.0.0.1:{port}"}) as push,
    ):
        worker.answer = slow
        await push.produce("usual", "reported")
        await push.produce("once", retry_state=at_most_once())
        for id_ in ("usual", "reported", "once"):
            await worker.was_pushed(id_)
        await push.broker.killed()
        worker.answer = lambda pushed, context: None
        broker = push.scene.broker()
        await broker.said("broker listens")
        await push.report("reported")
        assert (await push.look("reported")).outcome == "complete"
        await worker.was_pushed("usual", 2)
        await push.becomes("once", "processing")
        ids = [pushed.id for pushed in worker.got]
        assert (ids.count("once"), ids.count("reported")) == (1, 1)
        await push.report("usual", "once")
        assert await broker.stopped() == 0


async def test_workers_that_are_away_and_applications_that_are_not_mapped(tmp_path: Path) -> None:
    """The broker starts without them; a reload maps what was parked."""
    port, nobody = free_port(), free_port()
    file = tmp_path / "push.yaml"

    def write(worker_map: dict[str, str]) -> None:
        file.write_text(json.dumps({"push": {"worker_map": worker_map}}))

    write({"shop": f"http://127.0.0.1:{nobody}"})
    async with open_scene(
        tmp_path,
        TASKD_DISPATCH__MODE="push",
        TASKD_RPC__SECRETS=json.dumps([SECRET]),
    ) as scene:
        scene.secret = SECRET
        arguments = ("--config", str(file), "--data-dir", str(scene.data_dir), "--http-port", "0")
        broker = scene.daemons.start(
            "broker", *arguments, "--rpc-port", str(scene.rpc_port), more=scene._settings
        )
        listens = await broker.said("broker listens")
        async with (
            connect(scene.address, Access(Secrets([SECRET]))) as client,
            open_worker(port) as worker,
        ):
            push = Push(scene, client, broker)
            await push.produce("away")
            await push.produce("unmapped-1", "unmapped-2", application="bank")
            said = await broker.said("worker does not take pushes, trying again")
            assert said["worker"] == f"http://127.0.0.1:{nobody}"
            await push.becomes("unmapped-2", "parked")
            parts = await trio.to_thread.run_sync(ready, listens["http"])
            assert f"http://127.0.0.1:{nobody}" in parts["dispatch"]["reason"]
            assert (await push.look("away")).attempts == 0
            write({"shop": f"http://127.0.0.1:{nobody}", "bank": f"http://127.0.0.1:{port}"})
            broker.send(signal.SIGHUP)
            await worker.was_pushed("unmapped-1")
            await worker.was_pushed("unmapped-2")  # at the same time: either may be there first
            assert sorted(pushed.id for pushed in worker.got) == ["unmapped-1", "unmapped-2"]
            unserved = [e for e in broker.entries() if e.get("application") == "bank"]
            assert [entry["level"] for entry in unserved] == ["warning", "info"]
            await push.report("unmapped-1", "unmapped-2")
        assert await broker.stopped() == 0
