"""`taskd.v1.InspectService`: what became of an activation."""

from __future__ import annotations

from taskd.errors import Refused, Undecodable
from taskd.inflight.base import Description
from taskd.inflight.writer import Inflight
from taskd.rpc.base import Services, Unary
from taskd.wire.generated.taskd.v1 import ActivationStatus, GetStatusRequest, GetStatusResponse
from taskd.wire.messages import read_message

METHOD = "/taskd.v1.InspectService/GetStatus"
MAX_IDS = 1_000  # of one request


class Inspect:
    def __init__(self, inflight: Inflight) -> None:
        self._inflight = inflight

    @property
    def services(self) -> Services:
        return {METHOD: Unary(self.get_status)}

    async def get_status(self, request: bytes) -> bytes:
        try:
            ids = read_message(GetStatusRequest, request).ids
        except Undecodable as error:
            raise Refused("INVALID_ARGUMENT", f"the request cannot be read: {error}") from None
        if len(ids) > MAX_IDS:
            raise Refused("INVALID_ARGUMENT", f"{len(ids)} ids asked for, at most {MAX_IDS} at once")
        descriptions = await self._inflight.describe(ids)
        return bytes(GetStatusResponse(statuses=[_status(found) for found in descriptions]))


def _status(found: Description) -> ActivationStatus:
    return ActivationStatus(
        id=found.id,
        state="unknown" if found.status is None else found.status.word,
        outcome=found.outcome,
        continued_as=found.continued_as,
        dead_lettered=found.dead_lettered,
        attempts=found.attempts,
        received_at_ms=found.received_at_ms,
        finished_at_ms=found.finished_at_ms,
        reason=found.reason,
        error=found.error,
        worker=found.worker,
        fence=found.fence,
        started_at_ms=found.started_at_ms,
        deadline_in_ms=found.deadline_in_ms,
        permille=found.permille,
        message=found.message,
        heartbeat_age_ms=found.heartbeat_age_ms,
    )
