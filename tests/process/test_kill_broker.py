"""kill -9 of the broker at random moments, under load: every acknowledged activation is accounted for."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio
from kill_scene import open_scene

pytestmark = [pytest.mark.process, pytest.mark.slow]

SEED = int(os.environ.get("TASKD_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
PRODUCERS = 3
ANY_NUMBER = 1_000_000


async def test_without_faults_nothing_runs_twice(tmp_path: Path) -> None:
    print(f"TASKD_TEST_SEED={SEED}")
    async with open_scene(tmp_path) as scene:
        broker, worker = scene.broker(), scene.worker()
        await scene.produce(random.Random(SEED), 400, trio.Event())
        history = await scene.close_the_books(broker, worker)
        assert history.duplicates() == 0
        assert history.stopped_by_crashes() == 0
        assert len(history.files.dead_letters) == sum(
            produced.kind in ("fails", "fails_once") for produced in history.produced
        )


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.long)])
async def test_killed_under_load_nothing_is_lost(tmp_path: Path, kills: int) -> None:
    print(f"TASKD_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    async with open_scene(tmp_path) as scene, trio.open_nursery() as producing:
        enough = trio.Event()
        worker = scene.worker(slots=4)
        broker = scene.broker()
        for number in range(PRODUCERS):
            producing.start_soon(scene.produce, random.Random(f"{SEED}/{number}"), ANY_NUMBER, enough)
        for _ in range(kills):
            if rng.random() < 0.75:
                await broker.said("broker listens")
            await trio.sleep(rng.uniform(0, 1.2))  # a random moment, which nobody announces
            await broker.killed()
            broker = scene.broker()
        await broker.said("broker listens")
        enough.set()
        await scene.close_the_books(broker, worker)
        assert worker.exit_code == 0, "the worker was there all the time"
