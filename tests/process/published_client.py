"""An application of the published `taskbroker-client`, for the interpreter that has it; without taskd.

python published_client.py activations 100    what it would produce, one JSON line each
python published_client.py work HOST:PORT N   its worker, with N child processes
python published_client.py push HOST:PORT N   the same, listening at TASKD_TEST_PUSH_PORT to be pushed to

TASKD_TEST_SECRETS: a JSON list of what it shares with the broker.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import sys
import time

from taskbroker_client.app import TaskbrokerApp
from taskbroker_client.retry import LastAction, Retry, RetryTaskError
from taskbroker_client.state import current_task
from taskbroker_client.worker import PushTaskWorker, TaskWorker

KINDS = ("noop", "nap", "retried", "fails", "fails_once")


def no_producer(topic: str) -> None:
    raise AssertionError(f"the test produces, this application does not; asked for {topic}")


app = TaskbrokerApp(name="published", producer_factory=no_producer)
app.set_modules(["published_client"])
app.set_config({"rpc_secret": os.environ.get("TASKD_TEST_SECRETS")})
tasks = app.taskregistry.create_namespace("published", processing_deadline_duration=3)


def record(word: str, key: str) -> int:
    """As in recorded_tasks.py."""
    running = current_task()
    line = f"{word} {key} {running.id} {running.attempt}\n".encode()
    file = os.open(os.environ["TASKD_TEST_RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)
    return running.attempt


@tasks.register(name="noop")
def noop(key: str) -> None:
    record("START", key)
    record("END", key)


@tasks.register(name="nap")
def nap(key: str) -> None:
    record("START", key)
    time.sleep(0.05)
    record("END", key)


@tasks.register(name="retried", retry=Retry(times=3, times_exceeded=LastAction.Deadletter))
def retried(key: str) -> None:
    if record("START", key) < 2:
        raise RetryTaskError("not yet, by design")
    record("END", key)


@tasks.register(name="fails", retry=Retry(times=2, on=(ValueError,), times_exceeded=LastAction.Deadletter))
def fails(key: str) -> None:
    record("START", key)
    raise ValueError("fails by design")


@tasks.register(name="fails_once", retry=Retry(times=1, times_exceeded=LastAction.Deadletter))
def fails_once(key: str) -> None:
    record("START", key)
    raise ValueError("fails by design")


def print_activations(count: int) -> None:
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        key = f"{kind}-{random.getrandbits(64):016x}"
        activation = globals()[kind].create_activation([], {"key": key})
        value = base64.b64encode(activation.SerializeToString()).decode()
        print(json.dumps({"kind": kind, "key": key, "id": activation.id, "value": value}))


class WithExtras(logging.Formatter):
    """The client tells why a call failed in the attributes of the record, not in its text."""

    def format(self, record: logging.LogRecord) -> str:
        extras = {name: vars(record)[name] for name in ("status", "error") if name in vars(record)}
        return f"{record.levelname} {record.name} {record.getMessage()} {extras}"


def work(address: str, concurrency: int, push: bool) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(WithExtras())
    logging.basicConfig(level=logging.DEBUG, handlers=[handler])
    if push:
        return PushTaskWorker(
            app_module="published_client:app",
            broker_service=address,
            concurrency=concurrency,
            process_type="spawn",
            grpc_port=int(os.environ["TASKD_TEST_PUSH_PORT"]),
            drain_file_path=None,
        ).start()
    return TaskWorker(
        app_module="published_client:app",
        broker_hosts=[address],
        concurrency=concurrency,
        process_type="spawn",
    ).start()


if __name__ == "__main__":
    if sys.argv[1] in ("work", "push"):
        sys.exit(work(sys.argv[2], int(sys.argv[3]), push=sys.argv[1] == "push"))
    print_activations(int(sys.argv[2]))
