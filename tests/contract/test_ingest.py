"""Contract §3 and the raw topics of §4, row by row, against a running broker.

README.md beside this file says which test proves which row.
"""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from daemons import free_port, install_plugin, python_path
from running_broker import RunningBroker, activation, dead_letter_policy, new_id, running_worker

from taskd.activation.ids import retry_id
from taskd.ingest.decode import MAX_ACTIVATION_BYTES
from taskd.testing.kafka import is_real_cluster, open_local_kafka
from taskd.wire import parameters
from taskd.wire.consumer import RETRY
from taskd.wire.envelope import scan, scan_call
from taskd.wire.protobuf import bytes_field, text_field, varint_field

pytestmark = [pytest.mark.process, pytest.mark.slow]

HUGE = 2**64 - 1
READ = "taskd_ingest_records_total"
RAW = {
    "LOG__TOPICS__TASKD__PARTITIONS": "1",
    "LOG__TOPICS__EVENTS__PARTITIONS": "1",
    "LOG__TOPICS__EVENTS__RAW__NAMESPACE": "events",
    "LOG__TOPICS__EVENTS__RAW__APPLICATION": "foreign",
    "LOG__TOPICS__EVENTS__RAW__TASKNAME": "consume",
    "LOG__TOPICS__EVENTS__RAW__PROCESSING_DEADLINE_S": "10",
    "STORE__MAX_PROCESSING_DEADLINE_S": "10",
}


@pytest.fixture(scope="module")
def broker(start_broker: Any) -> RunningBroker:
    started: RunningBroker = start_broker()
    return started


@pytest.fixture(scope="module")
def tight(start_broker: Any) -> RunningBroker:
    """A broker with little room; an application may fill half of what waits."""
    started: RunningBroker = start_broker(
        STORE__MAX_PENDING_COUNT="20",
        STORE__MAX_DELAY_COUNT="5",
        STORE__MAX_PROCESSING_COUNT="4",
        STORE__MAX_PROCESSING_DEADLINE_S="20",
        INGEST__MAX_APPLICATION_SHARE="0.5",
        INGEST__OVERFLOW_TOPIC="taskd-long",
    )
    return started


@pytest.fixture
def app(request: pytest.FixtureRequest) -> str:
    """An application of the test's own, so that tests can share a broker."""
    return str(request.node.name)


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def drain(broker: RunningBroker, *apps: str, count: int) -> list[str]:
    """Take and complete so many activations of these applications, in turns; their ids in order."""
    ids: list[str] = []
    while len(ids) < count:
        got = [task.id for app in apps if (task := broker.get_task(app)) is not None]
        for id_ in got:
            broker.set_status(id_)
        ids += got
        if not got:
            broker.pause()
    return ids


# ---- Same


def test_same_offsets_follow_what_is_durable(start_broker: Any, app: str) -> None:
    broker: RunningBroker = start_broker()
    ids = [broker.add(app) for _ in range(3)]
    assert broker.committed() <= 3
    assert broker.stop() == 0
    assert broker.committed() == 3  # what was read is committed at the stop
    again: RunningBroker = start_broker(data_dir=broker.data_dir)
    after = again.add(app)
    assert again.metric(READ, topic="taskd", result="duplicate") == 0
    assert drain(again, app, count=4) == [*ids, after]


def test_same_a_duplicate_id_is_ignored_while_known(broker: RunningBroker, app: str) -> None:
    before = broker.metric(READ, topic="taskd", result="duplicate")
    raw = activation(id_ := new_id(), app)
    broker.produce(raw, activation(id_, app + "-other"), raw)
    broker.produce(raw)
    last = broker.add(app)
    assert broker.metric(READ, topic="taskd", result="duplicate") == before + 3
    assert drain(broker, app, count=2) == [id_, last]
    assert broker.get_task(app) is None
    assert broker.get_task(app + "-other") is None


def test_same_missing_application_is_empty_and_missing_received_at_is_now(broker: RunningBroker) -> None:
    raw = text_field(1, id_ := new_id()) + text_field(2, "bare") + text_field(3, "task")
    raw += varint_field(9, 3_600)
    broker.produce(raw)
    broker.became(id_, "pending")  # so it did not expire in 1970
    assert broker.get_raw_task("", "bare") == raw
    received_at_ms = broker.column(id_, "received_at_ms")
    assert abs(received_at_ms / 1000 - datetime.now(UTC).timestamp()) < 60
    broker.set_status(id_)


