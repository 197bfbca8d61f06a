"""Which keys can change while a daemon runs, and what a new file changes.

A key that is not named here is read once, at the start. `dispatch.lease_s` is such a key because a worker
is told it when it connects: it keeps its leases alive at that pace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from taskd.config.redaction import redacted
from taskd.config.schema import Section

C = TypeVar("C", bound=Section)

# A section stands for everything in it.
BROKER = frozenset(
    {
        "dispatch.limits",
        "dispatch.max_assignments_per_frame",
        "dispatch.processing_deadline_grace_s",
        "drain_grace_s",
        "http.tls.certificate",
        "http.tls.client_ca",
        "http.tls.key",
        "log_format",
        "log_level",
        "push.timeout_s",
        "push.tls",
        "push.worker_map",
        "rpc.secrets",
        "rpc.tls.certificate",
        "rpc.tls.client_ca",
        "rpc.tls.key",
        "store.enforce_max_attempts",
        "store.max_crashes",
        "store.max_delay_count",
        "store.max_delay_s",
        "store.max_pending_count",
        "store.max_processing_attempts",
        "store.max_processing_count",
        "store.max_processing_deadline_s",
        "store.max_size_bytes",
        "store.tombstone_max_count",
        "store.tombstone_ttl_s",
        "store.vacuum_interval_s",
        "upkeep.interval_s",
    }
)
WORKER = frozenset({"log_format", "log_level"})


@dataclass(frozen=True, slots=True)
class Change:
    """One key, and what it was and is; secrets are not shown."""

    key: str
    was: object
    now: object
    live: bool


def changes(old: Section, new: Section, live: Collection[str]) -> list[Change]:
    """What differs, in the order of the schema."""
    found = []
    for path, was, now in _differences(old, new, ()):
        key = ".".join(path)
        found.append(Change(key, redacted(path, was), redacted(path, now), is_live(path, live)))
    return found


def is_live(path: tuple[str, ...], live: Collection[str]) -> bool:
    return any(".".join(path[:length]) in live for length in range(1, len(path) + 1))


def taking(old: C, new: C, live: Collection[str]) -> C:
    """`old` with the values of `new` for the keys that are live."""
    return _taking(old, new, live, ())


def _taking(old: C, new: C, live: Collection[str], path: tuple[str, ...]) -> C:
    update: dict[str, Any] = {}
    for name in type(old).model_fields:
        was, now, at = getattr(old, name), getattr(new, name), (*path, name)
        if is_live(at, live):
            update[name] = now
        elif isinstance(was, Section) and type(was) is type(now):
            update[name] = _taking(was, now, live, at)
    return old.model_copy(update=update)


def _differences(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if old == new:
        return
    if isinstance(old, Section) and type(old) is type(new):
        for name in type(old).model_fields:
            yield from _differences(getattr(old, name), getattr(new, name), (*path, name))
    elif isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), (*path, str(name)))
    else:
        yield path, old, new
