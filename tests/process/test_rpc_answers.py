"""What a running broker answers, row by row of its contract, to the C core's client of gRPC."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from taskd.activation.ids import retry_id
from taskd.wire.generated.sentry_protos.taskbroker.v1 import (
    FetchNextTask,
    GetTaskRequest,
    GetTaskResponse,
    OnAttemptsExceeded,
    RetryState,
    SetBatchActivationStatusRequest,
    SetTaskStatusRequest,
    SetTaskStatusResponse,
    TaskActivation,
    TaskActivationStatus,
)
from taskd.wire.generated.taskd.v1 import (
    ActivationStatus,
    AppendRecord,
    AppendRequest,
    GetStatusRequest,
    GetStatusResponse,
)
from taskd.wire.signing import PROOF_HEADER, SIGNATURE_HEADER, Proof, Secrets

grpc = pytest.importorskip("grpc")

pytestmark = [pytest.mark.process, pytest.mark.slow]

SERVICE = "sentry_protos.taskbroker.v1.ConsumerService"
GET, SET, SET_BATCH = (
    f"/{SERVICE}/{name}" for name in ("GetTask", "SetTaskStatus", "SetBatchActivationStatus")
)
CHECK = "/grpc.health.v1.Health/Check"
APPEND, STATUS, WORK = (
    "/taskd.v1.LogService/Append",
    "/taskd.v1.InspectService/GetStatus",
    "/taskd.v1.DispatchService/Work",
)
PENDING, PROCESSING, FAILURE, RETRY, COMPLETE = map(TaskActivationStatus, (1, 2, 3, 4, 5))
DEAD_LETTER = OnAttemptsExceeded(2)
MIB = 1024 * 1024
WITHIN_S = 20.0
SECRET = "super secret"


class Broker:
    """A running broker, and its callers."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self._folder = folder
        self._settings = settings
        self._closing: list[Callable[[], None]] = []
        self.start()

    def start(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TASKD_")}
        given = {f"TASKD_{name.upper()}": value for name, value in self._settings.items()}
        command = [sys.executable, "-m", "taskd", "broker", "--data-dir", str(self._folder / "data")]
        self.process = subprocess.Popen(
            [*command, "--rpc-port", "0", "--http-port", "0"],
            stderr=subprocess.PIPE,
            env=inherited | given | {"TASKD_LOG_FORMAT": "json", "TASKD_UPKEEP__INTERVAL_S": "0.05"},
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line.decode())
            if b'"broker listens"' in line:
                break
        assert self.process.poll() is None, "".join(self.said)
        self.address = json.loads(self.said[-1])["rpc"]
        self._listening = threading.Thread(target=self._listen)
        self._listening.start()
        self.channel = self.connect()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.decode())

    def connect(self, *, receive: int = 10 * MIB) -> Any:
        """As the existing client does it: replies of up to 10 MiB."""
        options = [
            ("grpc.max_receive_message_length", receive),
            ("grpc.max_send_message_length", 100 * MIB),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        channel = grpc.insecure_channel(self.address, options=options)
        self._closing.append(channel.close)
        return channel

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        for close in self._closing:
            close()
        self._closing.clear()
        self.process.send_signal(number)
        self.process.wait()
        self._listening.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    # ---- calls

    def call(self, path: str, body: bytes, metadata: Sequence[tuple[str, str]] = ()) -> bytes:
        answer: bytes = self.channel.unary_unary(path)(body, timeout=WITHIN_S, metadata=tuple(metadata))
        return answer

    def refusal(self, path: str, body: bytes, metadata: Sequence[tuple[str, str]] = ()) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(path, body, metadata)
        return caught.value.code().name, caught.value.details()

    def get(self, application: str | None = None, namespace: str | None = None) -> TaskActivation:
        request = bytes(GetTaskRequest(namespace=namespace, application=application))
        task = GetTaskResponse.parse(self.call(GET, request)).task
        assert task is not None
        return task

    def nothing(self, application: str | None = None, namespace: str | None = None) -> bool:
        request = bytes(GetTaskRequest(namespace=namespace, application=application))
        return self.refusal(GET, request) == ("NOT_FOUND", "No pending activations")

    def set(self, id_: str, status: TaskActivationStatus, **fields: Any) -> TaskActivation | None:
        request = bytes(SetTaskStatusRequest(id=id_, status=status, **fields))
        return SetTaskStatusResponse.parse(self.call(SET, request)).task

    def set_batch(self, *updates: SetTaskStatusRequest) -> None:
        assert self.call(SET_BATCH, bytes(SetBatchActivationStatusRequest(updates=list(updates)))) == b""

    # ---- the scene around them

    def put(self, *ids: str, application: str, namespace: str = "demo", **fields: Any) -> None:
        """Have these activations stored."""
        records = [
            bytes(
                TaskActivation(
                    id=id_,
                    application=application,
                    namespace=namespace,
                    taskname="t",
                    processing_deadline_duration=60,
                    **fields,
                )
            )
            for id_ in ids
        ]
        self.append(*records)
        self.until(lambda: all(seen.state != "unknown" for seen in self.seen(*ids)))

    def append(self, *values: bytes) -> None:
        records = [AppendRecord(topic="taskd", value=value) for value in values]
        self.call(APPEND, bytes(AppendRequest(records=records)))

    def seen(self, *ids: str) -> list[ActivationStatus]:
        return GetStatusResponse.parse(self.call(STATUS, bytes(GetStatusRequest(ids=list(ids))))).statuses

    def until(self, there: Callable[[], bool]) -> None:
        """Ask again until it is so: what the broker does by itself, nobody announces."""
        deadline = time.monotonic() + WITHIN_S
        while not there():
            assert time.monotonic() < deadline, "".join(self.said[-20:])

    def gone(self, id_: str) -> ActivationStatus:
        self.until(lambda: self.seen(id_)[0].state == "gone")
        return self.seen(id_)[0]


@contextmanager
def open_broker(folder: Path, **settings: str) -> Iterator[Broker]:
    broker = Broker(folder, **settings)
    try:
        yield broker
    finally:
        if broker.process.poll() is None:
            broker.end()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with open_broker(
        tmp_path_factory.mktemp("broker"),
        log__max_record_bytes=str(12 * MIB),
        max_request_bytes=str(16 * MIB),
    ) as running:
        yield running


@pytest.fixture
def app(request: pytest.FixtureRequest) -> str:
    """An application of the test's own."""
    return str(request.node.name)


def update(id_: str, status: TaskActivationStatus, **fields: Any) -> SetTaskStatusRequest:
    return SetTaskStatusRequest(id=id_, status=status, **fields)


# ---- GetTask


def test_nothing_claimable(broker: Broker, app: str) -> None:
    assert broker.nothing(app)
    broker.put("delayed", application=app, delay=3_600)
    assert broker.nothing(app)


def test_a_namespace_without_an_application(broker: Broker, app: str) -> None:
    broker.put("n1", application=app, namespace="only")
    assert broker.nothing(None, "only")
    assert broker.nothing(app, "another")
    assert broker.get(app, "only").id == "n1"


def test_filters_match_exactly_and_the_empty_application_is_one(broker: Broker, app: str) -> None:
    broker.put("of-none", application="")
    broker.put("of-some", application=app)
    assert broker.nothing(app.upper())
    assert broker.get("").id == "of-none"
    assert broker.nothing("")
    assert broker.get(app).id == "of-some"


def test_without_filters_any_application(broker: Broker, app: str) -> None:
    broker.put("any-1", application="")
    broker.put("any-2", application=app)
    found: set[str] = set()
    while not {"any-1", "any-2"} <= found:
        found.add(broker.get().id)


def test_the_activation_as_it_was_stored(broker: Broker, app: str) -> None:
    # Field 60 is nobody's yet.
    raw = (
        bytes(TaskActivation(id="raw", application=app, namespace="demo", taskname="t")) + b"\xe2\x03\x03new"
    )
    broker.append(raw)
    broker.until(lambda: broker.seen("raw")[0].state == "pending")
    reply = broker.call(GET, bytes(GetTaskRequest(application=app)))
    assert reply.endswith(raw)


# ---- SetTaskStatus


@pytest.mark.parametrize("number", [0, 1, 2, 6, 99])
def test_statuses_that_cannot_be_set(broker: Broker, app: str, number: int) -> None:
    broker.put(f"bad-{number}", application=app)
    broker.get(app)
    body = b"\x0a" + bytes([len(f"bad-{number}")]) + f"bad-{number}".encode() + b"\x10" + bytes([number])
    for path, request in ((SET, body), (SET_BATCH, b"\x0a" + bytes([len(body)]) + body)):
        code, details = broker.refusal(path, request)
        assert code == "INVALID_ARGUMENT"
        assert all(word in details for word in ("FAILURE", "RETRY", "COMPLETE"))
    assert broker.seen(f"bad-{number}")[0].state == "processing"


def test_an_unknown_id(broker: Broker, app: str) -> None:
    for status in (COMPLETE, FAILURE, RETRY):
        assert broker.set("nobody", status) is None
    broker.put("waiting", application=app)
    fetched = broker.set("nobody", COMPLETE, fetch_next_task=FetchNextTask(application=app))
    assert fetched is not None
    assert fetched.id == "waiting"


def test_fetching_the_next_task(broker: Broker, app: str) -> None:
    broker.put("one", "two", application=app)
    assert broker.get(app).id == "one"
    fetched = broker.set("one", COMPLETE, fetch_next_task=FetchNextTask(application=app))
    assert fetched is not None
    assert fetched.id == "two"
    # Never NOT_FOUND: the client would take the result for delivered.
    assert broker.set("two", COMPLETE, fetch_next_task=FetchNextTask(application=app)) is None
    assert broker.set("two", COMPLETE, fetch_next_task=FetchNextTask(namespace="demo")) is None
    assert [seen.outcome for seen in broker.seen("one", "two")] == ["complete", "complete"]


def test_without_fetching_none_comes(broker: Broker, app: str) -> None:
    broker.put("first", "second", application=app)
    broker.get(app)
    assert broker.set("first", COMPLETE) is None
    assert broker.seen("second")[0].state == "pending"


def test_a_failure_is_dead_lettered_or_discarded_by_its_policy(broker: Broker, app: str) -> None:
    broker.put("to-keep", application=app, retry_state=RetryState(on_attempts_exceeded=DEAD_LETTER))
    broker.put("to-drop", application=app)
    for _ in range(2):
        broker.set(broker.get(app).id, FAILURE)
    assert broker.gone("to-keep").dead_lettered
    assert not broker.gone("to-drop").dead_lettered


@pytest.mark.parametrize(
    "state", [None, RetryState(attempts=1, max_attempts=5, on_attempts_exceeded=DEAD_LETTER)]
)
def test_a_retry_updates_the_stored_retry_state(broker: Broker, app: str, state: RetryState | None) -> None:
    first = f"again-{state is None}"
    broker.put(first, application=app, retry_state=state)
    broker.get(app)
    broker.set(first, RETRY, max_attempts=9, delay_on_retry=0)
    attempts = 1 if state is None else 2
    second = broker.gone(first).continued_as
    assert second == retry_id(first, attempts)
    broker.until(lambda: broker.seen(second)[0].state == "pending")
    again = broker.get(app)
    assert again.id == second
    assert again.retry_state is not None
    assert (again.retry_state.attempts, again.retry_state.max_attempts) == (attempts, 9)
    assert again.retry_state.on_attempts_exceeded == (0 if state is None else DEAD_LETTER)
    broker.set(second, RETRY, delay_on_retry=3_600)
    third = broker.gone(second).continued_as
    broker.until(lambda: broker.seen(third)[0].state == "delayed")


def test_a_result_is_durable_before_its_answer(tmp_path: Path) -> None:
    with open_broker(tmp_path) as broker:
        broker.put("a", "b", "c", application="x")
        for _ in range(3):
            broker.get("x")
        broker.set("a", COMPLETE)
        broker.set_batch(update("b", COMPLETE), update("c", COMPLETE))
        broker.end()
        broker.start()
        assert [seen.outcome for seen in broker.seen("a", "b", "c")] == ["complete"] * 3


# ---- SetBatchActivationStatus


def test_a_batch(broker: Broker, app: str) -> None:
    ids = ["b-complete", "b-fail", "b-retry", "b-next"]
    broker.put(*ids, application=app, retry_state=RetryState(max_attempts=3))
    for _ in ids[:3]:
        broker.get(app)
    broker.set_batch(
        update("b-retry", RETRY, max_attempts=7, delay_on_retry=0),
        update("b-nobody", FAILURE),
        update("b-fail", FAILURE, max_attempts=7, delay_on_retry=7),
        # Whatever order they came in, COMPLETE counts first: this result is not overruled.
        update("b-complete", RETRY),
        update("b-complete", COMPLETE, fetch_next_task=FetchNextTask(application=app)),
    )
    outcomes = [broker.gone(id_).outcome for id_ in ids[:3]]
    assert outcomes == ["complete", "failed", "retried"]
    assert broker.seen("b-next")[0].state == "pending"  # nobody could have been given it
    assert broker.get(app).id == "b-next"
    retry = broker.gone("b-retry").continued_as
    broker.until(lambda: broker.seen(retry)[0].state == "pending")
    state = broker.get(app).retry_state
    assert state is not None
    assert state.max_attempts == 7


def test_a_batch_with_one_bad_status_changes_nothing(broker: Broker, app: str) -> None:
    broker.put("good", application=app)
    broker.get(app)
    batch = SetBatchActivationStatusRequest(updates=[update("good", COMPLETE), update("x", PROCESSING)])
    assert broker.refusal(SET_BATCH, bytes(batch))[0] == "INVALID_ARGUMENT"
    assert broker.seen("good")[0].state == "processing"


def test_an_empty_batch(broker: Broker) -> None:
    broker.set_batch()


# ---- sizes


def test_requests_of_ten_mib_are_taken_and_larger_ones_refused(tmp_path: Path) -> None:
    with open_broker(tmp_path) as broker:
        for size, expected in ((10 * MIB, None), (10 * MIB + 1, "RESOURCE_EXHAUSTED"), (90 * MIB, "")):
            head = b"\x10\x05\x0a"  # COMPLETE, and an id that fills the rest
            length = size - len(head) - 4
            varint = bytes(
                [length & 127 | 128, length >> 7 & 127 | 128, length >> 14 & 127 | 128, length >> 21]
            )
            body = head + varint + b"i" * length
            assert len(body) == size
            if expected is None:
                assert broker.call(SET, body) == b""
            else:
                assert broker.refusal(SET, body)[0] == (expected or "RESOURCE_EXHAUSTED")
        assert broker.nothing("x")


def activation_of(size: int, id_: str, app: str) -> bytes:
    bare = TaskActivation(
        id=id_, application=app, namespace="demo", taskname="t", processing_deadline_duration=60
    )
    bare.parameters_bytes = b"p" * (size - len(bytes(bare)) - 8)
    return bytes(bare)


def test_the_largest_activation_that_fits_is_handed_out(broker: Broker, app: str) -> None:
    raw = activation_of(10 * MIB - 2_000, "large", app)
    broker.append(raw)
    broker.until(lambda: broker.seen("large")[0].state == "pending")
    reply = broker.call(GET, bytes(GetTaskRequest(application=app)))
    assert reply.endswith(raw)
    assert len(reply) < 10 * MIB
    broker.set("large", COMPLETE)


def test_an_activation_that_cannot_fit_is_dead_lettered_and_holds_nobody_up(broker: Broker, app: str) -> None:
    broker.append(activation_of(10 * MIB + 100_000, "too-large", app))
    broker.put("behind", application=app)
    assert broker.get(app).id == "behind"
    assert broker.nothing(app)
    broker.until(lambda: any("at most" in line and "handed to a worker" in line for line in broker.said))
    assert broker.process.poll() is None


# ---- health, drain, nonsense


def test_health(broker: Broker) -> None:
    for service in (b"", SERVICE.encode()):
        assert (
            broker.call(CHECK, b"\x0a" + bytes([len(service)]) + service if service else b"") == b"\x08\x01"
        )
    assert broker.refusal(CHECK, b"\x0a\x06nobody")[0] == "NOT_FOUND"


def test_during_drain_results_are_taken_and_nothing_is_handed_out(tmp_path: Path) -> None:
    with open_broker(tmp_path) as broker:
        broker.put("held", "left", application="x")
        assert broker.get("x").id == "held"
        broker.process.send_signal(signal.SIGTERM)
        broker.until(lambda: any('"draining"' in line for line in broker.said))
        assert broker.refusal(GET, bytes(GetTaskRequest(application="x")))[0] == "UNAVAILABLE"
        assert broker.call(CHECK, b"") == b"\x08\x02"
        request = update("nobody", COMPLETE, fetch_next_task=FetchNextTask(application="x"))
        assert broker.call(SET, bytes(request)) == b""
        broker.set_batch(update("nobody", COMPLETE))
        assert broker.set("held", COMPLETE, fetch_next_task=FetchNextTask(application="x")) is None
        assert broker.process.wait(WITHIN_S) == 0  # nothing is held any more
        broker.end()
        broker.start()
        assert [seen.state for seen in broker.seen("held", "left")] == ["gone", "pending"]


@pytest.mark.parametrize("path", [GET, SET, SET_BATCH, CHECK, STATUS, APPEND])
@pytest.mark.parametrize("noise", [b"\xff" * 20, b"\x0a\x7fhalf", b"\x0a\x02\xff\xfe"])
def test_a_malformed_request(broker: Broker, path: str, noise: bytes) -> None:
    assert broker.refusal(path, noise)[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("path", [f"/{SERVICE}/Nothing", "/nobody/GetTask", "/x", f"/{SERVICE}/gettask"])
def test_a_wrong_method(broker: Broker, path: str) -> None:
    assert broker.refusal(path, b"")[0] == "UNIMPLEMENTED"


def test_noise_costs_its_connection_and_the_process_lives_on(broker: Broker) -> None:
    host, port = broker.address.rsplit(":", 1)
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">IBI", 4, 0, 0)
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(5_000),
        hello + os.urandom(5_000),
        hello + b"\0" * 9_000,
    ):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.settimeout(WITHIN_S)
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
            try:
                while stranger.recv(65_536):
                    pass
            except ConnectionError:
                pass
    assert broker.nothing("x")


