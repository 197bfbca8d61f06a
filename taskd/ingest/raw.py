"""Raw topics: each record of a foreign topic becomes one call of one task, its payload the only argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgpack
import zstandard

from taskd.activation.ids import raw_record_id
from taskd.inflight.base import Arrival
from taskd.ingest.decode import MAX_ACTIVATION_BYTES, arrival_of, undecodable
from taskd.log.base import Record
from taskd.wire import envelope
from taskd.wire.envelope import timestamp
from taskd.wire.parameters import COMPRESSION_HEADER, ZSTD
from taskd.wire.protobuf import bytes_field, text_field, varint_field

UNCOMPRESSED = -1  # as compression_level

Decode = Callable[[Record], Arrival]


@dataclass(frozen=True, slots=True)
class RawTask:
    """Which task the records of a raw topic are for. `compression_level`: of zstd; -1: none."""

    namespace: str
    application: str
    taskname: str
    processing_deadline_s: int
    compression_level: int = 3


def decoder(raw_topics: Mapping[str, RawTask]) -> Decode:
    """How a broker reads records: those of raw topics as payloads, all others as activations."""

    def decode(record: Record) -> Arrival:
        task = raw_topics.get(record.partition.topic)
        return arrival_of(record) if task is None else arrival_of_raw(record, task)

    return decode


def arrival_of_raw(record: Record, task: RawTask) -> Arrival:
    """The activation of a foreign record, its id derived from its place: read again, it is known."""
    topic, partition = record.partition
    id_ = raw_record_id(topic, partition, record.offset, record.timestamp_ms)
    activation = _activation(id_, record, task)
    if len(activation) > MAX_ACTIVATION_BYTES:
        return undecodable(
            record,
            f"{len(activation)} bytes as an activation; at most {MAX_ACTIVATION_BYTES} can be handed out",
        )
    return Arrival(
        id=id_,
        namespace=task.namespace,
        taskname=task.taskname,
        application=task.application,
        received_at_ms=record.timestamp_ms if record.timestamp_ms >= 0 else None,
        processing_deadline_s=task.processing_deadline_s,
        expires_s=None,
        delay_s=None,
        attempts=0,
        dead_letter=False,
        at_most_once=False,
        topic=topic,
        partition=partition,
        offset=record.offset,
        record_key=record.key,
        activation=activation,
    )


def parameters_of(payload: bytes, compression_level: int) -> bytes:
    """The parameters that call the task with the payload as its only argument."""
    packed: bytes = msgpack.packb({"args": [payload], "kwargs": {}}, use_bin_type=True)
    if compression_level == UNCOMPRESSED:
        return packed
    return zstandard.compress(packed, compression_level)  # writes the content size into the frame


def _activation(id_: str, record: Record, task: RawTask) -> bytes:
    out = [
        text_field(envelope.ID, id_),
        text_field(envelope.NAMESPACE, task.namespace),
        text_field(envelope.TASKNAME, task.taskname),
    ]
    for name, value in _headers(record, task).items():
        out.append(bytes_field(envelope.HEADERS, text_field(1, name) + text_field(2, value)))
    if record.timestamp_ms >= 0:  # old producers write none, which Kafka gives as -1
        out.append(bytes_field(envelope.RECEIVED_AT, timestamp(record.timestamp_ms)))
    out += [
        varint_field(envelope.PROCESSING_DEADLINE, task.processing_deadline_s),
        text_field(envelope.APPLICATION, task.application),
        bytes_field(envelope.PARAMETERS, parameters_of(record.value, task.compression_level)),
    ]
    return b"".join(out)


def _headers(record: Record, task: RawTask) -> dict[str, str]:
    """The record's headers where they are text, and the truth about the compression."""
    headers = {}
    for name, value in record.headers:
        try:
            headers[name] = value.decode()
        except UnicodeDecodeError:
            continue
    headers.pop(COMPRESSION_HEADER, None)
    if task.compression_level != UNCOMPRESSED:
        headers[COMPRESSION_HEADER] = ZSTD
    return headers
