"""The request of `sentry_protos.taskbroker.v1.WorkerService`, by which work is pushed to a worker."""

from __future__ import annotations

from taskd.errors import Undecodable
from taskd.wire.consumer import decode_task
from taskd.wire.protobuf import bytes_field

SERVICE = "sentry_protos.taskbroker.v1.WorkerService"
PUSH_TASK = f"/{SERVICE}/PushTask"
MAX_PUSH_BYTES = 52 * 1024 * 1024  # of one message to a worker (contract, RPC answers)
BUSY = "worker busy"  # what a full worker says, with RESOURCE_EXHAUSTED


def encode_push(activation: bytes) -> bytes:
    """PushTaskRequest, without a callback_url: results come back to the brokers a worker knows."""
    return bytes_field(1, activation)


def decode_push(raw: bytes) -> bytes:
    """The activation in a PushTaskRequest, as it came. Raises Undecodable."""
    activation = decode_task(raw)
    if activation is None:
        raise Undecodable("the request brings no task")
    return activation
