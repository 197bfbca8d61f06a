"""How a group's partitions are divided and change hands."""

from __future__ import annotations

from collections.abc import Callable, Collection

from hypothesis import given
from hypothesis import strategies as st

from taskd.log.base import Partition
from taskd.log.groups import Group, share

TOPICS = ("a", "b", "c")
memberships = st.dictionaries(st.integers(1, 6), st.sets(st.sampled_from(TOPICS), min_size=1), max_size=5)
counts = st.fixed_dictionaries(dict.fromkeys(TOPICS, st.integers(0, 5)))


class Reader:
    def __init__(self, *topics: str) -> None:
        self.topics: Collection[str] = topics
        self.has: set[Partition] = set()
        self.revoked: list[tuple[frozenset[Partition], Callable[[], None]]] = []

    def given(self, partitions: frozenset[Partition]) -> None:
        assert not self.has & partitions
        self.has |= partitions

    def taken(self, partitions: frozenset[Partition], acknowledge: Callable[[], None]) -> None:
        assert partitions <= self.has
        self.has -= partitions
        self.revoked.append((partitions, acknowledge))


@given(memberships, counts, st.data())
def test_every_partition_has_one_reader_that_wants_it(
    members: dict[int, set[str]], topics: dict[str, int], data: st.DataObject
) -> None:
    everything = [Partition(topic, number) for topic in topics for number in range(topics[topic])]
    owners = {p: data.draw(st.integers(1, 6)) for p in everything if data.draw(st.booleans())}
    target = share(members, topics, owners)
    wanted = {p for p in everything if any(p.topic in names for names in members.values())}
    assert target.keys() == wanted
    assert all(p.topic in members[member] for p, member in target.items())


@given(st.sets(st.integers(1, 6), min_size=1), counts)
def test_equal_members_get_equal_shares_and_then_nothing_moves(ids: set[int], topics: dict[str, int]) -> None:
    members = dict.fromkeys(ids, TOPICS)
    target = share(members, topics, {})
    held = [list(target.values()).count(member) for member in ids]
    assert max(held) - min(held) <= 1
    assert share(members, topics, target) == target


def test_a_newcomer_takes_no_more_than_its_share() -> None:
    topics = {"a": 4}
    before = share({1: "a"}, topics, {})
    after = share({1: "a", 2: "a"}, topics, before)
    assert sum(before[p] != after[p] for p in before) == 2


def test_nothing_is_given_before_it_is_acknowledged() -> None:
    group, first, second = Group({"a": 4}), Reader("a"), Reader("a")
    group.join(first)
    second_id = group.join(second)
    ((leaving, acknowledge),) = first.revoked
    assert len(first.has) == len(leaving) == 2
    assert second.has == set()
    assert not group.holds(second_id, next(iter(leaving)))
    acknowledge()
    acknowledge()  # twice is once
    assert second.has == leaving


def test_who_leaves_gives_up_everything_at_once() -> None:
    group, first, second = Group({"a": 4}), Reader("a"), Reader("a")
    first_id = group.join(first)
    group.join(second)
    group.leave(first_id)
    assert len(second.has) == 4
    first.revoked[0][1]()  # too late to matter
    assert len(second.has) == 4


def test_a_newcomer_that_leaves_before_the_acknowledgement_changes_nothing() -> None:
    group, first = Group({"a": 2}), Reader("a")
    group.join(first)
    group.leave(group.join(Reader("a")))
    assert len(first.has) == 1  # the revoked one is still being flushed
    first.revoked[0][1]()
    assert len(first.has) == 2


def test_an_old_acknowledgement_does_not_count_for_a_new_revocation() -> None:
    group, first, second = Group({"a": 1, "b": 1}), Reader("a", "b"), Reader("a", "b")
    group.join(first)
    second_id = group.join(second)
    _, old = first.revoked[0]
    old()
    group.leave(second_id)
    assert len(first.has) == 2
    third = Reader("a", "b")
    group.join(third)
    old()
    assert third.has == set()
    first.revoked[1][1]()
    assert len(third.has) == 1


def test_a_new_topic_is_shared_out() -> None:
    topics = {"a": 1}
    group, reader = Group(topics), Reader("a", "b")
    group.join(reader)
    topics["b"] = 2
    group.rebalance()
    assert len(reader.has) == 3
