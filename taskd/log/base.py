"""The log: where activations wait before the broker takes them, and where retries and dead letters go.

A log has topics, a topic has partitions, a partition is a sequence of records with growing offsets.
Readers of one consumer group share the partitions; the group remembers, for each partition, the
offset it reads on from. Three logs implement this interface side by side: `memory`, `embedded` and
`kafka`; `tests/contract/test_log.py` is the definition of their behaviour.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import trio

Headers = tuple[tuple[str, bytes], ...]


class Partition(NamedTuple):
    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.number}"


class Record(NamedTuple):
    """One record as read. `timestamp_ms`: wall clock, milliseconds since 1970, of its producer or the log."""

    partition: Partition
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes
    headers: Headers = ()


class Outgoing(NamedTuple):
    """One record to append. Records of one key go to one partition; those without are spread."""

    topic: str
    value: bytes
    key: bytes | None = None
    headers: Headers = ()


class Position(NamedTuple):
    """Where an appended record came to lie."""

    partition: Partition
    offset: int


@dataclass(frozen=True, slots=True)
class Assigned:
    """The reader now reads these partitions, each from its committed offset or as `offset_reset` says."""

    partitions: frozenset[Partition]


@dataclass(frozen=True, slots=True)
class Revoked:
    """The group takes these partitions away. No record of them is read any more.

    Flush what was read, commit it, then call `acknowledge()`; until then (or until the log's own
    deadline is over) no other reader is given them.
    """

    partitions: frozenset[Partition]
    acknowledge: Callable[[], None] = field(default=lambda: None, compare=False)


Assignment = Assigned | Revoked


class Reader(Protocol):
    """One member of a consumer group. Opened by `Log.open_reader`."""

    assignments: trio.MemoryReceiveChannel[Assignment]
    """Changes of what this reader reads, in order. Somebody must keep receiving."""

    async def read_batch(self, max_records: int, within_s: float) -> list[Record]:
        """Up to `max_records` records as soon as any are ready; empty when none came within `within_s`.

        Of each partition in offset order. An outage of the log is waited out inside, with
        back-off; `healthy` tells. Cancelling loses nothing: what was not returned is read again.
        """
        ...

    async def commit(self, offsets: Mapping[Partition, int], metadata: str = "") -> None:
        """Remember durably, for the group, the offset to read *next* in each partition.

        Raises LogUnavailable when the log refused or did not answer in time: records may then be
        read again, by this reader or another.
        """
        ...

    async def committed(self, partition: Partition) -> int | None:
        """The group's committed offset, None when there is none."""
        ...

    def pause(self, partitions: Collection[Partition]) -> None:
        """Stop returning records of these partitions, keeping the membership and the position."""
        ...

    def resume(self, partitions: Collection[Partition]) -> None: ...

    async def seek(self, partition: Partition, offset: int) -> None:
        """Read on from `offset`; the next batch holds nothing before it. Out of range: `offset_reset`."""
        ...

    async def seek_to_time(self, partition: Partition, timestamp_ms: int) -> None:
        """Read on from the first record at or after `timestamp_ms`; at the end when there is none."""
        ...

    async def lag(self) -> dict[Partition, int]:
        """Records between the reader's position and the end, for each assigned partition."""
        ...

    @property
    def assigned(self) -> frozenset[Partition]: ...

    @property
    def healthy(self) -> bool:
        """False while the log cannot be reached."""
        ...


class Writer(Protocol):
    """Appends records. Opened by `Log.open_writer`; may be shared by many tasks."""

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        """Append and wait until durable. One answer for each record, in order.

        An Exception in the answer is that record's own: LogUnavailable when trying again is right,
        `Forbidden` when somebody has to allow it first, `Rejected` when it never can succeed.
        Never raises for a record.
        """
        ...


class Rejected(Exception):
    """The log will never take this record: it is too large, or its topic has no possible name."""


class Forbidden(Exception):
    """We may not write to this topic until an operator allows it. The text is the same for each record."""


class Log(Protocol):
    """A connection to one log."""

    def open_reader(
        self, topics: Collection[str], group: str, *, offset_reset: str = "earliest"
    ) -> AbstractAsyncContextManager[Reader]:
        """Join `group`. `offset_reset`: `earliest` or `latest`, where to begin when nothing is committed.

        Leaving the block leaves the group; flush and commit before.
        """
        ...

    def open_writer(self) -> AbstractAsyncContextManager[Writer]: ...

    async def ensure_topics(self, topics: Mapping[str, int]) -> None:
        """Create the topics that are missing, with so many partitions each."""
        ...


Publish = Callable[[Sequence[Outgoing]], Awaitable[list[Position | Exception]]]