# ---- push delivery


def test_where_delivery_is_push_nothing_can_be_fetched(tmp_path: Path) -> None:
    with open_broker(tmp_path, dispatch__mode="push") as broker:
        assert broker.refusal(GET, b"")[0] == "PERMISSION_DENIED"
        broker.put("waiting", application="x")
        fetch = FetchNextTask(application="x")
        assert broker.set("nobody", COMPLETE, fetch_next_task=fetch) is None
        broker.set_batch(update("nobody", COMPLETE))


# ---- signatures


VECTORS = [
    (b"", "402430dc4ee2940bed96d6f40d1a92ab43de2bd3fb21ac978b670208108570a0"),
    (bytes.fromhex("120673656e747279"), "d1be487647c60430d09ac60560d995963f2eab5532d342b18f38f6030b95956a"),
]
REFUSED = ("UNAUTHENTICATED", "Authentication failed")


@pytest.fixture(scope="module")
def signing_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    secrets = json.dumps([SECRET, "the old one"])
    with open_broker(tmp_path_factory.mktemp("signing"), rpc__secrets=secrets) as running:
        yield running
        assert not [line for line in running.said if SECRET in line or "the old one" in line]


def signature(path: str, body: bytes, secret: str = SECRET) -> list[tuple[str, str]]:
    mac = hmac.new(secret.encode(), path.encode() + b":" + body, hashlib.sha256).hexdigest()
    return [(SIGNATURE_HEADER, mac)]


