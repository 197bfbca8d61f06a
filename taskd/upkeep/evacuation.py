"""The duty of a broker that is to go: whatever waits is sent back to the log."""

from __future__ import annotations

from taskd.activation.lifecycle import WAITING
from taskd.inflight.writer import Inflight
from taskd.upkeep.duties import Duty

REASON = "evacuated"


def evacuation_duty(inflight: Inflight, limit: int) -> Duty:
    """Also for what comes to wait because its lease ended. What is sent is published by another duty."""

    async def send_away() -> int:
        return await inflight.forward_all(limit, REASON)

    return Duty(REASON, send_away, limit, lambda: 1.0, inflight.watch(*WAITING), publishes=True)
