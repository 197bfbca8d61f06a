"""Contract §2, row by row, against a running broker. Where proof needs hours to pass, it is in tests/flow/.

README.md beside this file says which test proves which row.
"""

from __future__ import annotations

from concurrent import futures
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from running_broker import RunningBroker, Worker, activation, dead_letter_policy, new_id

from taskd.activation.ids import retry_id
from taskd.wire import frames
from taskd.wire.consumer import COMPLETE, FAILURE, RETRY
from taskd.wire.envelope import scan
from taskd.wire.frames import ResultStatus
from taskd.wire.generated.sentry_protos.taskbroker.v1 import FetchNextTask, PushTaskRequest, RetryState
from taskd.wire.protobuf import bytes_field, varint_field

pytestmark = [pytest.mark.process, pytest.mark.slow]

MAX_ATTEMPTS = 3
MAX_DELAY_S = 60
PUSH = "/sentry_protos.taskbroker.v1.WorkerService/PushTask"
ONCE = RetryState(max_attempts=1, on_attempts_exceeded=2, at_most_once=True)


@pytest.fixture(scope="module")
def broker(start_broker: Any) -> RunningBroker:
    started: RunningBroker = start_broker(
        STORE__MAX_PROCESSING_ATTEMPTS=str(MAX_ATTEMPTS), STORE__MAX_DELAY_S=str(MAX_DELAY_S)
    )
    return started


@pytest.fixture
def app(request: pytest.FixtureRequest) -> str:
    """An application of the test's own, so that tests can share a broker."""
    return str(request.node.name)


def ago(seconds: float) -> datetime:
    """What received_at says, when that was so long ago: durations that are nearly over."""
    return datetime.now(UTC) - timedelta(seconds=seconds)


def worker(broker: RunningBroker, app: str, credit: int = 1) -> Worker:
    """A connected one on the stream that has asked for `credit` activations."""
    hello = frames.Hello(new_id(), "pool", application=app)
    opened = Worker(broker, hello, frames.Credit(1, credit, credit))
    assert isinstance(opened.receive(), frames.Welcome)
    return opened


def assigned(opened: Worker) -> frames.Assignment:
    frame = opened.receive()
    assert isinstance(frame, frames.Assignments)
    (assignment,) = frame.assignments
    return assignment


# ---- the table


def test_log_to_pending_or_delayed_and_delayed_to_pending(broker: RunningBroker, app: str) -> None:
    waits = broker.add(app, delay=60, received_at=ago(59.4))
    over = broker.add(app, delay=60, received_at=ago(61))
    now = broker.add(app)
    assert (broker.history(waits), broker.history(over), broker.history(now)) == (
        ["delayed"],
        ["pending"],
        ["pending"],
    )
    broker.became(waits, "pending")
    assert [task.id for _ in range(3) if (task := broker.get_task(app))] == [over, now, waits]


def test_pending_to_processing_by_pull_and_by_stream(broker: RunningBroker, app: str) -> None:
    pulled = broker.add(app)
    task = broker.get_task(app)
    assert task is not None
    assert task.id == pulled
    assert broker.get_task(app) is None  # under a lease nobody else gets it
    streamed = broker.add(app + "-stream")
    with worker(broker, app + "-stream") as stream:
        assert assigned(stream).id == streamed
        broker.became(streamed, "processing")
        assert broker.column(streamed, "attempts") == 0  # counted at START


def test_processing_to_pending_when_the_lease_is_over_and_to_failure_at_the_last_attempt(
    broker: RunningBroker, app: str
) -> None:
    """Also: max_processing_deadline cuts 10 s to a fraction, max_processing_attempts counts hand-outs."""
    raw = activation(id_ := new_id(), app, retry_state=dead_letter_policy())
    broker.produce(raw)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        broker.became(id_, "pending", attempt)
        task = broker.get_task(app)
        assert task is not None
        assert broker.column(id_, "attempts") == attempt
    broker.became(id_, "gone")
    letter = broker.dead_letter(id_)
    assert letter.value == raw
    assert letter.headers["taskd-reason"] == "deadline"
    assert letter.headers["taskd-processing-attempts"] == str(MAX_ATTEMPTS)
    assert broker.get_task(app) is None


