"""kill -9 in the middle of a run that must not be repeated: there is one START, whoever died."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kill_scene import make, open_scene

pytestmark = [pytest.mark.process, pytest.mark.slow]


async def test_one_start_whoever_dies_in_the_middle(tmp_path: Path) -> None:
    rng = random.Random(1)
    async with open_scene(tmp_path) as scene:
        broker, worker = scene.broker(), scene.worker(slots=1)
        await broker.said("broker listens")
        survives, dies = make(rng, "once", seconds=1.5), make(rng, "once", seconds=3_600)
        await scene.produce_these(survives)
        await scene.started(survives[0].key)
        await broker.killed()
        broker = scene.broker()
        await broker.said("broker listens")
        await scene.produce_these(dies)
        await scene.started(dies[0].key)
        await worker.killed()
        other = scene.worker(slots=1)
        history = await scene.close_the_books(broker, other)
    assert history.statuses[survives[0].id].outcome == "complete", "its worker lived to tell"
    assert history.statuses[dies[0].id].reason == "at_most_once"
    words = sorted((line.key, line.word) for line in scene.lines())
    assert words == sorted([(survives[0].key, "START"), (survives[0].key, "END"), (dies[0].key, "START")])
