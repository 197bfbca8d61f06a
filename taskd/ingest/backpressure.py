"""When reading must pause: the store's limits, and the reason in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from taskd.activation.lifecycle import Status


@dataclass(frozen=True, slots=True)
class Limits:
    """Most rows by state, and most bytes of the store's file."""

    max_pending_count: int = 2_048
    max_delay_count: int = 8_192
    max_processing_count: int = 2_048
    max_size_bytes: int = 3_000_000_000


REASONS = ("pending", "delayed", "processing", "size", "application", "overflow")


def full(counts: Counter[Status], size_bytes: int, limits: Limits) -> dict[str, str]:
    """Why nothing more may be read, by reason; empty when reading may go on."""
    # What is to be forwarded waits too: its topic may be out of reach.
    waiting = counts[Status.PENDING] + counts[Status.PARKED] + counts[Status.FORWARDED]
    held = counts[Status.PROCESSING] + counts[Status.CLAIMED]
    reasons = {}
    if waiting >= limits.max_pending_count:
        reasons["pending"] = (
            f"{waiting} rows wait for a worker, max_pending_count is {limits.max_pending_count}"
        )
    if held >= limits.max_processing_count:
        reasons["processing"] = (
            f"{held} rows are handed out, max_processing_count is {limits.max_processing_count}"
        )
    if size_bytes >= limits.max_size_bytes:
        reasons["size"] = f"the store has {size_bytes} bytes, max_size_bytes is {limits.max_size_bytes}"
    return reasons


def room(counts: Counter[Status], limits: Limits) -> int:
    """How many records may be read without passing a limit, if none of them is delayed; at least 1."""
    waiting = counts[Status.PENDING] + counts[Status.PARKED] + counts[Status.FORWARDED]
    return max(min(limits.max_pending_count - waiting, limits.max_delay_count), 1)


def too_many_delayed(counts: Counter[Status], arriving: int, limits: Limits) -> dict[str, str]:
    """Why a batch with `arriving` delayed rows must wait; empty when it need not."""
    delayed = counts[Status.DELAYED]
    if not arriving or delayed + arriving <= limits.max_delay_count:
        return {}
    return {"delayed": f"{delayed} rows are delayed, max_delay_count is {limits.max_delay_count}"}
