"""`taskd cancel` of what runs, waits and is delayed: the code stops, and its slot takes other work."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import async_recorded_tasks as async_tasks
import pytest
import recorded_tasks as tasks
import trio
from daemons import HERE, install_plugin, python_path
from history import Produced
from kill_scene import TOPIC, Scene, make, open_scene

from taskd.admin.wait import get_status
from taskd.log.base import Outgoing
from taskd.producer.build import outgoing
from taskd.rpc.client import connect
from taskd.tasks.task import Task

pytestmark = [pytest.mark.process, pytest.mark.slow]

AN_HOUR_S = 3_600

Made = tuple[Produced, Outgoing]


def made(task: Task[..., Any], key: str, countdown: int | None = None, **arguments: str) -> Made:
    call = task.to_call(kwargs={"key": key, **arguments}, countdown=countdown)
    record = outgoing(call, time.time_ns() // 1_000_000, TOPIC)
    return Produced(key, key, call.id, record.value), record


async def known(scene: Scene, *ids: str) -> None:
    """Until the broker has read these from its log."""
    async with connect(scene.address) as client:
        while any(seen.state == "unknown" for seen in await get_status(client, list(ids))):  # noqa: ASYNC110
            await trio.sleep(0.02)


async def cancel(scene: Scene, *ids: str) -> tuple[int, list[dict[str, str]]]:
    """The exit code of `taskd cancel`, and its answer for each id."""
    socket = ("--socket", str(scene.data_dir / "admin.sock"))
    order = ("--reason", "no longer wanted", "--author", "ann", "--json")
    command = scene.daemons.start("cancel", *ids, *socket, *order)
    code = await command.ended()
    return code, json.loads(command.lines[-1])


async def test_whatever_is_cancelled_ends(tmp_path: Path) -> None:
    rng = random.Random(1)
    async with open_scene(tmp_path) as scene:
        broker, worker = scene.broker(), scene.worker(slots=1)
        await broker.said("broker listens")
        running, waiting, later, last = (
            make(rng, "nap", seconds=AN_HOUR_S),
            make(rng, "nap", seconds=AN_HOUR_S),
            made(tasks.noop, "delayed", AN_HOUR_S),
            make(rng, "noop"),
        )
        await scene.produce_these(running)
        await scene.started(running[0].key)
        await scene.produce_these(waiting, later, last)
        await known(scene, waiting[0].id, later[0].id, last[0].id)
        code, found = await cancel(scene, waiting[0].id, later[0].id, "never-heard-of", running[0].id)
        assert code == 1, "one of them is unknown"
        assert [(one["state"], one["effect"]) for one in found][1:] == [
            ("delayed", "dropped"), ("unknown", "unknown"), ("processing", "stopping"),
        ]  # fmt: skip
        assert found[0]["cancelled"]  # it may be with the worker already, behind the one that runs
        await scene.started(last[0].key)  # in the one slot there is
        statuses = await scene.settle()
        for produced, _ in (running, waiting, later):
            seen = statuses[produced.id]
            assert (seen.outcome, seen.reason, seen.error) == (
                "dropped", "cancelled", "by ann: no longer wanted",
            )  # fmt: skip
        assert await worker.stopped() == 0
        assert await broker.stopped() == 0
        began = {line.key for line in scene.lines() if line.word == "START"}
        ended = {line.key for line in scene.lines() if line.word == "END"}
        assert (began, ended) == ({running[0].key, last[0].key}, {last[0].key})


async def test_an_async_task_is_cancelled_and_its_neighbour_is_not(tmp_path: Path) -> None:
    plugin, flag = tmp_path / "async", tmp_path / "flag"
    install_plugin(plugin, "async-recorded-tasks", "async_recorded_tasks")
    async with open_scene(tmp_path) as scene:
        path = python_path(plugin, tmp_path / "plugin", HERE)
        broker, worker = scene.broker(), scene.worker(slots=1, more={"PYTHONPATH": path})
        one, other = (made(async_tasks.until, key, flag=str(flag)) for key in ("one", "other"))
        await scene.produce_these(one, other)
        for produced, _ in (one, other):
            await scene.started(produced.key)
        code, found = await cancel(scene, one[0].id)
        assert (code, found[0]["effect"]) == (0, "stopping")
        again = made(async_tasks.until, "again", flag=str(flag))
        await scene.produce_these(again)
        await scene.started("again")  # behind the order, on the same stream
        flag.touch()
        statuses = await scene.settle()
        outcomes = {produced.key: statuses[produced.id].outcome for produced in scene.books.produced}
        assert outcomes == {"one": "dropped", "other": "complete", "again": "complete"}
        assert await worker.stopped() == 0
        assert await broker.stopped() == 0
        assert sorted(line.key for line in scene.lines() if line.word == "END") == ["again", "other"]


@pytest.mark.long
async def test_a_worker_that_was_away_stops_when_it_is_back(tmp_path: Path) -> None:
    """Frozen while the order was given and its broker was killed, it hears of it from the next one."""
    rng = random.Random(2)
    async with open_scene(tmp_path, TASKD_DISPATCH__LEASE_S="60") as scene:
        broker, worker = scene.broker(), scene.worker(slots=1)
        running, last = make(rng, "nap", seconds=AN_HOUR_S), make(rng, "noop")
        await scene.produce_these(running)
        await scene.started(running[0].key)
        worker.send(signal.SIGSTOP)
        code, found = await cancel(scene, running[0].id)
        assert (code, found[0]["effect"]) == (0, "stopping")
        await broker.killed()
        broker = scene.broker()
        await broker.said("broker listens")
        await scene.produce_these(last)
        await known(scene, last[0].id)
        worker.send(signal.SIGCONT)
        await scene.started(last[0].key)
        history = await scene.settle()
        assert (history[running[0].id].outcome, history[last[0].id].outcome) == ("dropped", "complete")
        assert await worker.stopped() == 0
        assert await broker.stopped() == 0
        assert [line.word for line in scene.lines() if line.key == running[0].key] == ["START"]
