"""Bad input is data: it is dead-lettered or reported, byte for byte, and ends nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kill_scene import make, open_scene

pytestmark = [pytest.mark.process, pytest.mark.slow]


async def test_junk_and_unknown_tasks_among_good_ones(tmp_path: Path) -> None:
    async with open_scene(tmp_path, TASKD_DISPATCH__UNKNOWN_TASKS="fail") as scene:
        broker, worker = scene.broker(), scene.worker()
        rng = random.Random(1)
        junk = [b"", b"\0", b"\xff" * 100, *(rng.randbytes(rng.randint(1, 300)) for _ in range(50))]
        await scene.produce_these(*(make(rng, "noop") for _ in range(50)), make(rng, "unknown"))
        await scene.produce_junk(*junk)
        await scene.produce_these(*(make(rng, "noop") for _ in range(50)), make(rng, "fails_once"))
        history = await scene.close_the_books(broker, worker)
        undecodable = [
            letter
            for letter in history.files.dead_letters
            if dict(letter.headers)["taskd-reason"] == b"undecodable"
        ]
        assert sorted(letter.value for letter in undecodable) == sorted(junk)
        assert all(dict(letter.headers)["taskd-offset"] for letter in undecodable)
        assert [seen.reason for seen in history.statuses.values()].count("unknown_task") == 1
        told = worker.entries("task did not complete")
        assert any("nobody_registers_this" in entry["error"] for entry in told)