def test_processing_to_pending_when_handed_back_with_the_attempt_undone(
    broker: RunningBroker, app: str
) -> None:
    id_ = broker.add(app)
    with worker(broker, app) as stream:
        lease = assigned(stream).lease
        stream.send(frames.HandBack((lease,)))
        broker.became(id_, "pending", 2)
        assert broker.column(id_, "attempts") == 0
        assert broker.get_task(app) is not None


def test_processing_to_failure_when_the_lease_is_over_at_most_once(broker: RunningBroker, app: str) -> None:
    id_ = broker.add(app, retry_state=ONCE)
    assert broker.get_task(app) is not None
    broker.became(id_, "gone")
    assert broker.history(id_) == ["pending", "processing", "failure", "gone"]
    assert broker.dead_letter(id_).headers["taskd-reason"] == "at_most_once"


def test_processing_to_failure_when_it_killed_its_child_that_often(broker: RunningBroker, app: str) -> None:
    id_ = broker.add(app, retry_state=dead_letter_policy())
    with worker(broker, app, credit=MAX_ATTEMPTS) as stream:
        for _ in range(MAX_ATTEMPTS):
            lease = assigned(stream).lease
            stream.send(frames.Started((lease,)))
            crashed = frames.Result(*lease, ResultStatus.CRASHED, error="killed by signal 11")
            stream.send(frames.Results((crashed,)))
            assert isinstance(stream.receive(), frames.Taken)
    broker.became(id_, "gone")
    headers = broker.dead_letter(id_).headers
    assert (headers["taskd-reason"], headers["taskd-error"]) == ("poison", "killed by signal 11")


@pytest.mark.parametrize("delay", [None, 60])
def test_pending_and_delayed_to_expired_to_gone(broker: RunningBroker, app: str, delay: int | None) -> None:
    more = {"expires": 60, "delay": delay, "received_at": ago(59.6)}
    if delay:
        more |= {"delay": MAX_DELAY_S, "received_at": ago(59.2), "expires": 59 + 1}
    kept = broker.add(app, retry_state=dead_letter_policy(), **more)
    counted = broker.metric("taskd_discarded_total", reason="expired")
    lost = broker.add(app, **more)
    for id_ in (kept, lost):
        broker.became(id_, "gone")
        assert "processing" not in broker.history(id_)
        assert broker.history(id_)[-2:] == ["expired", "gone"]
    assert broker.get_task(app) is None
    assert broker.dead_letter(kept).headers["taskd-reason"] == "expired"
    assert [letter for letter in broker.records() if letter.id == lost] == []
    assert broker.metric("taskd_discarded_total", reason="expired") == counted + 1
    assert broker.said("discarded", reason="expired")


def test_pending_and_delayed_to_dropped_to_gone(broker: RunningBroker, app: str) -> None:
    """By an operator, without a dead letter; also what arrives from then on."""
    kind: dict[str, Any] = {"taskname": app, "retry_state": dead_letter_policy()}
    waits, delayed, other = broker.add(app, **kind), broker.add(app, delay=50, **kind), broker.add(app)
    broker.operate("killswitch", "add", app, "--reason", "a test")
    arrives = broker.add(app, **kind)
    for id_ in (waits, delayed, arrives):
        broker.became(id_, "gone")
        assert broker.history(id_)[-2:] == ["dropped", "gone"]
    assert [task.id for _ in range(2) if (task := broker.get_task(app))] == [other]
    assert not [letter for letter in broker.records() if scan(letter.value).application == app]


