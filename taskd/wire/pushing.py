"""The request of `sentry_protos.taskbroker.v1.WorkerService`, by which work is pushed to a worker."""

from __future__ import annotations

from taskd.wire.protobuf import bytes_field

SERVICE = "sentry_protos.taskbroker.v1.WorkerService"
PUSH_TASK = f"/{SERVICE}/PushTask"
BUSY = "worker busy"  # what a full worker says, with RESOURCE_EXHAUSTED


def encode_push(activation: bytes) -> bytes:
    """PushTaskRequest, without a callback_url: results come back to the brokers a worker knows."""
    return bytes_field(1, activation)
