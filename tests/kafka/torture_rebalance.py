"""Brokers of one consumer group, restarted over and over while records come in: is each stored exactly once?

    python tests/kafka/real_kafka.py .venv/bin/python tests/kafka/torture_rebalance.py [--seed N]

Each broker is a `taskd broker` process with a store of its own and no workers, so what it stored stays
there to be counted. Nothing may be missing or doubled over all the stores, no store may exceed its
limit, and no log may hold an error. A broker whose store is full at the end is stopped, so that the
others take its partitions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import trio
import yaml

from taskd import aio
from taskd.log.base import Outgoing, Partition, Position
from taskd.log.kafka import KafkaLog
from taskd.producer.build import build
from taskd.tasks.outbox import Call

START_WITHIN_S = 60.0
EXIT_WITHIN_S = 10.0  # after SIGINT, also in the middle of a rebalance
SETTLE_WITHIN_S = 180.0
LOOK_EVERY_S = 0.5
CHUNK = 500  # records appended at once


@dataclass(frozen=True)
class Plan:
    """`pause_s`: from listening to the next SIGINT, at least and at most. `capacity`: rows of one store."""

    brokers: int = 8
    partitions: int = 32
    records: int = 100_000
    restarts: int = 16
    pause_s: tuple[float, float] = (4.0, 30.0)
    capacity: int = 25_000
    static: bool = False


@dataclass
class Report:
    stored: dict[int, int]
    lost: list[tuple[str, int, int]]
    doubled: list[tuple[str, int, int]]
    exceeded: list[str]
    errors: list[str]
    exits: Counter[int]
    slowest_exit_s: float
    warnings: Counter[str]
    seconds: float

    @property
    def problems(self) -> list[str]:
        found = [*self.exceeded, *self.errors]
        if self.lost:
            found.append(f"{len(self.lost)} records lost, such as {self.lost[:5]}")
        if self.doubled:
            found.append(f"{len(self.doubled)} records stored more than once, such as {self.doubled[:5]}")
        if set(self.exits) != {0}:
            found.append(f"exit codes {dict(self.exits)}, expected only 0")
        if self.slowest_exit_s > EXIT_WITHIN_S:
            found.append(f"an exit took {self.slowest_exit_s:.1f} s, at most {EXIT_WITHIN_S:g} s are allowed")
        return found

    def __str__(self) -> str:
        return (
            f"{sum(self.stored.values())} records over {len(self.stored)} stores {self.stored}, "
            f"{len(self.lost)} lost, {len(self.doubled)} doubled, {sum(self.exits.values())} exits "
            f"(slowest {self.slowest_exit_s:.1f} s), {len(self.errors)} errors in logs, "
            f"warnings {dict(self.warnings)}, {self.seconds:.0f} s"
        )


class Broker:
    """One store and the processes that work on it one after the other."""

    def __init__(self, number: int, folder: Path, config: dict[str, object]) -> None:
        self.number = number
        self._folder = folder / f"broker-{number}"
        self._folder.mkdir()
        self._output = self._folder / "output"
        (self._folder / "broker.yaml").write_text(yaml.safe_dump(config))
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.exits: Counter[int] = Counter()
        self.slowest_exit_s = 0.0

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TASKD_")}
        self._starts += 1
        with self._output.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "taskd", "broker", "--config", "broker.yaml"],
                cwd=self._folder,
                env=clean,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def listens(self) -> None:
        """Wait until it is up: a signal that comes while Python still imports has nobody to take it."""
        deadline = trio.current_time() + START_WITHIN_S
        while trio.current_time() < deadline:
            if sum(entry.get("message") == "broker listens" for entry in self.log()) == self._starts:
                return
            await trio.sleep(0.1)
        raise TimeoutError(f"broker {self.number} did not listen within {START_WITHIN_S:g} s")

    async def interrupt(self) -> None:
        if self._process is None:
            return
        before = time.monotonic()
        self._process.send_signal(signal.SIGINT)
        try:
            await trio.to_thread.run_sync(self._process.wait, EXIT_WITHIN_S * 3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.slowest_exit_s = max(self.slowest_exit_s, time.monotonic() - before)
        self.exits[self._process.returncode] += 1
        self._process = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def rows(self) -> list[tuple[str, int, int]]:
        with self._store() as store:
            if store is None:
                return []
            return store.execute('SELECT topic, partition, "offset" FROM inflight').fetchall()

    def count(self) -> int:
        with self._store() as store:
            return 0 if store is None else store.execute("SELECT sum(count) FROM depth").fetchone()[0] or 0

    def _store(self) -> closing[sqlite3.Connection] | _Nothing:
        path = self._folder / "data" / "inflight.sqlite"
        if not path.exists():
            return _Nothing()
        return closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True))

    def log(self) -> Iterator[dict[str, object]]:
        if not self._output.exists():
            return
        for line in self._output.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"level": "error", "message": line}  # a traceback has no shape
            yield entry


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


async def torture(address: str, plan: Plan, seed: int) -> Report:
    began = time.monotonic()
    rng = random.Random(seed)
    topic = f"torture-{uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="taskd-torture-") as folder:
        brokers = [
            Broker(number, Path(folder), _config(address, topic, plan, number))
            for number in range(plan.brokers)
        ]
        try:
            ends = await _run(address, topic, plan, brokers, rng)
            return _judge(brokers, ends, plan, time.monotonic() - began)
        finally:
            for broker in brokers:
                broker.kill()


def _config(address: str, topic: str, plan: Plan, number: int) -> dict[str, object]:
    terms: dict[str, object] = {"consumer_group": topic, "partitions": plan.partitions}
    if plan.static:
        terms["group_instance_id"] = f"broker-{number}"
    return {
        "data_dir": "data",
        "rpc": {"port": 0},
        "http": {"port": 0},
        "log": {
            "kind": "kafka",
            "topics": {topic: terms},
            "clusters": {"default": {"address": address}},
            "deadletter_topic": f"{topic}-dlq",
        },
        "store": {"max_pending_count": plan.capacity},
        "log_format": "json",
    }


async def _run(
    address: str, topic: str, plan: Plan, brokers: list[Broker], rng: random.Random
) -> dict[Partition, int]:
    """Restart and produce, until everything is stored; returns how many records each partition has."""
    seconds = plan.restarts * sum(plan.pause_s) / 2
    ends: Counter[Partition] = Counter()
    async with aio.open_loop():
        log = KafkaLog(address)
        await log.ensure_topics({topic: plan.partitions})
        async with log.open_writer() as writer, trio.open_nursery() as nursery:
            for broker in brokers:
                nursery.start_soon(_restart, broker, plan, random.Random(rng.random()))
            for first in range(0, plan.records, CHUNK):
                due = trio.current_time() + seconds * CHUNK / plan.records
                values = [_activation(n) for n in range(first, min(first + CHUNK, plan.records))]
                left = [Outgoing(topic, value, uuid4().bytes) for value in values]
                while left:
                    answers = await writer.append(left)
                    ends.update(a.partition for a in answers if isinstance(a, Position))
                    left = [
                        record
                        for record, answer in zip(left, answers, strict=True)
                        if isinstance(answer, Exception)
                    ]
                await trio.sleep_until(due)
    await _settle(plan, brokers)
    return ends


async def _restart(broker: Broker, plan: Plan, rng: random.Random) -> None:
    broker.start()
    for _ in range(plan.restarts):
        await broker.listens()
        await trio.sleep(rng.uniform(*plan.pause_s))
        await broker.interrupt()
        broker.start()
    await broker.listens()


async def _settle(plan: Plan, brokers: list[Broker]) -> None:
    """Until all is stored; whoever is full makes way."""
    with trio.move_on_after(SETTLE_WITHIN_S):
        while sum(broker.count() for broker in brokers) < plan.records:
            for broker in brokers:
                if broker.running and broker.count() >= plan.capacity:
                    await broker.interrupt()
            await trio.sleep(LOOK_EVERY_S)
    await trio.sleep(2)  # for copies that may still come
    for broker in brokers:
        await broker.interrupt()


def _activation(number: int) -> bytes:
    call = Call(
        id=uuid4().hex,
        namespace="torture",
        taskname="none",
        application="torture",
        topic="",
        args=(number,),
        kwargs={},
    )
    return build(call, time.time_ns() // 1_000_000)


def _judge(brokers: list[Broker], ends: dict[Partition, int], plan: Plan, seconds: float) -> Report:
    rows = Counter(row for broker in brokers for row in broker.rows())
    wanted = {(p.topic, p.number, offset) for p, end in ends.items() for offset in range(end)}
    entries = [(broker.number, entry) for broker in brokers for entry in broker.log()]
    stored = {broker.number: len(broker.rows()) for broker in brokers}
    return Report(
        stored=stored,
        lost=sorted(wanted - rows.keys()),
        doubled=sorted(row for row, times in rows.items() if times > 1),
        exceeded=[
            f"broker {number} holds {count} rows, at most {plan.capacity} are allowed"
            for number, count in stored.items()
            if count > plan.capacity
        ],
        errors=[
            f"broker {number}: {json.dumps(entry)}"
            for number, entry in entries
            if entry.get("level") in ("error", "critical", "exception")
        ],
        exits=sum((broker.exits for broker in brokers), Counter()),
        slowest_exit_s=max(broker.slowest_exit_s for broker in brokers),
        warnings=Counter(str(e.get("message")) for _, e in entries if e.get("level") == "warning"),
        seconds=seconds,
    )


def main() -> int:
    options = argparse.ArgumentParser(description="restart brokers of one group over and over")
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options.add_argument("--brokers", type=int, default=Plan.brokers)
    options.add_argument("--restarts", type=int, default=Plan.restarts)
    options.add_argument("--records", type=int, default=Plan.records)
    options.add_argument("--static", action="store_true", help="static members of the group")
    given = options.parse_args()
    plan = Plan(given.brokers, records=given.records, restarts=given.restarts, static=given.static)
    address = os.environ.get("TASKD_TEST_KAFKA")
    if not address:
        print("expected TASKD_TEST_KAFKA=host:port; `make torture-rebalance` sets it", file=sys.stderr)
        return 1
    print(f"seed {given.seed}, {plan}", flush=True)
    report = trio.run(torture, address, plan, given.seed)
    print(report)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
