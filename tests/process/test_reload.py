"""SIGHUP, with real daemons. What a service manager is told of it: test_service_manager.py."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from daemons import open_daemons

pytestmark = [pytest.mark.process, pytest.mark.slow]

BROKER = """
data_dir: {folder}/data
rpc: {{port: {port}}}
http: {{port: 0}}
log_format: json
{more}
"""


async def test_a_broker_reloads_on_sighup(tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    async with open_daemons(tmp_path) as daemons:
        file.write_text(BROKER.format(folder=tmp_path, port=0, more=""))
        broker = daemons.start("broker", "--config", str(file))
        await broker.said("broker listens")

        file.write_text(
            BROKER.format(folder=tmp_path, port=1, more="store: {max_pending_count: 7}\nlog_level: debug")
        )
        broker.send(signal.SIGHUP)
        await broker.said("configuration reloaded")
        waits = broker.entries("needs a restart")
        assert [(entry["key"], entry["level"]) for entry in waits] == [("rpc.port", "warning")]
        changed = {entry["key"]: entry["now"] for entry in broker.entries("configuration changed")}
        assert changed == {"store.max_pending_count": 7, "log_level": "debug"}

        file.write_text("store: {max_pending_cout: 7}\nlog_level: loud\n")
        broker.send(signal.SIGHUP)
        await broker.said("the old configuration holds")
        assert [entry["problem"] for entry in broker.entries("configuration not reloaded")] == [
            f"unknown key `store.max_pending_cout`; did you mean `max_pending_count`? ({file}:1)",
            f"`log_level`: expected 'debug', 'info', 'warning' or 'error', found 'loud' ({file}:2)",
        ]
        assert await broker.stopped() == 0


async def test_a_worker_changes_its_log_level_and_names_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    async with open_daemons(tmp_path) as daemons:
        file.write_text("pools: {default: {brokers: ['127.0.0.1:1'], slots: 1}}\n")
        worker = daemons.start("worker", "--config", str(file))
        await worker.said("pool ready")
        file.write_text("pools: {default: {brokers: ['127.0.0.1:1'], slots: 2}}\nlog_level: debug\n")
        worker.send(signal.SIGHUP)
        await worker.said("configuration reloaded")
        assert [entry["key"] for entry in worker.entries("needs a restart")] == ["pools.default.slots"]
        assert [entry["key"] for entry in worker.entries("configuration changed")] == ["log_level"]
        assert await worker.stopped() == 0


async def test_secrets_are_rotated_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text(BROKER.format(folder=tmp_path, port=0, more=""))
    async with open_daemons(tmp_path) as daemons:
        broker = daemons.start("broker", "--config", str(file))
        address = (await broker.said("broker listens"))["rpc"]

        async def asked(more: dict[str, str]) -> str:
            """What `taskd status` says of an id that nobody knows."""
            asking = daemons.start("status", "x", "--broker", address, more=more)
            assert await asking.ended() == 1
            return " ".join(asking.lines)

        assert "Authentication failed" not in await asked({})
        text = BROKER.format(folder=tmp_path, port=0, more="")
        file.write_text(text.replace("{port: 0}", "{port: 0, secrets: [new, old]}", 1))
        broker.send(signal.SIGHUP)
        await broker.said("configuration reloaded")
        assert "Authentication failed" in await asked({})
        for secret in ("new", "old"):
            assert "Authentication failed" not in await asked({"TASKD_SECRET": secret})
        assert "Authentication failed" in await asked({"TASKD_SECRET": "other"})
        assert await broker.stopped() == 0
