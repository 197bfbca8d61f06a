"""One `taskd broker` process, worked from outside: appended to, asked for tasks, heard by its log lines.

Synchronous, so that one process can serve all tests of a module. Waiting is waiting for a log line: at
level debug there is one for each transition.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import apsw
import grpc
import msgpack
import trio
from daemons import clean_environment

from taskd import aio
from taskd.log.base import Outgoing
from taskd.log.kafka import KafkaLog
from taskd.producer.append_codec import encode_request
from taskd.producer.destination import APPEND
from taskd.wire import consumer
from taskd.wire.envelope import scan
from taskd.wire.frames import BrokerFrame, WorkerFrame
from taskd.wire.frames_codec import decode_broker_frame, encode_worker_frame
from taskd.wire.generated.sentry_protos.taskbroker.v1 import (
    GetTaskRequest,
    RetryState,
    SetTaskStatusRequest,
    SetTaskStatusResponse,
    TaskActivation,
    TaskActivationStatus,
)
from taskd.wire.protobuf import fields

WITHIN_S = 30.0  # only a broken broker takes so long
TOPIC, DLQ = "taskd", "taskd-dlq"
WORK = "/taskd.v1.DispatchService/Work"
OPTIONS = [("grpc.max_receive_message_length", 20 << 20), ("grpc.max_send_message_length", 20 << 20)]

# Short times, so that what takes its time is over soon. A deadline is cut to a fraction of a second.
QUICK = {
    "UPKEEP__STARTUP_QUIET_S": "0",
    "UPKEEP__INTERVAL_S": "0.05",
    "DISPATCH__PROCESSING_DEADLINE_GRACE_S": "0",
    "STORE__MAX_PROCESSING_DEADLINE_S": "0.2",
    "DRAIN_GRACE_S": "0.2",
    "LOG_LEVEL": "debug",
}


def new_id() -> str:
    return uuid.uuid4().hex


def activation(id_: str, application: str, **more: Any) -> bytes:
    """A serialized activation of a task that nobody has to know."""
    more = {"namespace": "ns", "taskname": "task", "processing_deadline_duration": 10, **more}
    return bytes(TaskActivation(id=id_, application=application, **more))


def dead_letter_policy(attempts: int = 0, **more: Any) -> RetryState:
    return RetryState(attempts=attempts, max_attempts=3, on_attempts_exceeded=2, **more)


@dataclass(frozen=True, slots=True)
class Stored:
    """A record of the embedded log."""

    key: bytes | None
    value: bytes
    headers: Mapping[str, str]

    @property
    def id(self) -> str:
        return scan(self.value).id


class RunningBroker:
    """Listens once it is made; ends with the block, whatever happened."""

    def __init__(self, data_dir: Path, settings: Mapping[str, str]) -> None:
        self.data_dir = data_dir
        self.began = time.monotonic()
        values = QUICK | dict(settings)
        arguments = ("--data-dir", str(data_dir), "--rpc-port", "0", "--http-port", "0")
        self._news = threading.Condition()
        self._entries: list[dict[str, Any]] = []
        self._by_message: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._others: list[str] = []
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "taskd", "broker", *arguments],
            env=clean_environment({f"TASKD_{name}": value for name, value in values.items()}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            listens = self.said("broker listens")
        except AssertionError:
            self.end()
            raise
        self.rpc, self.http = listens["rpc"], listens["http"]
        self.channel = grpc.insecure_channel(self.rpc, options=OPTIONS)

    def __enter__(self) -> RunningBroker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if hasattr(self, "channel"):
            self.channel.close()
        self.process.kill()
        self.process.wait()
        self._listener.join(WITHIN_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code, after asking it to stop."""
        self.process.send_signal(number)
        return self.process.wait(WITHIN_S)

    # ---- what it says

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                try:
                    entry = json.loads(line)
                except ValueError:
                    self._others.append(line.decode("utf-8", "replace"))
                else:
                    self._entries.append(entry)
                    self._by_message[entry["message"]].append(entry)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def entries(self, message: str, **more: Any) -> list[dict[str, Any]]:
        """Its log lines of this message, with these values."""
        with self._news:
            return self._found(message, more)

    def _found(self, message: str, more: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            entry
            for entry in self._by_message[message]
            if all(entry.get(name) == value for name, value in more.items())
        ]

    def said(self, message: str, **more: Any) -> dict[str, Any]:
        """The first such line, as soon as it is there."""
        with self._news:
            self._news.wait_for(lambda: self._found(message, more) or self._ended, WITHIN_S)
            found = self._found(message, more)
            last = [str(entry) for entry in self._entries[-40:]] + self._others[-40:]
        assert found, f"it did not say {message!r} {more}:\n" + "\n".join(last)
        return found[0]

    def said_with(self, message: str, key: str) -> dict[str, Any]:
        """The last line of this message that has such a key, as soon as there is one."""

        def found() -> list[dict[str, Any]]:
            return [entry for entry in self._found(message, {}) if key in entry]

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, WITHIN_S)
            assert found(), f"it did not say {message!r} with {key}: {self._found(message, {})}"
            return found()[-1]

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for what no log line tells, such as a committed offset."""
        deadline = time.monotonic() + WITHIN_S
        while not true():
            assert time.monotonic() < deadline, "it did not come true"
            self.pause()

    def pause(self) -> None:
        """A moment, or until it says something."""
        with self._news:
            self._news.wait(0.02)

    def became(self, id_: str, status: str, times: int = 1) -> None:
        """Wait until this activation has come to this status, so many times."""

        def moves() -> int:
            return len(self._found("transition", {"id": id_, "status": status}))

        with self._news:
            self._news.wait_for(lambda: moves() >= times or self._ended, WITHIN_S)
            seen = [(e["by"], e["status"]) for e in self._found("transition", {"id": id_})]
            last = [str(entry) for entry in self._entries[-10:]] + self._others[-40:]
            assert moves() >= times, f"{id_} did not become {status}: {seen}\n" + "\n".join(last)

    def history(self, id_: str) -> list[str]:
        """The statuses an activation had, in order."""
        return [entry["status"] for entry in self.entries("transition", id=id_)]

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 when there is none."""
        _, page = self.get("/metrics")
        inside = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
        pattern = re.escape(name + (f"{{{inside}}}" if inside else "")) + r" (\S+)$"
        found = re.search("^" + pattern, page, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an HTTP page."""
        opener = build_opener(ProxyHandler({}))
        opener.process_response = {}  # type: ignore[attr-defined]  # 503 is an answer, no exception
        with opener.open(f"http://{self.http}{path}", timeout=WITHIN_S) as response:
            return response.status, response.read().decode()

    def operate(self, *arguments: str) -> None:
        """Give an operator's order by the command line."""
        command = [sys.executable, "-m", "taskd", *arguments, "--socket", str(self.data_dir / "admin.sock")]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    # ---- a producer

    def produce_to_kafka(self, address: str, *values: bytes, topic: str = TOPIC) -> None:
        """Append to a topic of Kafka; durable when this returns."""

        async def append() -> None:
            async with aio.open_loop(), KafkaLog(address).open_writer() as writer:
                answers = await writer.append([Outgoing(topic, value) for value in values])
                assert not [answer for answer in answers if isinstance(answer, Exception)], answers

        trio.run(append)

    def produce(
        self,
        *values: bytes,
        topic: str = TOPIC,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """Append to the embedded log; durable when this returns."""
        records = [Outgoing(topic, value, key, tuple(headers)) for value in values]
        self.call(APPEND, encode_request(records))

    def add(self, application: str, **more: Any) -> str:
        """Produce one activation, wait until it is stored, and return its id."""
        id_ = more.pop("id_", None) or new_id()
        key = more.pop("key", None)
        self.produce(activation(id_, application, **more), key=key)
        self.said("transition", id=id_, before="")
        return id_

    # ---- a worker that makes unary calls

    def call(self, path: str, body: bytes) -> bytes:
        answer: bytes = self.channel.unary_unary(path)(body, timeout=WITHIN_S)
        return answer

    def get_task(self, application: str | None = None, namespace: str | None = None) -> TaskActivation | None:
        raw = self.get_raw_task(application, namespace)
        return None if raw is None else TaskActivation.parse(raw)

    def get_raw_task(self, application: str | None = None, namespace: str | None = None) -> bytes | None:
        """The bytes of the next activation; None: there is none."""
        request = bytes(GetTaskRequest(namespace=namespace, application=application))
        try:
            reply = self.call(f"/{consumer.SERVICE}/GetTask", request)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return None
        ((number, _, raw, _, _),) = fields(reply)
        assert number == 1
        assert isinstance(raw, bytes)
        return raw

    def task_soon(self, application: str) -> bytes:
        """The next activation, as soon as there is one."""
        found: list[bytes | None] = []

        def get() -> bool:
            found.append(self.get_raw_task(application))
            return found[-1] is not None

        self.until(get)
        raw = found[-1]
        assert raw is not None
        return raw

    def set_status(self, id_: str, status: int = consumer.COMPLETE, **more: Any) -> TaskActivation | None:
        request = SetTaskStatusRequest(id=id_, status=TaskActivationStatus(status), **more)
        reply = self.call(f"/{consumer.SERVICE}/SetTaskStatus", bytes(request))
        return SetTaskStatusResponse.parse(reply).task

    # ---- what an operator sees

    def records(self, topic: str = DLQ) -> list[Stored]:
        """Everything in a topic of the embedded log, by a second connection to its file."""
        with self._look("log.sqlite") as db:
            rows = db.execute(
                "SELECT key, value, headers FROM record JOIN partition ON position >> 40 = id "
                "WHERE topic = ? ORDER BY position",
                (topic,),
            )
            return [Stored(key, value, _headers(headers)) for key, value, headers in rows]

    def dead_letter(self, id_: str) -> Stored:
        """The one dead letter of an activation."""
        (found,) = [record for record in self.records() if record.headers["taskd-id"] == id_]
        return found

    def undecodable(self) -> list[Stored]:
        return [letter for letter in self.records() if letter.headers["taskd-reason"] == "undecodable"]

    def forget_commits(self, topic: str) -> None:
        """Let the next broker read a topic from its beginning. Only once this one has ended."""
        with _closing(apsw.Connection(str(self.data_dir / "log.sqlite"))) as db:
            db.execute(
                "UPDATE committed SET next_offset = 0 "
                "WHERE partition_id IN (SELECT id FROM partition WHERE topic = ?)",
                (topic,),
            )

    def committed(self, topic: str = TOPIC) -> int:
        """The offset to read next, over all partitions."""
        with self._look("log.sqlite") as db:
            query = (
                "SELECT sum(next_offset) FROM committed JOIN partition ON id = partition_id WHERE topic = ?"
            )
            return int(db.execute(query, (topic,)).fetchone()[0] or 0)

    def visible(self) -> int:
        """How many rows the view of existing operators shows."""
        with self._look("inflight.sqlite") as db:
            return int(db.execute("SELECT count(*) FROM inflight_taskactivations").fetchone()[0])

    def age_s(self) -> float:
        return time.monotonic() - self.began

    def column(self, id_: str, name: str) -> Any:
        """A column of an activation's row in the store."""
        with self._look("inflight.sqlite") as db:
            return db.execute(f"SELECT {name} FROM inflight WHERE id = ?", (id_,)).fetchone()[0]

    def _look(self, file: str) -> Any:
        return _closing(apsw.Connection(str(self.data_dir / file), flags=apsw.SQLITE_OPEN_READONLY))


@contextmanager
def running_worker(broker: RunningBroker, **environment: str) -> Iterator[None]:
    """A `taskd worker` process of this broker."""
    command = [sys.executable, "-m", "taskd", "worker", "--broker", broker.rpc, "--slots", "1"]
    process = subprocess.Popen(command, env=clean_environment(environment), process_group=0)
    try:
        yield
        process.terminate()
        assert process.wait(WITHIN_S) == 0
    finally:
        process.kill()
        process.wait()


class Worker:
    """A worker on the stream, frame by frame."""

    def __init__(self, broker: RunningBroker, *first: WorkerFrame) -> None:
        self._outgoing: list[bytes] = [encode_worker_frame(frame) for frame in first]
        self._more = threading.Condition()
        self._done = False
        self._incoming = broker.channel.stream_stream(WORK)(self._frames(), timeout=WITHIN_S)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with self._more:
            self._done = True
            self._more.notify()
        self._incoming.cancel()

    def send(self, frame: WorkerFrame) -> None:
        with self._more:
            self._outgoing.append(encode_worker_frame(frame))
            self._more.notify()

    def receive(self) -> BrokerFrame:
        return decode_broker_frame(next(self._incoming))

    def _frames(self) -> Iterator[bytes]:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._outgoing or self._done)
                if not self._outgoing:
                    return
                frame = self._outgoing.pop(0)
            yield frame


class _closing:
    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        db.set_busy_timeout(5_000)

    def __enter__(self) -> apsw.Connection:
        return self._db

    def __exit__(self, *_: object) -> None:
        self._db.close()


def _headers(packed: bytes | None) -> Mapping[str, str]:
    return {name: value.decode() for name, value in msgpack.unpackb(packed)} if packed else {}
