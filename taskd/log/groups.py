"""Consumer groups of the logs that live in this process: who reads which partition, and how it changes hands.

A change of membership moves as few partitions as possible. A partition that must move is first
revoked from its owner, and is free for the next one when the owner acknowledged. Everything here is
synchronous, so that no invariant is broken across an await; members start timers and wake readers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import count
from typing import Protocol

from taskd.log.base import Partition


class Member(Protocol):
    """What a group asks of a reader. None of these may raise or wait."""

    @property
    def topics(self) -> Collection[str]: ...

    def given(self, partitions: frozenset[Partition]) -> None:
        """These are yours now."""
        ...

    def taken(self, partitions: frozenset[Partition], acknowledge: Callable[[], None]) -> None:
        """Stop reading these; they go on to the next member when `acknowledge` is called."""
        ...


class Group:
    """One consumer group. `topics` is the log's own mapping of topic to partitions and may grow."""

    def __init__(self, topics: Mapping[str, int]) -> None:
        self._topics = topics
        self._members: dict[int, Member] = {}
        self._owners: dict[Partition, int] = {}
        # A new object for each revocation: a late acknowledgement of an earlier one must not count.
        self._releasing: dict[Partition, object] = {}
        self._ids = count(1)

    def join(self, member: Member) -> int:
        """Add a member and hand out what is free; returns the id to leave with."""
        member_id = next(self._ids)
        self._members[member_id] = member
        self.rebalance()
        return member_id

    def leave(self, member_id: int) -> None:
        """Forget a member; what it held is free at once, acknowledged or not."""
        del self._members[member_id]
        for partition in [p for p, owner in self._owners.items() if owner == member_id]:
            self._free(partition)
        self.rebalance()

    def holds(self, member_id: int, partition: Partition) -> bool:
        """Whether nobody else may have been given the partition: owned, or revoked but not acknowledged."""
        return self._owners.get(partition) == member_id

    def owner(self, partition: Partition) -> Member | None:
        return self._members.get(self._owners.get(partition, 0))

    def rebalance(self) -> None:
        """Revoke what should change hands and give out what is free. Harmless when nothing changed."""
        settled = {p: owner for p, owner in self._owners.items() if p not in self._releasing}
        target = share({i: m.topics for i, m in self._members.items()}, self._topics, settled)
        for member_id, member in list(self._members.items()):
            leaving = frozenset(p for p, owner in settled.items() if owner == member_id != target.get(p))
            if leaving:
                token = object()
                self._releasing.update(dict.fromkeys(leaving, token))
                member.taken(leaving, partial(self._released, leaving, token))
        for member_id, member in list(self._members.items()):
            coming = frozenset(p for p, to in target.items() if to == member_id and p not in self._owners)
            if coming:
                self._owners.update(dict.fromkeys(coming, member_id))
                member.given(coming)

    def _released(self, partitions: frozenset[Partition], token: object) -> None:
        still = [p for p in partitions if self._releasing.get(p) is token]
        for partition in still:
            self._free(partition)
        if still:
            self.rebalance()

    def _free(self, partition: Partition) -> None:
        self._owners.pop(partition, None)
        self._releasing.pop(partition, None)


def share(
    members: Mapping[int, Collection[str]],
    topics: Mapping[str, int],
    owners: Mapping[Partition, int],
) -> dict[Partition, int]:
    """Divide the partitions of the topics that `members` subscribe to; as few as possible change hands. Pure.

    `members`: subscribed topics by member. `topics`: number of partitions. `owners`: who has what now.
    Members that subscribe to the same topics differ by at most one partition.
    """
    target: dict[Partition, int] = {}
    held = dict.fromkeys(members, 0)
    partitions = [Partition(topic, number) for topic in sorted(topics) for number in range(topics[topic])]
    for partition in partitions:
        owner = owners.get(partition)
        if owner is not None and partition.topic in members.get(owner, ()):
            target[partition] = owner
            held[owner] += 1
    for partition in partitions:
        readers = _readers(members, partition)
        if partition not in target and readers:
            target[partition] = _least(readers, held)
            held[target[partition]] += 1
    while (move := _unfair(target, members, held)) is not None:
        partition, taker = move
        held[target[partition]] -= 1
        held[taker] += 1
        target[partition] = taker
    return target


def _unfair(
    target: Mapping[Partition, int], members: Mapping[int, Collection[str]], held: Mapping[int, int]
) -> tuple[Partition, int] | None:
    """A partition whose owner holds at least two more than somebody who could read it, and that somebody."""
    for partition in sorted(target, reverse=True):
        taker = _least(_readers(members, partition), held)
        if held[target[partition]] - held[taker] > 1:
            return partition, taker
    return None


def _readers(members: Mapping[int, Collection[str]], partition: Partition) -> list[int]:
    return [member for member, topics in members.items() if partition.topic in topics]


def _least(members: list[int], held: Mapping[int, int]) -> int:
    return min(members, key=lambda member: (held[member], member))
