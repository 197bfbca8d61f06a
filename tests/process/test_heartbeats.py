"""A task that says that it lives outlives its deadline, up to the broker's limit, and can be watched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from kill_scene import Scene, make, open_scene

from taskd.admin.wait import Seen, get_status
from taskd.rpc.client import connect

pytestmark = [pytest.mark.process, pytest.mark.slow]


async def progress_of(scene: Scene, id_: str) -> Seen:
    """What the broker says of a task once it knows how far it is."""
    async with connect(scene.address) as client:
        while True:
            (seen,) = await get_status(client, [id_])
            if seen.permille:
                return seen
            await trio.sleep(0.05)


async def test_heartbeats_carry_a_task_past_its_deadline_of_a_second(tmp_path: Path) -> None:
    rng = random.Random(1)
    async with open_scene(tmp_path, TASKD_STORE__MAX_PROCESSING_DEADLINE_S="4") as scene:
        broker, worker = scene.broker(), scene.worker(slots=2)
        await broker.said("broker listens")
        done, endless = make(rng, "lively", seconds=3), make(rng, "lively", seconds=3_600)
        await scene.produce_these(done, endless)
        with trio.fail_after(30):
            seen = await progress_of(scene, done[0].id)
        assert (seen.state, seen.message, seen.attempts) == ("processing", "of 3 s", 1)
        assert seen.worker
        assert 0 < (seen.permille or 0) < 1000
        statuses = await scene.settle()
        assert await worker.stopped() == 0
        assert await broker.stopped() == 0
    assert statuses[done[0].id].outcome == "complete"
    assert (statuses[endless[0].id].outcome, statuses[endless[0].id].reason) == ("failed", "timeout")
    words = [(line.word, line.key) for line in scene.lines()]
    assert sorted(words) == sorted(
        [("START", done[0].key), ("END", done[0].key), ("START", endless[0].key)]
    ), "each ran once"
