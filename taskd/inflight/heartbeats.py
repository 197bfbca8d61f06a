"""Signs of life that tasks give themselves: each moves the deadline of its lease, and tells how far it is.

The deadline is stored, so a broker that comes back knows it. Progress and message are kept in memory:
they are for people, and the task's next heartbeat brings them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from taskd.clock import Now
from taskd.inflight.base import Description, Ref, Verdict
from taskd.inflight.leases import Leases
from taskd.inflight.sqlite import SqliteStore

MAX_KEPT = 20_000  # tasks whose progress is known: those heard of last
MAX_MESSAGE_CHARS = 200  # of each, whatever its worker sent
UNCAPPED_MS = 2**53  # further than any deadline


class Heartbeat(NamedTuple):
    """One task is alive. `permille`: of its work that is done, None when it did not say."""

    ref: Ref
    permille: int | None = None
    message: str = ""


class Progress(NamedTuple):
    """What a task said last, and when, on the monotonic clock."""

    fence: int
    permille: int | None
    message: str
    at_mono_ms: int


class Extending:
    """Moves the deadlines of leases. Each is one write of the store."""

    def __init__(self, store: SqliteStore, leases: Leases) -> None:
        self._store = store
        self._leases = leases

    def extend(self, refs: Sequence[Ref], now: Now) -> list[Verdict]:
        """These run: their deadlines begin again, but never beyond start + `max_processing_deadline_ms`.

        What was not known to have started is counted as started now. A lease that is not the newest of
        its row stays as it is.
        """
        verdicts = self._leases.start(refs, now)
        policy = self._store.policy
        cap_ms = policy.max_processing_deadline_ms or UNCAPPED_MS
        for ref, verdict in zip(refs, verdicts, strict=True):
            if verdict is Verdict.APPLIED:
                self._store.run("extend", now.mono_ms + policy.grace_ms, cap_ms + policy.grace_ms, ref.id)
        return verdicts


class ProgressNotes:
    """What running tasks said last, by id; of at most `MAX_KEPT`, the longest silent are left out first."""

    def __init__(self) -> None:
        self._kept: dict[str, Progress] = {}

    def note(self, heartbeat: Heartbeat, mono_ms: int) -> None:
        id_, fence = heartbeat.ref.id, heartbeat.ref.fence
        permille, message = heartbeat.permille, heartbeat.message[:MAX_MESSAGE_CHARS]
        before = self._kept.pop(id_, None)
        if before is not None and before.fence == fence:  # one that says nothing new only says: still alive
            permille = before.permille if permille is None else permille
            message = message or before.message
        self._kept[id_] = Progress(fence, permille, message, mono_ms)
        if len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]

    def added_to(self, description: Description, mono_ms: int) -> Description:
        """With what was said under the very lease that `description` is of."""
        found = self._kept.get(description.id)
        if found is None or found.fence != description.fence:
            return description
        age_ms = max(mono_ms - found.at_mono_ms, 0)
        return replace(description, permille=found.permille, message=found.message, heartbeat_age_ms=age_ms)

    def forget(self, ids: Iterable[str]) -> None:
        if self._kept:
            for id_ in ids:
                self._kept.pop(id_, None)
