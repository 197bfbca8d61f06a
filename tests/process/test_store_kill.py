"""kill -9 at any moment: what the store said is durable, is."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from taskd.activation.lifecycle import Status
from taskd.clock import SystemClock
from taskd.inflight.base import Policy
from taskd.inflight.writer import open_inflight

CHILD = Path(__file__).with_name("store_child.py")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_what_was_answered_is_there_after_kill_9(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "store.sqlite"
    said: dict[str, set[str]] = {"stored": set(), "finished": set()}
    for life in range(4):
        lines = random.Random(f"{seed}/{life}").randrange(1, 1_000)
        for word, id_ in _live_and_die(path, life, lines):
            said[word].add(id_)
    async with open_inflight(path, SystemClock(), Policy(), inline=True) as store:
        known = {found.id: found.status for found in await store.describe(sorted(said["stored"]))}
        assert [id_ for id_, status in known.items() if status is None] == []
        assert {known.get(id_, Status.GONE) for id_ in said["finished"]} <= {Status.GONE}
        assert store._store.db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        counted = {(d.namespace, d.status): d.count for d in store._store.recount()}
        assert {(d.namespace, d.status): d.count for d in store.depths()} == counted


def _live_and_die(path: Path, life: int, lines: int) -> list[tuple[str, str]]:
    """What a child said before it was killed, `lines` lines or a few more into its life."""
    said = []
    with subprocess.Popen(
        [sys.executable, str(CHILD), str(path), f"life{life}"], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if not line.endswith("\n"):
                break  # cut in the middle by the kill
            word, _, id_ = line.strip().partition(" ")
            said.append((word, id_))
            if len(said) == lines:
                child.kill()
        assert child.wait() == -9
    return said