def test_processing_to_complete_failure_or_retry_by_report(broker: RunningBroker, app: str) -> None:
    for status, word in ((COMPLETE, "complete"), (FAILURE, "failure"), (RETRY, "retry")):
        id_ = broker.add(app)
        assert broker.get_task(app) is not None
        broker.set_status(id_, status)
        broker.became(id_, "gone")
        assert broker.history(id_) == ["pending", "processing", word, "gone"]
        if status == RETRY:
            broker.became(retry_id(id_, 1), "pending")  # published before it was gone
            assert broker.column(id_, "continued_as") == retry_id(id_, 1)


def test_failure_is_discarded_and_counted_or_dead_lettered(broker: RunningBroker, app: str) -> None:
    """Without a retry_state, or with policy UNSPECIFIED, it is discarded. The attempt number is no matter."""
    policies = {
        "none": None,
        "unspecified": RetryState(max_attempts=3),
        "discard": RetryState(max_attempts=3, on_attempts_exceeded=1),
        "unknown": RetryState.parse(b"\x18\x63"),  # an enum's number 99
        "first of three": RetryState(max_attempts=3, on_attempts_exceeded=2),
    }
    before = broker.metric("taskd_discarded_total", reason="failed")
    for policy in policies.values():
        id_ = broker.add(app, retry_state=policy)
        assert broker.get_task(app) is not None
        broker.set_status(id_, FAILURE)
        broker.became(id_, "gone")
    assert [letter.id for letter in broker.records() if scan(letter.value).application == app] == [id_]
    assert broker.metric("taskd_discarded_total", reason="failed") == before + len(policies) - 1


# ---- push


@pytest.fixture(scope="module")
def push_worker() -> Any:
    """A worker that takes what it is told to; `url` and what it got."""

    class PushWorker:
        takes = True
        got: list[bytes]

        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(self.push) if details.method == PUSH else None

        def push(self, request: bytes, context: Any) -> bytes:
            self.got.append(request)
            if not self.takes:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "worker busy")
            return b""

    made = PushWorker()
    made.got = []
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=(made,))
    made.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
    server.start()
    yield made
    server.stop(None).wait()


@pytest.fixture(scope="module")
def push_broker(start_broker: Any, push_worker: Any) -> RunningBroker:
    started: RunningBroker = start_broker(
        DISPATCH__MODE="push",
        PUSH__WORKER_MAP=f'{{"mapped": "{push_worker.url}"}}',
        STORE__MAX_PROCESSING_DEADLINE_S="10",
    )
    return started


def test_pending_to_claimed_to_processing_by_push(push_broker: RunningBroker, push_worker: Any) -> None:
    id_ = new_id()
    raw = activation(id_, "mapped")
    push_broker.produce(raw)
    push_broker.became(id_, "processing")
    assert push_broker.history(id_) == ["pending", "claimed", "processing"]
    request = PushTaskRequest.parse(push_worker.got[-1])
    assert (bytes(request.task or b""), request.callback_url) == (raw, "")
    push_broker.set_status(id_)
    push_broker.became(id_, "gone")


def test_claimed_to_pending_when_the_call_failed_attempts_untouched(
    push_broker: RunningBroker, push_worker: Any
) -> None:
    push_worker.takes = False
    id_ = new_id()
    push_broker.produce(activation(id_, "mapped"))
    push_broker.became(id_, "pending", 2)
    assert push_broker.history(id_)[:3] == ["pending", "claimed", "pending"]
    assert push_broker.column(id_, "attempts") == 0
    push_worker.takes = True
    push_broker.became(id_, "processing")
    push_broker.set_status(id_)


def test_pending_to_parked_where_nobody_is_mapped(push_broker: RunningBroker) -> None:
    """It expires and counts like pending."""
    id_ = push_broker.add("unmapped", expires=60, received_at=ago(59))
    push_broker.became(id_, "parked")
    push_broker.became(id_, "gone")
    assert push_broker.history(id_) == ["pending", "parked", "expired", "gone"]


# ---- Same


