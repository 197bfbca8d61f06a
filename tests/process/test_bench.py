"""`taskd bench` measures something, of real daemons, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from daemons import free_port, open_daemons

from taskd.activation.lifecycle import Status

pytestmark = [pytest.mark.process, pytest.mark.slow]

MISSED = 3  # a small run on a busy machine may miss its target: that is no failure of the tool


def bench(folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "taskd", "bench", *arguments, "--folder", str(folder), "--json"]
    ours = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=ours)
    assert done.returncode in (0, MISSED), done.stderr
    assert not list(folder.iterdir())
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in found["figures"]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("drain", "--count", "300", "--slots", "1"), "drained"),
        (("latency", "--count", "3", "--slots", "1"), "submit to start, p50"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_small_run(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    found = bench(tmp_path, *arguments)
    assert found["benchmark"] == arguments[0]
    assert figures(found)[expected] > 0
    assert found["machine"]["cpus"] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments",
    [
        ("through", "--count", "2000", "--kafka", "local"),
        ("ingest", "--count", "2000", "--kafka", "local"),
        ("soak", "--seconds", "8", "--per-s", "200"),
        ("claim", "--size", "200", "--size", "400"),
        ("scale", "--waiting", "200", "--payload", "1000", "--brokers", "2"),
        ("rpc", "--seconds", "0.5", "--rounds", "1"),
    ],
    ids=lambda value: value[0],
)
def test_a_longer_run(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert all(value >= 0 for value in figures(bench(tmp_path, *arguments)).values())


@pytest.mark.long
@pytest.mark.parametrize("name", ["latency", "rpc"])
async def test_a_broker_that_is_there_is_used_and_left_empty(tmp_path: Path, name: str) -> None:
    few = {"latency": ("--count", "3"), "rpc": ("--seconds", "0.5", "--rounds", "1")}[name]
    port, secret = free_port(), "known to both of them"
    config = tmp_path / "broker.yaml"
    rpc = {"port": port, "secrets": [secret]}
    config.write_text(json.dumps({"data_dir": str(tmp_path / "data"), "rpc": rpc, "http": {"port": 0}}))
    folder = tmp_path / "bench"
    folder.mkdir()
    async with open_daemons(tmp_path) as daemons:
        broker = daemons.start("broker", "--config", str(config))
        await broker.said("broker listens")
        run = partial(bench, folder, name, *few, "--broker", f"127.0.0.1:{port}", TASKD_SECRET=secret)
        found = await trio.to_thread.run_sync(run)
        assert await broker.stopped() == 0
    assert all(value > 0 for value in figures(found).values())
    with closing(sqlite3.connect(tmp_path / "data" / "inflight.sqlite")) as store:
        statuses = store.execute("SELECT DISTINCT status FROM inflight").fetchall()
    assert statuses == [(int(Status.GONE),)]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "taskd", "bench", "drain", "--folder", str(tmp_path / "nowhere")]
    wide = {**os.environ, "COLUMNS": "1000"}  # or the message is broken into lines anywhere
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=wide)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "does not exist" in done.stderr