@pytest.mark.parametrize(("body", "vector"), VECTORS)
def test_the_vectors_over_the_wire(signing_broker: Broker, body: bytes, vector: str) -> None:
    code, _ = signing_broker.refusal(GET, body, [(SIGNATURE_HEADER, vector)])
    assert code == "NOT_FOUND"  # let in, and there is nothing
    assert signing_broker.refusal(GET, body, [(SIGNATURE_HEADER, "0" + vector[1:])]) == REFUSED
    assert signing_broker.refusal(GET, body + b"\x18\x01", [(SIGNATURE_HEADER, vector)]) == REFUSED


@pytest.mark.parametrize("path", [GET, SET, SET_BATCH])
def test_signatures_of_the_taskbroker_services(signing_broker: Broker, path: str) -> None:
    body = b"" if path != SET else bytes(update("nobody", COMPLETE))
    for wrong in (
        [],
        [(SIGNATURE_HEADER, "")],
        [(SIGNATURE_HEADER, "x" * 64)],
        signature(path, body, "not it"),
        signature(path + "x", body),
        signature(path, body + b"x"),
        [(PROOF_HEADER, str(Proof.make(Secrets([SECRET]), path, body, time.time_ns() // 1_000_000)))],
    ):
        assert signing_broker.refusal(path, body, wrong) == REFUSED
    for right in (signature(path, body), signature(path, body, "the old one")):
        if path == GET:
            assert signing_broker.refusal(path, body, right)[0] == "NOT_FOUND"
        else:
            assert signing_broker.call(path, body, right) == b""


def test_health_needs_no_signature(signing_broker: Broker) -> None:
    assert signing_broker.call(CHECK, b"") == b"\x08\x01"


@pytest.mark.parametrize("path", [STATUS, APPEND])
def test_our_own_services_take_a_call_once(signing_broker: Broker, path: str) -> None:
    now_ms = time.time_ns() // 1_000_000

    def proof(secret: str, body: bytes, time_ms: int = now_ms) -> list[tuple[str, str]]:
        return [(PROOF_HEADER, str(Proof.make(Secrets([secret]), path, body, time_ms)))]

    for wrong in ([], signature(path, b""), proof("not it", b""), proof(SECRET, b"x"), proof(SECRET, b"", 1)):
        assert signing_broker.refusal(path, b"", wrong) == REFUSED
    for secret in (SECRET, "the old one"):
        once = proof(secret, b"")
        signing_broker.call(path, b"", once)
        assert signing_broker.refusal(path, b"", once) == REFUSED


def test_the_stream_of_work_is_opened_once(signing_broker: Broker) -> None:
    def opened(metadata: list[tuple[str, str]]) -> str:
        stream = signing_broker.channel.stream_stream(WORK)(
            iter([b"noise"]), metadata=metadata, timeout=WITHIN_S
        )
        with pytest.raises(grpc.RpcError):
            next(stream)
        return str(stream.code().name)

    proof = [(PROOF_HEADER, str(Proof.make(Secrets([SECRET]), WORK, None, time.time_ns() // 1_000_000)))]
    assert opened([]) == "UNAUTHENTICATED"
    assert opened(proof) == "INVALID_ARGUMENT"  # let in, and the first frame is noise
    assert opened(proof) == "UNAUTHENTICATED"