def test_same_a_retry_is_a_new_activation(broker: RunningBroker, app: str) -> None:
    unknown = varint_field(1_000, 77)
    id_ = new_id()
    old = ago(61)
    state = RetryState(attempts=1, max_attempts=5, on_attempts_exceeded=2, delay_on_retry=0)
    fields: dict[str, Any] = {"headers": {"k": "v"}, "parameters_bytes": b"\x80", "expires": 3_600}
    raw = activation(id_, app, received_at=old, retry_state=state, delay=60, **fields) + unknown
    broker.produce(raw)
    broker.became(id_, "pending")
    assert broker.get_task(app) is not None
    broker.set_status(id_, RETRY, max_attempts=9)
    new_one = retry_id(id_, 2)
    broker.became(new_one, "pending")
    retried_raw = broker.get_raw_task(app)
    assert retried_raw is not None
    assert unknown in retried_raw
    task = scan(retried_raw)
    assert (task.id, task.attempts, task.max_attempts) == (new_one, 2, 9)
    assert (task.expires_s, task.dead_letter, task.delay_on_retry_s) == (3_600, True, 0)
    assert task.received_at_ms is not None
    assert task.received_at_ms > old.timestamp() * 1000 + 60_000  # now: expires counts from here
    (record,) = [r for r in broker.records("taskd") if r.id == new_one]  # to the only topic
    assert record.key == new_one.encode()


def test_same_the_countdown_is_not_repeated_and_an_absent_retry_state_is_created(
    broker: RunningBroker, app: str
) -> None:
    id_ = broker.add(app, delay=60, received_at=ago(61))
    assert broker.get_task(app) is not None
    broker.set_status(id_, RETRY)
    broker.became(retry_id(id_, 1), "pending")
    assert broker.history(retry_id(id_, 1)) == ["pending"]
    task = broker.get_task(app)
    assert task is not None
    assert task.delay is None
    assert task.retry_state is not None
    assert task.retry_state.attempts == 1
    broker.set_status(task.id, RETRY, delay_on_retry=30)
    broker.became(retry_id(task.id, 2), "delayed")


def test_same_the_dead_letter_is_the_stored_activation_byte_for_byte(broker: RunningBroker, app: str) -> None:
    id_ = new_id()
    state = bytes_field(7, varint_field(3, 2) + varint_field(900, 5))
    raw = varint_field(1_000, 1) + activation(id_, app, headers={"b": "2", "a": "1"}) + state
    broker.produce(raw, key=b"\x00 any key")
    broker.became(id_, "pending")
    assert broker.get_raw_task(app) == raw  # unknown fields survive delivery, too
    broker.set_status(id_, FAILURE)
    broker.became(id_, "gone")
    letter = broker.dead_letter(id_)
    assert (letter.value, letter.key) == (raw, b"\x00 any key")


def test_same_max_attempts_is_not_the_brokers_business(broker: RunningBroker, app: str) -> None:
    id_ = broker.add(app, retry_state=RetryState(attempts=90, max_attempts=3, on_attempts_exceeded=2))
    assert broker.get_task(app) is not None
    broker.set_status(id_, RETRY, max_attempts=4)
    broker.became(retry_id(id_, 91), "pending")


# ---- Better


def test_better_a_order_of_arrival_in_a_namespace(broker: RunningBroker, app: str) -> None:
    ids = [new_id() for _ in range(50)]
    broker.produce(*(activation(id_, app) for id_ in ids))
    broker.became(ids[-1], "pending")
    handed = []
    task = broker.get_task(app)
    while task is not None:
        handed.append(task.id)
        task = broker.set_status(task.id, fetch_next_task=FetchNextTask(application=app))
    assert handed == ids


def test_better_c_two_leases_that_both_report_retry_make_one_retry(broker: RunningBroker, app: str) -> None:
    id_ = broker.add(app)
    assert broker.get_task(app) is not None
    broker.became(id_, "pending", 2)
    assert broker.get_task(app) is not None
    for _ in range(2):
        broker.set_status(id_, RETRY)
    broker.became(retry_id(id_, 1), "pending")
    assert len([r for r in broker.records("taskd") if r.id == retry_id(id_, 1)]) == 1