def test_same_expired_on_arrival_is_not_stored_but_dead_lettered_if_due(
    broker: RunningBroker, app: str
) -> None:
    old = {"received_at": ago(20), "expires": 10}
    before = broker.metric(READ, topic="taskd", result="expired")
    due, lost = new_id(), new_id()
    broker.produce(
        activation(due, app, retry_state=dead_letter_policy(), **old), activation(lost, app, **old)
    )
    for id_ in (due, lost):
        broker.became(id_, "gone")
        assert broker.history(id_) == ["expired", "gone"]
    assert broker.dead_letter(due).headers["taskd-reason"] == "expired"
    assert broker.get_task(app) is None
    assert broker.metric(READ, topic="taskd", result="expired") == before + 2


def pauses(broker: RunningBroker, reason: str) -> str:
    """What is said of why reading pauses, checked against the gauge and the readiness page."""
    words: str = broker.said_with("reading pauses", reason)[reason]
    assert broker.metric("taskd_backpressure", reason=reason) == 1
    return words


def test_same_backpressure_by_processing(tight: RunningBroker, app: str) -> None:
    for _ in range(5):
        tight.add(app)
    held = [task.id for _ in range(4) if (task := tight.get_task(app))]
    tight.produce(activation(new_id(), app))  # ends the read that was under way
    assert "max_processing_count is 4" in pauses(tight, "processing")
    late = new_id()
    tight.produce(activation(late, app))
    assert tight.history(late) == []
    for id_ in held:
        tight.set_status(id_)
    tight.became(late, "pending")
    drain(tight, app, count=3)


def test_same_backpressure_by_pending_a_batch_that_is_larger_is_split(tight: RunningBroker) -> None:
    """Better (c): the hundred of one append pass through room for twenty."""
    apps = [f"crowd-{number}" for number in range(10)]
    ids = [new_id() for _ in range(100)]
    tight.produce(*(activation(id_, apps[n % 10]) for n, id_ in enumerate(ids)))
    assert "max_pending_count is 20" in pauses(tight, "pending")
    assert tight.history(ids[20]) == []
    assert sorted(drain(tight, *apps, count=100)) == sorted(ids)


def test_same_backpressure_by_delayed(tight: RunningBroker, app: str) -> None:
    ids = [new_id() for _ in range(8)]
    tight.produce(*(activation(id_, app, delay=60, received_at=ago(58.5)) for id_ in ids))
    assert "max_delay_count is 5" in pauses(tight, "delayed")
    for id_ in ids:
        tight.became(id_, "pending")
    assert sorted(drain(tight, app, count=8)) == sorted(ids)


def test_same_backpressure_by_size(start_broker: Any, app: str) -> None:
    broker: RunningBroker = start_broker(STORE__MAX_SIZE_BYTES="1")
    assert "max_size_bytes is 1" in pauses(broker, "size")
    broker.produce(activation(id_ := new_id(), app))
    assert broker.history(id_) == []
    assert broker.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_same_a_clean_exit_also_while_work_is_held(
    start_broker: Any, app: str, number: signal.Signals
) -> None:
    broker: RunningBroker = start_broker(STORE__MAX_PROCESSING_DEADLINE_S="100")
    ids = [broker.add(app), broker.add(app)]
    assert broker.get_task(app) is not None
    broker.produce(*(activation(new_id(), app) for _ in range(500)))
    assert broker.stop(number) == 0
    (line,) = broker.entries("stopping while workers still hold activations")
    assert line["ids"] == ids[:1]


# ---- Better


def hostile(app: str) -> list[tuple[str, bytes]]:
    """Every number as large as it gets, and every length a lie."""
    state = b"".join(varint_field(number, HUGE) for number in range(1, 6))
    times = varint_field(1, HUGE) + varint_field(2, HUGE)
    numbers = b"".join(varint_field(number, HUGE) for number in (8, 9, 11))
    past = bytes_field(6, varint_field(1, 2**63))  # the most negative second
    named = [
        numbers + bytes_field(7, state) + bytes_field(6, times),
        numbers + past,
        bytes_field(7, state + varint_field(99, HUGE)),
        varint_field(8, 0) + varint_field(9, 0) + varint_field(11, 0),
    ]
    made = []
    for body in named:
        id_ = new_id()
        head = text_field(1, id_) + text_field(2, "ns") + text_field(3, "task") + text_field(12, app)
        made.append((id_, head + body))
    return made


