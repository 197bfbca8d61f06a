"""What an operator is told of one activation."""

from __future__ import annotations

from taskd.activation.lifecycle import HELD, Status
from taskd.clock import Now
from taskd.inflight.base import Description
from taskd.inflight.sqlite import SqliteStore


def describe(store: SqliteStore, id_: str, now: Now) -> Description:
    """What is known of an activation, for whoever asks what became of it."""
    found = store.one("describe", id_)
    if found is None:
        return Description(id_)
    (
        _,
        status,
        outcome,
        continued_as,
        dead_lettered,
        attempts,
        received,
        finished,
        reason,
        error,
        stuck,
        holder,
        fence,
        started,
        lease_end,
        lane,
        taskname,
    ) = found
    if status == Status.PENDING and not reason and store.limits.rules:
        reason = store.held_back(lane, taskname, now)
    held = status in HELD
    return Description(
        id_,
        Status(status),
        outcome or "",
        continued_as or "",
        bool(dead_lettered),
        attempts,
        received,
        finished or 0,
        reason or "",
        stuck or error or "",
        worker=(holder or "") if held else "",
        fence=fence if held else 0,
        started_at_ms=(started or 0) if held else 0,
        deadline_in_ms=lease_end - now.mono_ms if held and lease_end is not None else None,
    )
