"""A record of the log becomes an arrival. What cannot be read arrives too: on its way to the dead letters."""

from __future__ import annotations

from taskd.activation.ids import raw_record_id
from taskd.errors import Undecodable
from taskd.inflight.base import Arrival
from taskd.log.base import Record
from taskd.wire.envelope import scan

# Clients of the published protocol take replies of up to 10 MiB: a larger activation could never be run.
MAX_ACTIVATION_BYTES = 10 * 1024 * 1024 - 1024


def arrival_of(record: Record) -> Arrival:
    """Never raises for a record, whatever its bytes: see `Arrival.undecodable`."""
    if len(record.value) > MAX_ACTIVATION_BYTES:
        return undecodable(
            record, f"{len(record.value)} bytes; at most {MAX_ACTIVATION_BYTES} can be handed to a worker"
        )
    try:
        envelope = scan(record.value)
    except Undecodable as error:
        return undecodable(record, str(error))
    partition, offset, _, key, value, _ = record
    # In the order of its fields: by their names it takes three times as long, for every record.
    return Arrival(
        envelope.id,
        envelope.namespace,
        envelope.taskname,
        envelope.application,
        envelope.received_at_ms,
        envelope.processing_deadline_s,
        envelope.expires_s,
        envelope.delay_s,
        envelope.attempts,
        envelope.dead_letter,
        envelope.at_most_once,
        partition.topic,
        partition.number,
        offset,
        key,
        value,
    )


def undecodable(record: Record, why: str) -> Arrival:
    """The arrival of a record that cannot be run: it goes to the dead letters, with the reason."""
    topic, partition = record.partition
    return Arrival(
        # Derived from its place in the log, so that reading it again finds it known.
        id=raw_record_id(topic, partition, record.offset, record.timestamp_ms),
        namespace="",
        taskname="",
        application="",
        received_at_ms=None,
        processing_deadline_s=0,
        expires_s=None,
        delay_s=None,
        attempts=0,
        dead_letter=True,
        at_most_once=False,
        topic=topic,
        partition=partition,
        offset=record.offset,
        record_key=record.key,
        activation=record.value,
        undecodable=why,
    )
