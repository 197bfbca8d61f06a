"""`Cancel` of `taskd.v1.AdminService`: operators end activations by id."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from taskd.admin.orders import SERVICE, parsed, required
from taskd.errors import Refused
from taskd.inflight.base import Ref
from taskd.inflight.cancelling import Cancelled, Effect
from taskd.inflight.writer import Inflight
from taskd.rpc.base import Services, Unary
from taskd.telemetry import audit
from taskd.wire.envelope import MAX_ID_BYTES
from taskd.wire.generated.taskd import v1

MAX_IDS = 1_000  # of one order
IDS_PER_WRITE = 100  # others write in between

StopLeases = Callable[[Sequence[tuple[str, Ref]]], None]  # tells workers, by id, to end these

WIRE_EFFECTS = {
    Effect.DROPPED: v1.CancelEffect.DROPPED,
    Effect.STOPPING: v1.CancelEffect.STOPPING,
    Effect.UNTOLD: v1.CancelEffect.UNTOLD,
    Effect.EXPECTED: v1.CancelEffect.EXPECTED,
    Effect.ENDED: v1.CancelEffect.ENDED,
    Effect.LEAVING: v1.CancelEffect.LEAVING,
    Effect.UNKNOWN: v1.CancelEffect.UNKNOWN,
}


class CancelOrders:
    """`stop_leases`: how workers on the stream are told."""

    def __init__(self, inflight: Inflight, stop_leases: StopLeases) -> None:
        self._inflight = inflight
        self._stop_leases = stop_leases

    @property
    def services(self) -> Services:
        return {f"/{SERVICE}/Cancel": Unary(self.cancel)}

    async def cancel(self, request: bytes) -> bytes:
        """Raises Refused before anything is done; a StoreError may leave a part done. Again is harmless."""
        order = parsed(v1.CancelRequest, request)
        ids = _checked(order.ids)
        author, reason = required(order.author, "author"), required(order.reason, "reason")
        found: list[Cancelled] = []
        for start in range(0, len(ids), IDS_PER_WRITE):
            some = ids[start : start + IDS_PER_WRITE]
            found += await self._cancel(some, author, reason, order.even_unknown)
        return bytes(v1.CancelResponse(activations=[_wire(one) for one in found]))

    async def _cancel(self, ids: list[str], author: str, reason: str, even_unknown: bool) -> list[Cancelled]:
        # What the store dropped has to be told to its worker, also when the operator hangs up meanwhile.
        with trio.CancelScope(shield=True):
            found = await self._inflight.cancel(ids, f"by {author}: {reason}", even_unknown=even_unknown)
            self._stop_leases([(one.holder, one.ref) for one in found if one.holder and one.ref])
            audit.cancelled(_by_effect(found), by=author, reason=reason)
        return found


def _by_effect(found: list[Cancelled]) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {}
    for one in found:
        ids.setdefault(one.effect.value, []).append(one.id)
    return ids


def _checked(ids: list[str]) -> list[str]:
    if not ids:
        raise Refused("INVALID_ARGUMENT", "expected ids of activations, found none")
    if len(ids) > MAX_IDS:
        raise Refused("INVALID_ARGUMENT", f"{len(ids)} ids in one order, at most {MAX_IDS} at once")
    if any(not 0 < len(id_.encode()) <= MAX_ID_BYTES for id_ in ids):
        raise Refused("INVALID_ARGUMENT", f"an id has 1 to {MAX_ID_BYTES} bytes")
    return ids


def _wire(one: Cancelled) -> v1.CancelledActivation:
    return v1.CancelledActivation(
        id=one.id,
        effect=WIRE_EFFECTS[one.effect],
        state="unknown" if one.status is None else one.status.word,
        outcome=one.outcome,
        newest=one.newest,
    )
