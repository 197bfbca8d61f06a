"""The store's care with real processes: SQL of operators, damage, a full disk, backups, evacuation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from daemons import Daemon, Daemons, free_port, open_daemons

from taskd import aio
from taskd.clock import SystemClock
from taskd.inflight.base import Arrival, Policy
from taskd.inflight.writer import open_inflight
from taskd.rpc.client import connect
from taskd.testing.kafka import open_local_kafka
from taskd.wire.consumer import COMPLETE, SERVICE
from taskd.wire.generated.sentry_protos.taskbroker.v1 import SetTaskStatusRequest, TaskActivationStatus

pytestmark = [pytest.mark.process, pytest.mark.slow]

SQL = """
import sqlite3, sys
db = sqlite3.connect("file:" + sys.argv[1] + "?mode=ro", uri=True)
for row in db.execute("SELECT id, status, namespace, taskname, application FROM inflight_taskactivations"):
    print(*row, sep="|")
"""


class Broker:
    def __init__(self, daemons: Daemons, folder: Path, **settings: Any) -> None:
        self.daemons = daemons
        self.folder = folder
        self.port = free_port()
        self.http_port = free_port()
        self.file = folder / f"broker-{self.port}.yaml"
        self.file.write_text(
            json.dumps(
                {
                    "data_dir": str(folder / "data"),
                    "rpc": {"port": self.port},
                    "http": {"port": self.http_port},
                    "log_level": "debug",  # a line for each transition
                    **settings,
                }
            )
        )

    async def started(self) -> Daemon:
        daemon = self.daemons.start("broker", "--config", str(self.file))
        await daemon.said("broker listens")
        return daemon

    async def submit(self, kwargs: str = '{"a": 1, "b": 2}') -> str:
        """The id of one call that nobody runs."""
        file = self.folder / "kwargs.jsonl"
        file.write_text(kwargs + "\n")
        said = await self.run("submit", "demo:add", "--broker", f"127.0.0.1:{self.port}", "--file", str(file))
        return said.split()[-1]

    async def run(self, *arguments: str, code: int = 0) -> str:
        command = self.daemons.start(*arguments)
        assert await command.ended() == code, command.tail()
        return command.tail()

    async def ask(self, method: str, request: bytes) -> bytes:
        async with aio.open_loop(), connect(f"127.0.0.1:{self.port}") as client:
            return await client.call(f"/{SERVICE}/{method}", request, timeout_s=10)

    async def ready(self) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/readyz") as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as answer:
                with answer:
                    return json.load(answer)

        return await trio.to_thread.run_sync(ask)

    def rows(self, store: Path | None = None) -> list[str]:
        """What another process with the system's SQLite reads."""
        path = str(store or self.folder / "data" / "inflight.sqlite")
        return subprocess.run(
            [sys.executable, "-c", SQL, path], capture_output=True, text=True, check=True
        ).stdout.splitlines()


def files_of(folder: Path) -> list[str]:
    return [str(path) for path in folder.iterdir()]


async def moved(daemon: Daemon, id_: str, event: str) -> None:
    """Wait until this happened to an activation; the broker's log at level debug says so."""
    with trio.fail_after(30):
        while not any((e["id"], e["by"]) == (id_, event) for e in daemon.entries("transition")):
            daemon._news = trio.Event()
            await daemon._news.wait()


async def test_operators_read_the_view_while_the_broker_runs(tmp_path: Path) -> None:
    async with open_daemons(tmp_path) as daemons:
        broker = Broker(daemons, tmp_path, store={"path": str(tmp_path / "elsewhere" / "store.db")})
        store = tmp_path / "elsewhere" / "store.db"
        daemon = await broker.started()
        assert broker.rows(store) == []
        id_ = await broker.submit()
        await moved(daemon, id_, "arrived")
        assert broker.rows(store) == [f"{id_}|Pending|demo|add|"]
        # A second broker with another data_dir must not share the store.
        other = Broker(daemons, tmp_path, store={"path": str(store)}, data_dir=str(tmp_path / "other"))
        said = await other.run("broker", "--config", str(other.file), code=75)
        assert "belongs to another running broker" in said
        assert await daemon.stopped() == 0
        assert broker.rows(store) == [f"{id_}|Pending|demo|add|"]