def test_better_e_foreign_delays_are_shortened_and_told(broker: RunningBroker, app: str) -> None:
    shortened, late = "taskd_ingest_shortened_delays_total", "taskd_ingest_delay_beyond_expiry_total"
    before = broker.metric(shortened), broker.metric(late)
    long = broker.add(app, delay=86_400, received_at=ago(MAX_DELAY_S - 0.3))
    broker.became(long, "pending")
    broker.add(app, delay=50, expires=50)
    assert (broker.metric(shortened), broker.metric(late)) == (before[0] + 1, before[1] + 1)
    assert broker.said("delays beyond max_delay_s are shortened")["ids"] == [long]
    assert broker.said("records expire before their delay is over")["count"] == 1


def test_better_f_a_dead_letter_says_why_when_where_and_how_often(broker: RunningBroker, app: str) -> None:
    id_ = broker.add(app, retry_state=dead_letter_policy(attempts=2), key=b"k")
    with worker(broker, app) as stream:
        lease = assigned(stream).lease
        result = frames.Result(*lease, ResultStatus.FAILURE, reason="raised", error="ValueError: ü")
        stream.send(frames.Results((result,)))
        assert isinstance(stream.receive(), frames.Taken)
    broker.became(id_, "gone")
    headers = dict(broker.dead_letter(id_).headers)
    assert abs(int(headers.pop("taskd-dead-lettered-at-ms")) / 1000 - datetime.now(UTC).timestamp()) < 60
    assert int(headers.pop("taskd-offset")) >= 0
    assert headers == {
        "taskd-reason": "raised",
        "taskd-error": "ValueError: ü",
        "taskd-id": id_,
        "taskd-topic": "taskd",
        "taskd-partition": "0",
        "taskd-processing-attempts": "1",
        "taskd-retry-attempts": "2",
    }


def test_better_g_a_result_of_an_older_lease_changes_nothing(broker: RunningBroker, app: str) -> None:
    id_ = broker.add(app)
    with worker(broker, app, credit=2) as stream:
        first = assigned(stream).lease
        stream.send(frames.Started((first,)))
        second = assigned(stream).lease  # the deadline of the first passed
        assert second.fence > first.fence
        stream.send(frames.Started((second,)))
        stream.send(frames.Results((frames.Result(*first, ResultStatus.FAILURE),)))
        assert isinstance(stream.receive(), frames.Taken)
        stream.send(frames.Results((frames.Result(*second, ResultStatus.COMPLETE),)))
        assert isinstance(stream.receive(), frames.Taken)
    broker.became(id_, "gone")
    assert broker.history(id_)[-2:] == ["complete", "gone"]


def test_better_h_a_loop_of_retries_is_stopped_when_enforced(start_broker: Any, app: str) -> None:
    broker: RunningBroker = start_broker(STORE__ENFORCE_MAX_ATTEMPTS="true")
    id_ = broker.add(app, retry_state=RetryState(attempts=5, max_attempts=3, on_attempts_exceeded=1))
    for attempts, ended in ((6, False), (7, True)):
        assert broker.get_task(app) is not None
        broker.set_status(id_, RETRY)
        broker.became(id_, "gone")
        if not ended:
            id_ = retry_id(id_, attempts)
            broker.became(id_, "pending")
    assert broker.dead_letter(id_).headers["taskd-reason"] == "max_attempts"
    assert broker.get_task(app) is None


def test_better_i_a_redelivered_record_does_not_run_again(broker: RunningBroker, app: str) -> None:
    raw = activation(id_ := new_id(), app)
    broker.produce(raw)
    broker.became(id_, "pending")
    assert broker.get_task(app) is not None
    broker.set_status(id_)
    before = broker.metric("taskd_ingest_records_total", topic="taskd", result="duplicate")
    broker.produce(raw, raw)
    broker.add(app + "-after")
    assert broker.metric("taskd_ingest_records_total", topic="taskd", result="duplicate") == before + 2
    assert broker.get_task(app) is None
    assert broker.history(id_) == ["pending", "processing", "complete", "gone"]
