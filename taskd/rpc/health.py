"""grpc.health.v1: whether a service takes calls now, asked once or watched."""

from __future__ import annotations

from collections.abc import Callable

import trio

from taskd.errors import Refused, Undecodable
from taskd.rpc.base import Duplex, Services, Stream, Unary
from taskd.wire.generated.grpc.health.v1 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthCheckResponseServingStatus,
)
from taskd.wire.messages import read_message

CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"


def health_services(
    status: Callable[[str], bool | None],
    changed: Callable[[], trio.Event] | None = None,
    *,
    recheck_s: float = 1.0,
) -> Services:
    """The Health service, to be merged into the table of `serve`.

    `status(service)`: True when that service takes calls, False when not now, None when there is no
    such service; '' stands for the process. `changed()` gives the event that the next change will
    set; a watcher also looks every `recheck_s`, because a stuck part announces nothing.
    """

    async def check(request: bytes) -> bytes:
        service = _service_in(request)
        serving = status(service)
        if serving is None:
            raise Refused("NOT_FOUND", f"no service {service!r} here")
        return _response(serving)

    async def watch(stream: Duplex) -> None:
        request = await stream.receive()
        if request is None:
            raise Refused("INVALID_ARGUMENT", "expected a HealthCheckRequest, found the end of the stream")
        service = _service_in(request)
        told: bytes | None = None
        while True:
            # Taken before the status is read: what changes from here on sets it.
            change = changed() if changed is not None else trio.Event()
            now = _response(status(service))
            if now != told:
                await stream.send(now)
                told = now
            with trio.move_on_after(recheck_s):
                await change.wait()

    return {CHECK: Unary(check), WATCH: Stream(watch)}


def _service_in(request: bytes) -> str:
    try:
        return read_message(HealthCheckRequest, request).service
    except Undecodable as error:
        raise Refused("INVALID_ARGUMENT", f"expected a HealthCheckRequest: {error}") from error


def _response(serving: bool | None) -> bytes:
    kinds = HealthCheckResponseServingStatus
    kind = kinds.SERVICE_UNKNOWN if serving is None else kinds.SERVING if serving else kinds.NOT_SERVING
    return bytes(HealthCheckResponse(status=kind))