async def test_a_damaged_store_is_recovered(tmp_path: Path) -> None:
    async with open_daemons(tmp_path) as daemons:
        broker = Broker(daemons, tmp_path)
        store = tmp_path / "data" / "inflight.sqlite"
        daemon = await broker.started()
        ids = [await broker.submit() for _ in range(2)]
        for id_ in ids:
            await moved(daemon, id_, "arrived")
        assert await daemon.stopped() == 0
        store.write_bytes(b"\xff" * 50_000)
        daemon = await broker.started()
        (told,) = [entry for entry in daemon.entries() if entry["level"] == "critical"]
        assert "taskd recover" in told["message"]
        assert told["file"] in files_of(tmp_path / "data")
        assert "taskd recover" in (await broker.ready())["parts"]["store"]["reason"]
        assert broker.rows() == []
        refused = await broker.run("recover", "--config", str(broker.file), "--from-time", "1h", code=75)
        assert "belongs to another running broker" in refused
        assert await daemon.stopped() == 0
        said = await broker.run("recover", "--config", str(broker.file), "--from-time", "1h")
        assert "taskd/0: reads again from 0, 2 records" in said
        daemon = await broker.started()
        for id_ in ids:
            await moved(daemon, id_, "arrived")
        assert sorted(row.split("|")[0] for row in broker.rows()) == sorted(ids)
        assert (await broker.ready())["parts"]["store"] == {"ok": True, "reason": ""}


