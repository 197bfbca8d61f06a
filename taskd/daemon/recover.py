"""The way forward after a store was damaged: take what can be read of it, then read the log again.

First what is salvaged goes into the store, so that its ids are known, then the group's offsets go back. The
broker must not run, and with Kafka no other member of its groups may hold the partitions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from taskd import aio
from taskd.clock import Clock
from taskd.config.schema import BrokerConfig
from taskd.daemon import logs, settings
from taskd.daemon.locks import hold_data
from taskd.errors import LogUnavailable, StartupError
from taskd.inflight.quarantine import MARK, found_aside
from taskd.inflight.salvage import Salvaged, salvage
from taskd.inflight.sqlite import SqliteStore
from taskd.log.base import Log, Partition, Reader, Revoked

ASSIGNED_WITHIN_S = 30.0  # members that died must be missed first: log.topics.….session_timeout_ms
LOOK_WITHIN_S = 5.0  # with none by then, and no lag, it is the end
READ_WITHIN_S = 30.0  # of what surely is there
SALVAGED = ".salvaged-"  # in the name of a file that was taken in: it is not taken again


@dataclass(frozen=True, slots=True)
class Rewound:
    """One partition's committed offset. `now` is smaller than `was`, or the same."""

    partition: Partition
    was: int | None
    now: int | None


@dataclass(slots=True)
class Recovered:
    salvaged: list[tuple[Path, Salvaged]] = field(default_factory=list)
    rewound: list[Rewound] = field(default_factory=list)


def parse_place(text: str) -> tuple[Partition, int]:
    """`TOPIC/PARTITION=OFFSET`; raises ValueError."""
    place, equals, offset = text.partition("=")
    topic, slash, number = place.rpartition("/")
    if not (equals and slash and topic and number.isdecimal() and offset.isdecimal()):
        raise ValueError(f"expected TOPIC/PARTITION=OFFSET such as taskd/0=1200, found {text!r}")
    return Partition(topic, int(number)), int(offset)


async def recover(
    config: BrokerConfig,
    clock: Clock,
    *,
    from_offsets: Mapping[Partition, int],
    from_time_ms: int | None,
) -> Recovered:
    """Salvage every damaged file that was set aside, then rewind.

    Raises StartupError: exit 75 while a broker runs or holds a partition, 69 when the log cannot be
    reached, 73 when a file cannot be used. May be repeated: nothing is taken twice.
    """
    done = Recovered()
    with hold_data(config):
        path = settings.store_path(config)
        store = SqliteStore(path, clock.now(), settings.policy(config))
        try:
            for damaged in found_aside(path):
                done.salvaged.append((damaged, salvage(damaged, store, clock.now())))
        finally:
            store.close()
        for damaged, _ in done.salvaged:
            _rename(damaged)
        if from_offsets or from_time_ms is not None:
            done.rewound = await _rewind_all(config, clock, from_offsets, from_time_ms)
            _check_all_done(from_offsets, done.rewound)
    return done


async def _rewind_all(
    config: BrokerConfig, clock: Clock, from_offsets: Mapping[Partition, int], from_time_ms: int | None
) -> list[Rewound]:
    done: list[Rewound] = []
    try:
        async with aio.open_loop(), logs.open_logs(config, clock) as opened:
            for source in logs.sources(config):
                wanted = {p: n for p, n in from_offsets.items() if p.topic in source.topics}
                if wanted or from_time_ms is not None:
                    async with _reading(source, opened[source.place], wanted) as reader:
                        done += await _rewind(reader, wanted, from_time_ms)
    except BaseExceptionGroup as group:
        raise aio.lone(group) from None
    return done


def _rename(damaged: Path) -> None:
    for side in ("", "-wal", "-shm"):
        old = Path(f"{damaged}{side}")
        if old.exists():
            old.rename(old.with_name(old.name.replace(MARK, SALVAGED)))


@asynccontextmanager
async def _reading(
    source: logs.Source, opened: Log, wanted: Mapping[Partition, int]
) -> AsyncIterator[Reader]:
    """A member of the group that has its partitions; it leaves the group at the end."""
    assigned = trio.Event()

    async def follow(reader: Reader) -> None:
        async for change in reader.assignments:
            if isinstance(change, Revoked):
                change.acknowledge()
            elif set(wanted) <= reader.assigned:
                assigned.set()

    async with source.open(opened) as reader, trio.open_nursery() as nursery:
        nursery.start_soon(follow, reader)
        with trio.move_on_after(ASSIGNED_WITHIN_S):
            await assigned.wait()
        if not assigned.is_set():
            missing = ", ".join(map(str, sorted(set(wanted) - reader.assigned))) or str(source)
            raise StartupError(
                f"group {source.group} did not give {missing} within {ASSIGNED_WITHIN_S:g} s. Check that the "
                "log is reached, that the partition exists, and stop the other brokers of the group.",
                exit_code=69,
            )
        yield reader
        nursery.cancel_scope.cancel()


async def _rewind(
    reader: Reader, from_offsets: Mapping[Partition, int], from_time_ms: int | None
) -> list[Rewound]:
    reader.pause(reader.assigned)
    partitions = sorted(reader.assigned if from_time_ms is not None else from_offsets)
    return [await _rewind_one(reader, p, from_offsets.get(p), from_time_ms) for p in partitions]


async def _rewind_one(
    reader: Reader, partition: Partition, wanted: int | None, from_time_ms: int | None
) -> Rewound:
    was = await reader.committed(partition)
    found = await _first_at(reader, partition, 0 if wanted is not None else from_time_ms or 0)
    if was is None or found is None:  # nothing was read yet, or there is nothing to read again
        return Rewound(partition, was, was)
    now = min(was, max(found, wanted or 0))  # never ahead: that would lose what lies between
    await reader.commit({partition: now})
    return Rewound(partition, was, now)


async def _first_at(reader: Reader, partition: Partition, timestamp_ms: int) -> int | None:
    """Offset of the first record at or after that time; None when there is none."""
    try:
        await reader.seek_to_time(partition, timestamp_ms)
    except LogUnavailable as error:
        raise StartupError(f"{error}. Try again when the log is reached.") from error
    reader.resume([partition])
    try:
        with trio.move_on_after(READ_WITHIN_S):
            while True:
                for record in await reader.read_batch(1, LOOK_WITHIN_S):
                    if record.partition == partition:
                        return record.offset
                if not (await reader.lag()).get(partition, 0):
                    return None
    except LogUnavailable as error:
        raise StartupError(f"{error}. Try again when the log is reached.") from error
    finally:
        reader.pause([partition])
    # To take this for the end would leave records unread that were asked for.
    raise StartupError(
        f"{partition} has records, but none was read within {READ_WITHIN_S:g} s. "
        "Try again when the log is reached."
    )


def _check_all_done(from_offsets: Mapping[Partition, int], rewound: Sequence[Rewound]) -> None:
    missing = from_offsets.keys() - {entry.partition for entry in rewound}
    if missing:
        raise StartupError(
            f"{', '.join(map(str, sorted(missing)))} is not consumed by this broker; "
            "name a partition of a topic that the configuration consumes.",
            exit_code=73,
        )
