"""kill -9 and SIGSTOP of workers and their children, under load: all is accounted for, no process stays."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import trio
from daemons import Daemon
from kill_scene import Scene, make, open_scene

pytestmark = [pytest.mark.process, pytest.mark.slow]

SEED = int(os.environ.get("TASKD_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
PRODUCERS = 2
ANY_NUMBER = 1_000_000
LONGER_THAN_A_LEASE_S = 2.5  # the scene's leases live 2 s


class Faults:
    """One of them after the other befalls the first of two workers; the second one lives on."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self._scene = scene
        self._rng = rng
        self.victim = scene.worker(slots=3)
        self.survivor = scene.worker(slots=2)

    async def kill_the_parent(self) -> None:
        await self.victim.killed()  # sees to it that the children follow
        self.victim = self._scene.worker(slots=3)

    async def kill_a_child(self) -> None:
        if children := self.victim.children():
            os.kill(self._rng.choice(children), signal.SIGKILL)

    async def stop_for_longer_than_a_lease(self) -> None:
        await self._stop([self.victim.pid, *self.victim.children()])

    async def stop_only_the_parent(self) -> None:
        await self._stop([self.victim.pid])

    async def _stop(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await trio.sleep(LONGER_THAN_A_LEASE_S)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("rounds", [1, pytest.param(12, marks=pytest.mark.long)])
async def test_faults_of_workers_under_load_lose_nothing(tmp_path: Path, rounds: int) -> None:
    print(f"TASKD_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    async with open_scene(tmp_path) as scene, trio.open_nursery() as producing:
        enough = trio.Event()
        broker = scene.broker()
        faults = Faults(scene, rng)
        for number in range(PRODUCERS):
            producing.start_soon(scene.produce, random.Random(f"{SEED}/{number}"), ANY_NUMBER, enough)
        for _ in range(rounds):
            befalls = [
                *(faults.kill_the_parent for _ in range(4)),
                *(faults.kill_a_child for _ in range(4)),
                rng.choice((faults.stop_for_longer_than_a_lease, faults.stop_only_the_parent)),
            ]
            rng.shuffle(befalls)
            for befall in befalls:
                if rng.random() < 0.75:
                    await faults.victim.said("pool ready")
                await trio.sleep(rng.uniform(0, 0.6))  # a random moment, which nobody announces
                await befall()
        enough.set()
        await scene.close_the_books(broker, faults.victim, faults.survivor)


async def test_a_superseded_result_is_not_accepted(tmp_path: Path) -> None:
    async with open_scene(tmp_path) as scene:
        broker, frozen = scene.broker(), scene.worker(slots=2)
        torn = make(random.Random(SEED), "torn", flag=str(tmp_path / "flag"), seconds=1.5)
        once = make(random.Random(SEED), "once", seconds=1.5)
        await frozen.said("broker connected")
        await scene.produce_these(torn, once)
        for produced, _ in (torn, once):
            await scene.started(produced.key)
        frozen.send(signal.SIGSTOP)  # its children run on: one fails, and cannot say so
        other = scene.worker(slots=1)
        await scene.started(torn[0].key, 2)  # its lease is over, and the next one holds it
        frozen.send(signal.SIGCONT)
        assert (await frozen.said("task did not complete"))["id"] == torn[0].id
        refused = {id_ for ids in await _refused(broker, 2) for id_ in ids}
        assert refused == {torn[0].id, once[0].id}
        assert "\ntaskd_superseded_results_total 2.0\n" in await _page(broker, "/metrics")
        history = await scene.close_the_books(broker, frozen, other)
        assert not frozen.entries("left behind"), "its late result was answered"
        assert history.statuses[torn[0].id].outcome == "complete", "the failure came under the older lease"
        assert history.statuses[once[0].id].reason == "at_most_once"
        assert history.duplicates() == 1, "of the torn one, and by design"


async def _refused(broker: Daemon, results: int) -> list[list[str]]:
    """What the broker says it refused, once that is so many results."""
    lines = 1
    while True:
        await broker.said("late results refused", lines)
        found = broker.entries("late results refused")
        if sum(line["count"] for line in found) >= results:
            return [line["ids"] for line in found]
        lines = len(found) + 1


async def _page(broker: Daemon, path: str) -> str:
    host, _, port = (await broker.said("broker listens"))["http"].partition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    async with stream:
        await stream.send_all(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        return b"".join([data async for data in stream]).decode()


async def test_a_task_that_kills_its_worker_ends_at_its_limit(tmp_path: Path) -> None:
    """Each of its leases ends with a dead worker; the starts are counted across them."""
    settings = {"TASKD_STORE__MAX_PROCESSING_ATTEMPTS": "3", "TASKD_DISPATCH__LEASE_S": "1"}
    async with open_scene(tmp_path, **settings) as scene:
        broker = scene.broker()
        nap = make(random.Random(SEED), "nap", seconds=4)
        await scene.produce_these(nap)
        for run in range(1, 4):
            worker = scene.worker(slots=1)
            await scene.started(nap[0].key, run)
            await worker.killed()
        history = await scene.close_the_books(broker)
        assert history.statuses[nap[0].id].outcome == "failed"
        assert history.statuses[nap[0].id].attempts == 3
