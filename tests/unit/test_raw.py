"""Records of raw topics, made into activations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from taskd.activation.ids import raw_record_id
from taskd.ingest.decode import MAX_ACTIVATION_BYTES
from taskd.ingest.raw import RawTask, arrival_of_raw, decoder, parameters_of
from taskd.log.base import Partition, Record
from taskd.log.kafka.reader import _record
from taskd.wire.envelope import scan_call
from taskd.wire.generated.sentry_protos.taskbroker.v1 import TaskActivation
from taskd.wire.parameters import decode

TASK = RawTask("events", "app", "consume", 30)
AT_MS = 1_767_225_600_123


def record(value: bytes = b"abc", headers: tuple[tuple[str, bytes], ...] = ()) -> Record:
    return Record(Partition("events", 3), 42, AT_MS, b"key", value, headers)


def test_the_vectors_of_the_contract() -> None:
    assert parameters_of(b"abc", -1).hex() == "82a46172677391c403616263a66b776172677380"
    assert arrival_of_raw(record(), TASK).id == "f75938c72727d2fbb7e5596ae85e8de8"


@pytest.mark.parametrize("level", [-1, 1, 3, 19])
@pytest.mark.parametrize("payload", [b"", b"abc", bytes(range(256)) * 100])
def test_the_payload_is_the_only_argument(level: int, payload: bytes) -> None:
    task = RawTask("events", "app", "consume", 30, compression_level=level)
    arrival = arrival_of_raw(record(payload), task)
    body = scan_call(arrival.activation)
    assert decode(body.parameters_bytes, "", body.headers) == ([payload], {})
    assert body.headers.get("compression-type") == (None if level == -1 else "zstd")


def test_everything_else_is_the_topics_and_the_records() -> None:
    arrival = arrival_of_raw(record(), TASK)
    message = TaskActivation.parse(arrival.activation)
    assert (message.namespace, message.application, message.taskname) == ("events", "app", "consume")
    assert message.processing_deadline_duration == 30
    assert message.retry_state is None
    assert message.received_at is not None
    assert round(message.received_at.timestamp() * 1000) == AT_MS
    assert (arrival.topic, arrival.partition, arrival.offset, arrival.record_key) == ("events", 3, 42, b"key")
    assert (arrival.received_at_ms, arrival.dead_letter) == (AT_MS, False)


def test_headers_are_copied_where_they_are_text_and_a_foreign_compression_never() -> None:
    foreign = (("source", "é".encode()), ("binary", b"\xff\xfe"), ("compression-type", b"gzip"))
    plain = RawTask("events", "app", "consume", 30, compression_level=-1)
    assert scan_call(arrival_of_raw(record(headers=foreign), plain).activation).headers == {"source": "é"}
    compressed = scan_call(arrival_of_raw(record(headers=foreign), TASK).activation)
    assert compressed.headers == {"source": "é", "compression-type": "zstd"}


def test_a_payload_too_large_to_be_handed_out_is_dead_lettered_as_it_came() -> None:
    plain = RawTask("events", "app", "consume", 30, compression_level=-1)
    payload = b"x" * MAX_ACTIVATION_BYTES
    arrival = arrival_of_raw(record(payload), plain)
    assert "can be handed out" in arrival.undecodable
    assert (arrival.activation, arrival.dead_letter) == (payload, True)


def test_only_raw_topics_are_read_as_payloads() -> None:
    read = decoder({"events": TASK})
    assert read(record()).taskname == "consume"
    activation = TaskActivation(id="a", taskname="task")
    ordinary = Record(Partition("taskd", 0), 1, AT_MS, None, bytes(activation))
    assert read(ordinary).id == "a"
    assert read(record()).id == raw_record_id("events", 3, 42, AT_MS)


def test_a_null_payload_is_empty_bytes() -> None:
    """Kafka's tombstones, and headers without a value."""
    message = SimpleNamespace(offset=7, timestamp=AT_MS, key=None, value=None, headers=(("h", None),))
    read = _record(Partition("events", 3), message)
    assert (read.value, read.headers) == (b"", (("h", b""),))
    body = scan_call(arrival_of_raw(read, TASK).activation)
    assert decode(body.parameters_bytes, "", body.headers) == ([b""], {})