def test_better_a_hostile_numbers_neither_crash_nor_overflow(broker: RunningBroker, app: str) -> None:
    made = hostile(app)
    broker.produce(*(raw for _, raw in made))
    for id_, _ in made:
        broker.said("transition", id=id_)
    after = broker.add(app)
    assert broker.history(after) == ["pending"]
    while (task := broker.get_raw_task(app)) is not None:
        handed = scan(task)
        assert task in {raw for _, raw in made} or handed.id == after
        broker.set_status(handed.id, RETRY, max_attempts=2**32 - 1, delay_on_retry=HUGE)
        broker.became(handed.id, "gone")
        broker.said("transition", id=broker.column(handed.id, "continued_as"))
    assert broker.process.poll() is None
    assert broker.get("/healthz")[0] == 200


def test_better_a_what_cannot_be_read_is_dead_lettered_at_full_speed(broker: RunningBroker, app: str) -> None:
    before = broker.metric(READ, topic="taskd", result="undecodable")
    junk = [b"\xff\xff" + str(number).encode() for number in range(1_000)]
    large = text_field(1, "large") + text_field(3, "t") + bytes_field(13, bytes(MAX_ACTIVATION_BYTES // 2))
    assert len(large) < MAX_ACTIVATION_BYTES
    nameless = [text_field(3, "no id"), text_field(1, "no task"), b""]
    good = [new_id() for _ in range(10)]
    for number, id_ in enumerate(good):
        broker.produce(*junk[number * 100 : number * 100 + 100], activation(id_, app), key=b"k")
    broker.produce(*nameless)
    last = broker.add(app)
    assert drain(broker, app, count=11) == [*good, last]
    assert broker.metric(READ, topic="taskd", result="undecodable") == before + 1_003
    broker.until(lambda: len(broker.undecodable()) >= before + 1_003)
    letters = {letter.value: letter for letter in broker.undecodable()}
    assert letters.keys() >= {*junk, *nameless}
    headers = letters[junk[0]].headers
    assert headers["taskd-topic"] == "taskd"
    assert headers["taskd-error"]
    assert headers["taskd-offset"].isdigit()
    assert letters[junk[0]].key == b"k"


def test_better_b_offsets_advance_when_everything_was_filtered(start_broker: Any, app: str) -> None:
    """Expired, known, killed and not readable: nothing of the second batch waits."""
    broker: RunningBroker = start_broker()
    known = broker.add(app)
    broker.operate("killswitch", "add", "killed", "--reason", "a test")
    broker.produce(
        activation(new_id(), app, taskname="killed"),
        activation(known, app),
        activation(new_id(), app, expires=1, received_at=ago(9)),
        b"\xff",
    )
    broker.until(lambda: broker.committed() == 5)


def test_better_e_one_application_cannot_stop_the_others(tight: RunningBroker, app: str) -> None:
    """Also §2, pending to forwarded: what is beyond a share is published elsewhere as it came."""
    hot = [activation(new_id(), app + "-hot") for _ in range(30)]
    tight.produce(*hot, key=b"key")
    calm = tight.add(app)
    assert drain(tight, app, count=1) == [calm]
    records = [record for record in tight.records("taskd-long") if record.value in hot]
    assert [record.value for record in records] == hot[10:]
    assert {record.key for record in records} == {b"key"}
    drain(tight, app + "-hot", count=10)


@pytest.mark.kafka
@pytest.mark.skipif(is_real_cluster(), reason="a cluster that others use is not stopped")
def test_better_d_an_outage_of_kafka_ends_nothing(start_broker: Any, app: str, unused_port: int) -> None:
    address = f"127.0.0.1:{unused_port}"
    broker: RunningBroker = start_broker(
        LOG__KIND="kafka", LOG__CLUSTERS__DEFAULT__ADDRESS=address, DRAIN_GRACE_S="0"
    )
    assert broker.get("/healthz")[0] == 200
    assert broker.get("/readyz")[0] == 503
    with open_local_kafka(unused_port):
        broker.produce_to_kafka(address, activation(id_ := new_id(), app))
        broker.became(id_, "pending")
        broker.until(lambda: broker.get("/readyz")[0] == 200)
    broker.until(lambda: broker.get("/readyz")[0] == 503)
    assert drain(broker, app, count=1) == [id_]  # what is stored is served
    assert broker.process.poll() is None


@pytest.fixture
def unused_port() -> int:
    return free_port()


# ---- raw topics (§4)


TASK = """
import os
from taskd import Retry, TaskNamespace
from taskd.tasks.current import current_task

events = TaskNamespace("events", application="foreign")


@events.register(name="consume", retry=Retry(times=2, on=(ValueError,)))
def consume(payload):
    task = current_task()
    with open(os.environ["TASKD_TEST_RECORD"], "a") as file:
        file.write(f"{task.id} {task.attempts} {type(payload).__name__} {payload.hex()}\\n")
    if task.attempts == 0:
        raise ValueError("once more")
"""


def executed(broker: RunningBroker, folder: Path, produce: Any) -> None:
    """A foreign record runs with its payload as the only argument; its retry comes back as an activation."""
    plugin, record = folder / "plugin", folder / "record"
    install_plugin(plugin, "raw-tasks", "raw_tasks", TASK)
    payload = b"\xff not an activation"
    with running_worker(broker, TASKD_TEST_RECORD=str(record), PYTHONPATH=python_path(plugin)):
        produce(payload)
        first = broker.said("transition", before="", status="pending")["id"]
        broker.became(first, "gone")
        again = retry_id(first, 1)
        broker.became(again, "gone")
    assert record.read_text().splitlines() == [
        f"{first} 0 bytes {payload.hex()}",
        f"{again} 1 bytes {payload.hex()}",
    ]


def test_raw_a_foreign_record_is_executed_and_its_retry_is_an_activation(
    start_broker: Any, tmp_path: Path
) -> None:
    broker: RunningBroker = start_broker(**RAW)
    executed(broker, tmp_path, lambda payload: broker.produce(payload, topic="events"))
    (retry,) = broker.records("taskd")
    assert scan(retry.value).attempts == 1
    assert [record.value for record in broker.records("events")] == [b"\xff not an activation"]


@pytest.mark.kafka
@pytest.mark.long
def test_raw_on_kafka(start_broker: Any, tmp_path: Path, kafka_address: str) -> None:
    suffix = new_id()[:8]
    settings = {
        name.replace("TASKD", f"T{suffix}").replace("EVENTS", f"E{suffix}"): v for name, v in RAW.items()
    }
    broker: RunningBroker = start_broker(
        **settings, LOG__KIND="kafka", LOG__CLUSTERS__DEFAULT__ADDRESS=kafka_address
    )
    broker.said("partitions assigned")
    executed(broker, tmp_path, lambda raw: broker.produce_to_kafka(kafka_address, raw, topic=f"e{suffix}"))


def test_raw_parameters_headers_and_policy(start_broker: Any) -> None:
    level = {"LOG__TOPICS__EVENTS__RAW__COMPRESSION_LEVEL": "-1"}
    broker: RunningBroker = start_broker(**RAW, **level)
    headers = [("source", "é".encode()), ("binary", b"\xff"), ("compression-type", b"zstd")]
    broker.produce(b"abc", b"", topic="events", headers=headers)
    raw = broker.task_soon("foreign")
    call = scan_call(raw)
    assert call.parameters_bytes.hex() == "82a46172677391c403616263a66b776172677380"
    assert parameters.decode(call.parameters_bytes, "", call.headers) == ([b"abc"], {})
    assert (call.headers, call.has_retry_state) == ({"source": "é"}, False)
    assert (call.namespace, call.application, call.taskname) == ("events", "foreign", "consume")
    broker.set_status(call.id, 3)
    broker.became(call.id, "gone")
    assert broker.records() == []  # policy: discard
    empty = scan_call(broker.task_soon("foreign"))
    assert parameters.decode(empty.parameters_bytes, "", empty.headers) == ([b""], {})


def test_raw_better_a_record_that_is_read_again_is_known(start_broker: Any) -> None:
    """Killed after the rows were durable, before a commit that we take back here."""
    broker: RunningBroker = start_broker(**RAW)
    broker.produce(b"payload", topic="events")
    id_ = scan(broker.task_soon("foreign")).id
    broker.set_status(id_)
    broker.became(id_, "gone")
    broker.process.kill()
    broker.process.wait()
    broker.forget_commits("events")
    again: RunningBroker = start_broker(data_dir=broker.data_dir, **RAW)
    again.until(lambda: again.committed("events") == 1)
    assert again.metric(READ, topic="events", result="duplicate") == 1
    assert again.get_task("foreign") is None
