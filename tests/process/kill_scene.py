"""What the kill tests share: a broker that comes back on its folder and port, workers with witness tasks,
producers that do not give up, and the books at the end.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import recorded_tasks as tasks
import trio
from daemons import HERE, Daemon, Daemons, free_port, install_plugin, open_daemons, python_path
from history import History, Line, Produced, named, parse, read_files
from pydantic import SecretStr

from taskd import aio
from taskd.admin.wait import Seen, get_status, wait_for
from taskd.config.schema import ProducerConfig
from taskd.log.base import Outgoing, Position, Writer
from taskd.producer.build import outgoing
from taskd.producer.destination import destination
from taskd.rpc.access import Access
from taskd.rpc.client import connect
from taskd.wire.signing import Secrets

TOPIC = "taskd"
APPEND_WITHIN_S = 2.0
SETTLE_WITHIN_S = 120.0
STATUS_IDS = 500
READY = {"broker": "broker listens", "worker": "pool ready"}

# Short times, so that what a fault delays is over soon. Nothing may depend on them.
BROKER = {
    "TASKD_UPKEEP__STARTUP_QUIET_S": "0.5",
    "TASKD_UPKEEP__INTERVAL_S": "0.1",
    "TASKD_DISPATCH__LEASE_S": "2",
    "TASKD_DISPATCH__PROCESSING_DEADLINE_GRACE_S": "0.5",
}

MIXTURE = {"noop": 55, "nap": 8, "retried": 12, "fails": 8, "fails_once": 5, "once": 6, "delayed": 6}


@dataclass(slots=True)
class Books:
    """What was produced and acknowledged; `attempts`: appends sent, those without an answer included."""

    produced: list[Produced] = field(default_factory=list)
    appends: int = 0
    unanswered: int = 0


class Scene:
    """Opened by `open_scene`."""

    def __init__(self, folder: Path, daemons: Daemons, settings: Mapping[str, str]) -> None:
        self.data_dir = folder / "data"
        self.record = folder / "record"
        self.record.touch()
        self.books = Books()
        self.rpc_port = free_port()
        self.address = f"127.0.0.1:{self.rpc_port}"
        self.max_processing_attempts = int(settings.get("TASKD_STORE__MAX_PROCESSING_ATTEMPTS", "5"))
        self.daemons = daemons
        self.secret = ""  # that signs what this scene itself asks of the broker
        self._settings = BROKER | dict(settings)

    # ---- processes

    def broker(self) -> Daemon:
        """A broker on the folder and port of this scene; not yet ready."""
        ports = ("--rpc-port", str(self.rpc_port), "--http-port", "0")
        return self.daemons.start("broker", "--data-dir", str(self.data_dir), *ports, more=self._settings)

    def worker(self, slots: int = 2, more: Mapping[str, str] | None = None) -> Daemon:
        """A worker of this broker. `more`: of its environment."""
        environment = {tasks.RECORD: str(self.record)} | dict(more or {})
        return self.daemons.start("worker", "--broker", self.address, "--slots", str(slots), more=environment)

    # ---- producing

    async def produce(self, rng: random.Random, most: int, enough: trio.Event) -> None:
        """Append batches of the mixture until `most` are acknowledged, or `enough` is set."""
        async with self._open_writer() as writer:
            sent = 0
            while sent < most and not enough.is_set():
                batch = [make(rng) for _ in range(rng.randint(1, 30))]
                await self.append(writer, batch)
                sent += len(batch)
                await trio.sleep(rng.uniform(0, 0.15))  # spreads the load over the run

    def _open_writer(self) -> AbstractAsyncContextManager[Writer]:
        secret = SecretStr(self.secret) if self.secret else None
        config = ProducerConfig(broker=self.address, timeout_s=APPEND_WITHIN_S, secret=secret)
        return destination(config).open_writer()

    async def append(self, writer: Writer, batch: Sequence[tuple[Produced, Outgoing]]) -> None:
        """Append until each is acknowledged, as a producer that does not give up: the same bytes again."""
        waiting = list(batch)
        with trio.move_on_after(SETTLE_WITHIN_S):
            while waiting:
                waiting = await self._append_once(writer, waiting)
                if waiting:
                    self.books.unanswered += 1
                    await trio.sleep(0.05)
        newest = self.daemons.all[-1]
        assert not waiting, f"nobody takes records for {SETTLE_WITHIN_S:g} s; {newest}:\n{newest.tail()}"

    async def _append_once(
        self, writer: Writer, batch: Sequence[tuple[Produced, Outgoing]]
    ) -> list[tuple[Produced, Outgoing]]:
        """Book what is acknowledged; the rest is returned."""
        self.books.appends += 1
        answers = await writer.append([record for _, record in batch])
        pairs = list(zip(batch, answers, strict=True))
        self.books.produced += [made for (made, _), answer in pairs if isinstance(answer, Position)]
        return [item for item, answer in pairs if not isinstance(answer, Position)]

    async def produce_these(self, *batch: tuple[Produced, Outgoing]) -> None:
        async with self._open_writer() as writer:
            await self.append(writer, batch)

    async def produce_junk(self, *values: bytes) -> None:
        """Append records that are no activations, and are in no book."""
        async with self._open_writer() as writer:
            answers = await writer.append([Outgoing(TOPIC, value) for value in values])
        assert all(isinstance(answer, Position) for answer in answers), answers

    # ---- the end

    async def settle(self) -> dict[str, Seen]:
        """Wait until everything produced has ended; what the broker says of all that ran."""
        async with connect(self.address, Access(Secrets([self.secret] if self.secret else []))) as client:
            ids = [produced.id for produced in self.books.produced]
            finals = await wait_for(client, ids, timeout_s=SETTLE_WITHIN_S)
            followed = {line.id for line in self.lines()} | {final.last_id for final in finals}
            statuses: dict[str, Seen] = {}
            unseen = sorted({*ids, *followed})
            while unseen:
                for start in range(0, len(unseen), STATUS_IDS):
                    found = await get_status(client, unseen[start : start + STATUS_IDS])
                    statuses.update({seen.id: seen for seen in found})
                retries = {seen.continued_as for seen in statuses.values() if seen.continued_as}
                unseen = sorted(retries - statuses.keys())
            return statuses

    def lines(self) -> list[Line]:
        return parse(self.record.read_text())

    async def close_the_books(self, broker: Daemon, *workers: Daemon) -> History:
        """Wait for the end of everything, stop all in good order, read what they left, and judge it."""
        async with trio.open_nursery() as watching:
            for daemon in (broker, *workers):
                watching.start_soon(daemon.must_live)
            statuses = await self.settle()
            watching.cancel_scope.cancel()
        for daemon in (*workers, broker):
            if ready := READY.get(daemon.name):
                await daemon.said(ready)  # one that just started could not yet stop in good order
            assert await daemon.stopped() == 0, f"{daemon}\n{daemon.tail()}"
        history = History(
            self.books.produced,
            self.lines(),
            statuses,
            read_files(self.data_dir),
            self.max_processing_attempts,
        )
        problems = history.check()
        print(history.report(), f"{self.books.unanswered} of {self.books.appends} appends failed", sep="; ")
        assert not problems, named(problems)
        return history

    async def started(self, key: str, times: int = 1) -> None:
        """Until tasks of this key have written so many STARTs."""
        with trio.fail_after(SETTLE_WITHIN_S):
            while self._starts(key) < times:  # noqa: ASYNC110  # files give no event to wait for
                await trio.sleep(0.02)

    def _starts(self, key: str) -> int:
        return sum(line.key == key and line.word == "START" for line in self.lines())


def make(rng: random.Random, kind: str = "", **arguments: object) -> tuple[Produced, Outgoing]:
    """One activation of the mixture, or of that kind, and the record that carries it."""
    kind = kind or rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    key = f"{kind}-{rng.getrandbits(64):016x}"
    if kind in ("nap", "once"):
        arguments = {"seconds": round(rng.uniform(0.0, 0.1), 3)} | arguments
    task = {"delayed": tasks.noop, "unknown": tasks.noop}.get(kind) or getattr(tasks, kind)
    countdown = rng.randint(1, 2) if kind == "delayed" else None
    call = task.to_call(kwargs={"key": key, **arguments}, countdown=countdown)
    if kind == "unknown":
        call = replace(call, taskname="nobody_registers_this")
    record = outgoing(call, time.time_ns() // 1_000_000, TOPIC)
    return Produced(key, kind, call.id, record.value), record


@asynccontextmanager
async def open_scene(folder: Path, **settings: str) -> AsyncIterator[Scene]:
    """`settings`: further ones of the broker, as environment variables."""
    plugin = folder / "plugin"
    install_plugin(plugin, "recorded-tasks", "recorded_tasks")
    async with aio.open_loop(), open_daemons(folder, {"PYTHONPATH": python_path(plugin, HERE)}) as daemons:
        yield Scene(folder, daemons, settings)
