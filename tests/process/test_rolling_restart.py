"""Workers are replaced one after the other while work goes on, and whoever holds work up is sent home."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
import trio
from daemons import Daemon
from kill_scene import Scene, make, open_scene

pytestmark = [pytest.mark.process, pytest.mark.slow]

SEED = int(os.environ.get("TASKD_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
PRODUCERS = 2
ANY_NUMBER = 1_000_000
LONG_LEASE = {"TASKD_DISPATCH__LEASE_S": "60"}  # whatever is quicker did not wait for its end
BRIEF = {
    "TASKD_POOLS__DEFAULT__DRAIN_GRACE_S": "0.3",
    "TASKD_POOLS__DEFAULT__EXCEPTION_GRACE_S": "0.3",
    "TASKD_POOLS__DEFAULT__TERMINATE_GRACE_S": "0.3",
}


@pytest.mark.parametrize(
    ("every_s", "for_s"),
    [(0.5, 1.5), pytest.param(5.0, 60.0, marks=pytest.mark.long)],
    ids=["short", "minute"],
)
async def test_a_rolling_restart_loses_nothing_and_repeats_nothing(
    tmp_path: Path, every_s: float, for_s: float
) -> None:
    print(f"TASKD_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    async with open_scene(tmp_path, **LONG_LEASE) as scene, trio.open_nursery() as producing:
        broker = scene.broker()
        workers = [scene.worker() for _ in range(3)]
        enough = trio.Event()
        for number in range(PRODUCERS):
            producing.start_soon(scene.produce, random.Random(f"{SEED}/{number}"), ANY_NUMBER, enough)
        for worker in workers:
            await worker.said("broker connected")
        begin, restarts = trio.current_time(), 0
        while trio.current_time() - begin < for_s:
            await trio.sleep(every_s)  # the rhythm of the restarts
            await _replace_the_oldest(scene, workers, rng)
            restarts += 1
        enough.set()
        history = await scene.close_the_books(broker, *workers)
    print(f"{restarts} restarts")
    runs = Counter(line.id for line in history.lines if line.word == "START")
    assert not [id_ for id_, count in runs.items() if count > 1], "a drain lets no run go to waste"
    assert len(runs) > 20 * restarts, "there was no load to speak of"


async def _replace_the_oldest(scene: Scene, workers: list[Daemon], rng: random.Random) -> None:
    """Its successor starts first, as `systemctl restart` of a template's next instance would have it."""
    naps = [make(rng, "nap", seconds=0.4) for _ in range(4)]
    await scene.produce_these(*naps)  # so that something runs in it, and something waits
    old = workers.pop(0)
    workers.append(scene.worker())
    await old.said("broker connected")
    assert await old.stopped() == 0, old.tail()
    assert old.entries("drained"), old.tail()


async def test_what_outlives_the_grace_of_a_drain_runs_elsewhere_at_once(tmp_path: Path) -> None:
    async with open_scene(tmp_path, **LONG_LEASE) as scene:
        rng = random.Random(SEED)
        broker, leaving = scene.broker(), scene.worker(more=BRIEF)
        nap, once = make(rng, "nap", seconds=1.5), make(rng, "once", seconds=1.5)
        await scene.produce_these(nap, once)
        for produced, _ in (nap, once):
            await scene.started(produced.key)
        assert await leaving.stopped() == 0
        (ended,) = leaving.entries("the grace is over, ending what still runs")
        assert set(ended["running"]) == {nap[0].id, once[0].id}
        assert not leaving.entries("left behind")
        staying = scene.worker()
        await scene.started(nap[0].key, 2)
        history = await scene.close_the_books(broker, staying)
        seen = history.statuses[nap[0].id]
        assert (seen.outcome, seen.attempts) == ("complete", 1), "what was broken off is no attempt"
        assert history.statuses[once[0].id].reason == "at_most_once"


async def test_a_second_signal_ends_a_worker_and_what_it_runs_now(tmp_path: Path) -> None:
    async with open_scene(tmp_path) as scene:
        rng = random.Random(SEED)
        scene.broker()
        worker = scene.worker()
        naps = [make(rng, "nap", seconds=4) for _ in range(2)]
        await scene.produce_these(*naps)
        for produced, _ in naps:
            await scene.started(produced.key)
        worker.send(signal.SIGTERM)
        await worker.said("draining")
        assert await worker.stopped(signal.SIGTERM) == 143
        assert not worker.children()
        assert not [line for line in scene.lines() if line.word == "END"], "what ran was ended"