async def test_damage_that_is_found_while_the_broker_runs_ends_it(tmp_path: Path) -> None:
    """The check may not hold up the start of a large store, so it goes on beside the work."""
    store = tmp_path / "data" / "inflight.sqlite"
    async with open_inflight(store, SystemClock(), Policy(), inline=True) as inflight:
        await inflight.insert(
            [
                Arrival(
                    f"{n}",
                    "ns",
                    "task",
                    "",
                    None,
                    10,
                    None,
                    None,
                    0,
                    True,
                    False,
                    "taskd",
                    0,
                    n,
                    None,
                    b"x" * 300,
                )
                for n in range(4_000)
            ]
        )
    async with open_daemons(tmp_path) as daemons:
        broker = Broker(daemons, tmp_path, store={"integrity_check_within_s": 0})
        daemon = await broker.started()
        await daemon.said("no damage found in the store")
        assert await daemon.stopped() == 0
        with store.open("r+b") as file:
            file.seek(store.stat().st_size // 4096 // 2 * 4096)
            file.write(b"\xff" * 4096)
        daemon = await broker.started()
        assert (await daemon.said("the store is damaged"))["level"] == "critical"
        assert await daemon.ended() == 74
        daemon = await broker.started()
        (told,) = [entry for entry in daemon.entries() if entry["level"] == "critical"]
        assert "taskd recover" in told["message"]
        assert told["file"] in files_of(tmp_path / "data")
        assert broker.rows() == []
        assert await daemon.stopped() == 0
        daemon = await broker.started()  # what it began with is sound
        assert not [entry for entry in daemon.entries() if entry["level"] == "critical"]


async def test_a_backup_of_a_running_broker_is_put_back(tmp_path: Path) -> None:
    async with open_daemons(tmp_path) as daemons:
        broker = Broker(daemons, tmp_path)
        daemon = await broker.started()
        before = await broker.submit()
        await moved(daemon, before, "arrived")
        await broker.run("backup", "--config", str(broker.file), str(tmp_path / "copy"))
        after = await broker.submit()
        await moved(daemon, after, "arrived")
        await broker.run("restore", "--config", str(broker.file), str(tmp_path / "copy"), code=75)
        assert await daemon.stopped() == 0
        await broker.run("restore", "--config", str(broker.file), str(tmp_path / "copy"), code=73)
        said = await broker.run("restore", "--config", str(broker.file), str(tmp_path / "copy"), "--replace")
        assert "what was there is now" in said
        daemon = await broker.started()
        assert [row.split("|")[0] for row in broker.rows()] == [before]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounting.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounting.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


async def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    async with open_daemons(tmp_path) as daemons:
        broker = Broker(daemons, tmp_path, store={"path": str(small_disk / "store.sqlite")})
        daemon = await broker.started()
        first = await broker.submit()
        await moved(daemon, first, "arrived")
        ballast = small_disk / "ballast"
        room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        ballast.write_bytes(b"x" * (room - 100_000))
        second = await broker.submit(json.dumps({"a": "x" * 1_000_000, "b": 2}))
        told = await daemon.said("store failed, trying again")
        assert "FullError" in told["error"] or "full" in told["error"]
        ready = await broker.ready()
        assert ready["status"] != "ready"
        assert ready["parts"]["store"] == {"ok": False, "reason": "takes nothing: the disk is full"}
        assert [row.split("|")[0] for row in broker.rows(small_disk / "store.sqlite")] == [first]
        ballast.unlink()
        await daemon.said("the store takes rows again")
        await moved(daemon, second, "arrived")
        assert (await broker.ready())["parts"]["store"] == {"ok": True, "reason": ""}
        assert await daemon.stopped() == 0


@pytest.mark.kafka
async def test_a_broker_is_evacuated(tmp_path: Path) -> None:
    with open_local_kafka() as address:
        async with open_daemons(tmp_path, {"TASKD_LOG": "kafka", "TASKD_KAFKA": address}) as daemons:
            log = {"kind": "kafka", "clusters": {"default": {"address": address}}}
            (tmp_path / "old").mkdir()
            (tmp_path / "new").mkdir()
            old = Broker(daemons, tmp_path / "old", log=log, drain_grace_s=0.2)
            daemon = await old.started()
            held = await old.submit()
            await moved(daemon, held, "arrived")
            assert held.encode() in await old.ask("GetTask", b"")  # a worker has it
            waits = await old.submit()
            await moved(daemon, waits, "arrived")
            assert await daemon.stopped() == 0
            left = await old.run("broker", "evacuate", "--config", str(old.file), "--grace", "1", code=1)
            assert f"{held} is processing" in left
            assert [row.split("|")[0] for row in old.rows()] == [held]
            evacuation = daemons.start("broker", "evacuate", "--config", str(old.file), "--grace", "30")
            await evacuation.said("broker listens")
            await old.ask(
                "SetTaskStatus", bytes(SetTaskStatusRequest(id=held, status=TaskActivationStatus(COMPLETE)))
            )
            assert await evacuation.ended() == 0
            assert evacuation.lines[-1] == "the store is empty"
            assert old.rows() == []
            new = Broker(daemons, tmp_path / "new", log=log, drain_grace_s=0.2)
            daemon = await new.started()
            await moved(daemon, waits, "arrived")
            assert [row.split("|")[0] for row in new.rows()] == [waits]


@pytest.mark.kafka
@pytest.mark.long
async def test_kafka_is_read_again(tmp_path: Path) -> None:
    with open_local_kafka() as address:
        async with open_daemons(tmp_path, {"TASKD_LOG": "kafka", "TASKD_KAFKA": address}) as daemons:
            log = {"kind": "kafka", "clusters": {"default": {"address": address}}}
            broker = Broker(daemons, tmp_path, log=log, drain_grace_s=0.2)
            daemon = await broker.started()
            ids = [await broker.submit() for _ in range(3)]
            for id_ in ids:
                await moved(daemon, id_, "arrived")
            assert await daemon.stopped() == 0
            said = await broker.run("recover", "--config", str(broker.file), "--from-offset", "taskd/0=1")
            assert "taskd/0: reads again from 1, 2 records" in said
            said = await broker.run("recover", "--config", str(broker.file), "--from-time", "1h")
            assert "taskd/0: reads again from 0, 1 records" in said
            (tmp_path / "data" / "inflight.sqlite").rename(tmp_path / "lost")
            daemon = await broker.started()
            for id_ in ids:
                await moved(daemon, id_, "arrived")
            assert sorted(row.split("|")[0] for row in broker.rows()) == sorted(ids)
