"""Shares of what is free, whatever brokers do and however late they see a recall."""

from __future__ import annotations

import random
from collections import deque

import pytest

from taskd.wire.frames import Credit, CreditKind
from taskd.worker.credit import ACTIVE_S, MIXED_AHEAD, Room, StreamCredit, share, welcome


class Broker:
    """Uses the credit it has seen, which may be an old one."""

    def __init__(self) -> None:
        self.credit = StreamCredit()
        self.on_the_way: deque[Credit] = deque()
        self.seen = Credit(0, 0)
        self.sent = 0

    def see(self) -> None:
        if self.on_the_way:
            self.seen = self.on_the_way.popleft()

    def send(self, most: int, now: float) -> int:
        count = min(max(self.seen.total - self.sent, 0), most)
        self.sent += count
        self.credit.assigned(count, self.seen.number, now)
        return count


def offer(broker: Broker, others: list[Broker], capacity: int, held: int, now: float, idle: int = 0) -> bool:
    made = share(broker.credit, [b.credit for b in others], capacity=capacity, held=held, idle=idle, now=now)
    if made is not None:
        broker.on_the_way.append(broker.credit.offer(made.more, made.idle))
    return made is not None


@pytest.mark.parametrize("seed", range(200))
def test_all_that_may_still_come_fits(seed: int) -> None:
    rng = random.Random(seed)
    brokers = [Broker() for _ in range(rng.randint(1, 5))]
    capacity, held, now = rng.choice([1, 2, 8, 300]), 0, 0.0
    for _ in range(500):
        now += rng.random() * 0.5
        one = rng.choice(brokers)
        match rng.choice(["offer", "offer", "see", "send", "finish"]):
            case "offer":
                offer(one, [b for b in brokers if b is not one], capacity, held, now)
            case "see":
                one.see()
            case "send":
                held += one.send(rng.randint(0, 3 * capacity), now)
            case "finish":
                held -= rng.randint(0, held)
        assert held + sum(b.credit.outstanding for b in brokers) <= capacity + len(brokers)
        assert all(b.credit.outstanding >= b.seen.total - b.sent for b in brokers)


def test_a_broker_that_has_nothing_gives_back_what_a_busy_one_can_use() -> None:
    busy, idle = Broker(), Broker()
    now = 0.0
    for one, other in ((busy, idle), (idle, busy)):
        assert offer(one, [other], 100, 0, now)
        one.see()
    assert (busy.credit.promised, idle.credit.promised) == (50, 50)
    held = busy.send(50, now)
    assert offer(idle, [busy], 100, held, now)
    assert idle.credit.promised == 1
    assert idle.credit.outstanding == 50  # until it says that it has seen the recall
    assert not offer(busy, [idle], 100, held, now)
    idle.see()
    idle.send(0, now)
    assert offer(busy, [idle], 100, held, now)
    assert busy.credit.promised == 50
    assert idle.credit.outstanding == 1


def test_nothing_is_offered_while_nothing_is_free() -> None:
    one, other = Broker(), Broker()
    assert not offer(one, [other], 2, 2, 0.0)
    assert not offer(one, [other], 0, 0, 0.0)


def test_each_gets_one_though_there_are_more_brokers_than_slots() -> None:
    brokers = [Broker() for _ in range(5)]
    for one in brokers:
        assert offer(one, [b for b in brokers if b is not one], 2, 0, 0.0, idle=2)
        assert one.credit.promised == one.credit.idle == 1


def test_an_idle_slot_is_told_though_the_credit_is_large_enough() -> None:
    broker = Broker()
    assert offer(broker, [], 256, 0, 0.0, idle=1)
    broker.see()
    assert broker.send(1, 0.0) == 1
    assert broker.credit.idle == 0
    assert not offer(broker, [], 256, 1, 0.0, idle=0)
    assert offer(broker, [], 256, 0, 0.0, idle=1)
    assert broker.credit.idle == 1


def test_who_was_busy_long_ago_shares_like_the_others() -> None:
    busy, idle = Broker(), Broker()
    offer(busy, [idle], 100, 0, 0.0)
    busy.see()
    busy.send(50, 0.0)
    assert offer(idle, [busy], 100, 0, ACTIVE_S + 1)
    assert idle.credit.promised == 50


@pytest.mark.parametrize(
    ("plain", "of_loop", "async_share", "kind", "capacity"),
    [
        (Room(4, 1, 3), None, 0.5, CreditKind.ANY, 4),
        (Room(4, 4, 0), None, 0.5, CreditKind.ANY, 4),
        (Room(4, 4, 0), Room(100, 7, 93), 0.5, CreditKind.ASYNC, 100),
        (Room(4, 1, 3), Room(100, 100, 0), 0.5, CreditKind.PLAIN, 4),
        (Room(4, 4, 0), Room(100, 100, 0), 0.5, CreditKind.PLAIN, 4),
        (Room(4, 1, 3), Room(100, 7, 93), 0.0, CreditKind.ANY, 4),
        (Room(4, 1, 3), Room(100, 7, 93), 1.0, CreditKind.ANY, 4 + MIXED_AHEAD),
        (Room(4, 1, 3), Room(100, 99, 1), 1.0, CreditKind.ANY, 5),
    ],
)
def test_what_has_room_is_asked_for(
    plain: Room, of_loop: Room | None, async_share: float, kind: CreditKind, capacity: int
) -> None:
    asked, room = welcome(plain, of_loop, async_share)
    assert (asked, room.capacity) == (kind, capacity)
    assert room.free <= plain.free + (of_loop.free if of_loop else 0)


def test_a_change_of_kind_is_told_though_the_number_stays() -> None:
    broker = Broker()
    assert offer(broker, [], 4, 0, 0.0)
    made = share(broker.credit, [], capacity=4, held=0, idle=0, now=0.0, kind=CreditKind.ASYNC)
    assert made is not None
    assert made.kind is CreditKind.ASYNC
