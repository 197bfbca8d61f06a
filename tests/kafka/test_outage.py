"""Ten minutes without Kafka, once killed and once frozen: nobody ends, nothing is lost, all goes on.

`TASKD_TEST_OUTAGE_S` shortens it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import recorded_tasks as tasks
import trio
from daemons import HERE, Daemon, Daemons, free_port, install_plugin, open_daemons, python_path
from history import parse
from real_kafka import ApacheKafka, Unavailable, open_apache_kafka

from taskd import aio
from taskd.log.base import Outgoing, Writer
from taskd.log.kafka import KafkaLog
from taskd.producer.build import outgoing
from taskd.wire.envelope import scan

OUTAGE_S = int(os.environ.get("TASKD_TEST_OUTAGE_S", "600"))
WITHIN_S = 90.0  # for what must happen soon after Kafka went or came
DUE_S = OUTAGE_S // 2  # these run in the middle of it

pytestmark = [pytest.mark.kafka, pytest.mark.process, pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("_", [None], ids=[f"{OUTAGE_S} s"])
async def test_an_outage_of_kafka(tmp_path: Path, _: None) -> None:
    async with aio.open_loop(), trio.open_nursery() as nursery:
        for fault in ("killed", "frozen"):
            (tmp_path / fault).mkdir()
            nursery.start_soon(_outlive, tmp_path / fault, fault)


async def _outlive(folder: Path, fault: str) -> None:
    install_plugin(folder / "plugin", "recorded-tasks", "recorded_tasks")
    record = folder / "record"
    record.touch()
    environment = {"PYTHONPATH": python_path(folder / "plugin", HERE), tasks.RECORD: str(record)}
    async with open_kafka() as kafka, open_daemons(folder, environment) as daemons:
        scene = Scene(kafka, daemons, folder)
        await scene.play(fault)


@asynccontextmanager
async def open_kafka() -> AsyncIterator[ApacheKafka]:
    manager = open_apache_kafka()
    try:
        kafka = await trio.to_thread.run_sync(manager.__enter__)
    except Unavailable as error:
        pytest.skip(str(error))
    try:
        yield kafka
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(manager.__exit__, None, None, None)


class Scene:
    def __init__(self, kafka: ApacheKafka, daemons: Daemons, folder: Path) -> None:
        self.kafka = kafka
        self.daemons = daemons
        self.folder = folder
        self.record = folder / "record"
        self.log = KafkaLog(kafka.listeners.plaintext)
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in ("first", "late")}
        self.sent: dict[str, str] = {}  # kind by key
        self.rng = random.Random(folder.name)

    def broker(self, name: str) -> tuple[Daemon, str]:
        """A broker with a store of its own, and its page of health. All are of one group."""
        rpc, http = self.addresses[name], f"127.0.0.1:{free_port()}"
        daemon = self.daemons.start(
            "broker",
            *("--data-dir", str(self.folder / name)),
            *("--rpc-port", rpc.split(":")[1], "--http-port", http.split(":")[1]),
            more={
                "TASKD_LOG__KIND": "kafka",
                "TASKD_LOG__CLUSTERS__DEFAULT__ADDRESS": self.kafka.listeners.plaintext,
                "TASKD_STORE__MAX_DELAY_S": "86400",
            },
        )
        return daemon, f"http://{http}/readyz"

    async def play(self, fault: str) -> None:
        broker, health = self.broker("first")
        await broker.said("broker listens")
        known = [argument for address in self.addresses.values() for argument in ("--broker", address)]
        worker = self.daemons.start("worker", *known, "--slots", "2")
        await until_ready(health, True)
        async with self.log.open_writer() as writer, trio.open_nursery() as watching:
            watching.start_soon(broker.must_live)
            watching.start_soon(worker.must_live)
            await self.append(writer, "noop", 100)
            await self.append(writer, "retried", 5)
            await self.ended(set(self.sent))
            due = await self.append(writer, "noop", 20, countdown=DUE_S)
            due |= await self.append(writer, "retried", 10, countdown=DUE_S)
            await self.append(writer, "fails", 10, countdown=DUE_S)
            due_at = trio.current_time() + DUE_S

            async with trio.open_nursery() as producing:
                for _ in range(4):
                    producing.start_soon(self.append, writer, "noop", 500)
                await trio.sleep(0.3)  # in the middle of its work
                began_at = trio.current_time()
                memory_kb = resident_kb(broker)
                await self.away(fault)
                late, late_health = self.broker("late")  # its start falls into the outage
                await late.said("broker listens")
                watching.start_soon(late.must_live)
                reason = await until_ready(health, False)
                assert "the log cannot be reached" in reason or "not connected" in reason, reason
                assert await until_ready(late_health, False)

                await trio.sleep_until(due_at)
                await self.began(due)  # what is stored is served meanwhile
                assert not await is_ready(health)
                await trio.sleep_until(began_at + OUTAGE_S)
                assert not await is_ready(health)
                assert not await is_ready(late_health)
                grown_kb = resident_kb(broker) - memory_kb
                await self.back(fault)
                came_at = trio.current_time()
                await until_ready(health, True)
                await until_ready(late_health, True)
                ready_s = trio.current_time() - came_at
            await self.append(writer, "noop", 100)
            await self.ended({key for key, kind in self.sent.items() if kind != "fails"})
            await self.dead_lettered({key for key, kind in self.sent.items() if kind == "fails"})
            watching.cancel_scope.cancel()
        for daemon in (worker, broker, late):
            assert await daemon.stopped() == 0, daemon.tail()
        for entry in (*broker.entries(), *late.entries()):  # the errors of tasks are not ours
            assert entry["message"] == "dead-lettered" or "Traceback" not in json.dumps(entry), entry
        starts = Counter(line.id for line in parse(self.record.read_text()) if line.word == "START")
        print(
            f"{fault} for {OUTAGE_S} s: {len(self.sent)} activations, {sum(starts.values())} starts, "
            f"{sum(count - 1 for count in starts.values())} doubled, ready after {ready_s:.1f} s, "
            f"broker grew by {grown_kb} kB"
        )

    async def away(self, fault: str) -> None:
        if fault == "killed":
            await trio.to_thread.run_sync(self.kafka.kill)
        else:
            self.kafka.send(signal.SIGSTOP)

    async def back(self, fault: str) -> None:
        if fault == "killed":
            await trio.to_thread.run_sync(self.kafka.start)
        else:
            self.kafka.send(signal.SIGCONT)

    async def append(self, writer: Writer, kind: str, number: int, countdown: int | None = None) -> set[str]:
        """Produce so many, as a producer that does not give up; returns their keys."""
        keys = {f"{kind}-{self.rng.getrandbits(64):016x}" for _ in range(number)}
        waiting: list[Outgoing] = []
        for key in keys:
            call = getattr(tasks, kind).to_call(kwargs={"key": key}, countdown=countdown)
            waiting.append(outgoing(call, time.time_ns() // 1_000_000, "taskd"))
            self.sent[key] = kind
        while waiting:
            answers = await writer.append(waiting[:50])
            refused = [
                r for r, answer in zip(waiting, answers, strict=False) if isinstance(answer, Exception)
            ]
            waiting = [*refused, *waiting[50:]]
            await trio.sleep(0.05)  # spreads the load
        return keys

    async def began(self, keys: set[str]) -> None:
        await self._written("START", keys)

    async def ended(self, keys: set[str]) -> None:
        await self._written("END", keys)

    async def _written(self, word: str, keys: set[str]) -> None:
        with trio.move_on_after(WITHIN_S):
            while missing := keys - self._keys(word):  # noqa: ASYNC110  # files give no event to wait for
                await trio.sleep(0.2)
        assert not missing, f"{len(missing)} did not {word}, such as {sorted(missing)[:3]}"

    def _keys(self, word: str) -> set[str]:
        return {line.key for line in parse(self.record.read_text()) if line.word == word}

    async def dead_lettered(self, keys: set[str]) -> None:
        """Each ran twice, failed, and came to the dead letters."""
        failed = {
            line.id for line in parse(self.record.read_text()) if line.key in keys and line.attempts == 1
        }
        assert len(failed) == len(keys)
        found: set[str] = set()
        async with self.log.open_reader(["taskd-dlq"], "test") as reader, trio.open_nursery() as nursery:
            nursery.start_soon(_ignore, reader.assignments)
            with trio.fail_after(WITHIN_S):
                while not failed <= found:
                    found |= {scan(record.value).id for record in await reader.read_batch(100, 1)}
            nursery.cancel_scope.cancel()


async def _ignore(changes: trio.MemoryReceiveChannel[Any]) -> None:
    async for _ in changes:
        pass


async def until_ready(url: str, wanted: bool) -> str:
    """Wait until a broker says so; returns the page."""
    status = "ready" if wanted else "not ready"
    with trio.fail_after(WITHIN_S):
        while (page := await _page(url))["status"] != status:  # noqa: ASYNC110  # only asking tells
            await trio.sleep(0.2)
    return json.dumps(page)


async def is_ready(url: str) -> bool:
    return bool((await _page(url))["status"] == "ready")


async def _page(url: str) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        try:
            with urllib.request.urlopen(url, timeout=WITHIN_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as answer:
            with answer:
                return json.load(answer)

    return await trio.to_thread.run_sync(ask)


def resident_kb(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])
