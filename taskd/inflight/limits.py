"""Limits of what may be handed out: rules, and how much room they leave now.

What is held is counted by the rows (`Lane.counts`), never apart from them, so no end of a lease can be
missed. A limited task has a lane of its own in its namespace: while it is full, claims pass it over
without a look at its rows. Where a namespace is in strict order its tasks stay in one lane, because
nothing may overtake: there a rate holds up what is behind it, and a task's concurrency is one anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from taskd.activation.lifecycle import Status
from taskd.inflight.rates import Bucket, Rate

if TYPE_CHECKING:
    from taskd.inflight.sqlite import Lane

UNLIMITED = 2**31


class LimitKind(Enum):
    """What a limit is for."""

    NAMESPACE = "namespace"
    TASK = "task"
    POOL = "pool"


@dataclass(frozen=True, slots=True)
class LimitRule:
    """One limit. `name`: as it was configured, and what people are told; of a pool, the pool.

    `application` None: of every application, together. `concurrency`: most leases at once; None: any.
    """

    kind: LimitKind
    name: str
    application: str | None = None
    namespace: str = ""
    taskname: str = ""
    concurrency: int | None = None
    rate: Rate | None = None


class LanedTask(NamedTuple):
    """A task that has lanes of its own, one in each application it is limited in."""

    application: str | None
    namespace: str
    taskname: str


@dataclass(frozen=True, slots=True)
class LimitState:
    """One limit now. `waiting`: rows that wait because of it; 0 while it leaves room."""

    kind: LimitKind
    name: str
    concurrency: int | None
    rate: Rate | None
    live: int
    waiting: int


class Limit:
    """One limit, the lanes it concerns, and the tokens of its rate."""

    __slots__ = ("bucket", "in_order", "lanes", "rule")

    def __init__(self, rule: LimitRule, bucket: Bucket | None, *, in_order: bool) -> None:
        self.rule = rule
        self.bucket = bucket
        self.in_order = in_order  # a task of a strict-order namespace: it shares the namespace's lane
        self.lanes: dict[int, Lane] = {}

    def concerns(self, lane: Lane) -> bool:
        rule = self.rule
        if rule.namespace != lane.namespace or rule.application not in (None, lane.application):
            return False
        return rule.kind is LimitKind.NAMESPACE or self.in_order or rule.taskname == lane.taskname

    @property
    def words(self) -> str:
        """How people are told of it: `limit of task mail:send`."""
        return f"limit of {self.rule.kind.value} {self.rule.name}"

    def live(self) -> int:
        """Leases now."""
        return sum(lane.held for lane in list(self.lanes.values()))

    def pending(self) -> int:
        return sum(lane.counts[Status.PENDING] for lane in list(self.lanes.values()))

    def room(self, now_ms: int) -> int:
        """How many more may be handed out now."""
        room = UNLIMITED
        if self.rule.concurrency is not None and not self.in_order:
            room = max(self.rule.concurrency - self.live(), 0)
        if self.bucket is not None and room:
            room = min(room, self.bucket.tokens(now_ms))
        return room


class Limits:
    """Every limit that holds. One is made for each set of rules; buckets of rates that stay are kept."""

    def __init__(
        self,
        rules: tuple[LimitRule, ...] = (),
        strict_order_namespaces: frozenset[str] = frozenset(),
        now_ms: int = 0,
        before: Limits | None = None,
    ) -> None:
        self.rules = rules
        kept = {(one.rule.name, one.rule.rate): one.bucket for one in before.rated} if before else {}
        self._by_namespace: dict[str, list[Limit]] = {}
        self._tasks: dict[str, list[LanedTask]] = {}  # by task name
        for rule in rules:
            if rule.kind is LimitKind.POOL:
                continue
            bucket = None if rule.rate is None else kept.get((rule.name, rule.rate))
            if rule.rate is not None and bucket is None:
                bucket = Bucket(rule.rate, now_ms)
            in_order = rule.kind is LimitKind.TASK and rule.namespace in strict_order_namespaces
            self._by_namespace.setdefault(rule.namespace, []).append(Limit(rule, bucket, in_order=in_order))
            if rule.kind is LimitKind.TASK and not in_order:
                own = LanedTask(rule.application, rule.namespace, rule.taskname)
                self._tasks.setdefault(rule.taskname, []).append(own)
        self.rated: tuple[Limit, ...] = tuple(limit for limit in self._every() if limit.bucket is not None)
        self.pools = {rule.name: rule.concurrency or 0 for rule in rules if rule.kind is LimitKind.POOL}

    @property
    def laned(self) -> frozenset[LanedTask]:
        """The tasks that have lanes of their own."""
        return frozenset(task for tasks in self._tasks.values() for task in tasks)

    def lane_task(self, application: str, namespace: str, taskname: str) -> str:
        """`taskname` when it has a lane of its own there, else the empty name of the namespace's lane."""
        for task in self._tasks.get(taskname, ()):
            if task.namespace == namespace and task.application in (None, application):
                return taskname
        return ""

    # ---- lanes that come and go

    def attach(self, lane: Lane) -> None:
        """Count this lane, and tell it which limits hold for the whole of it."""
        here = [limit for limit in self._by_namespace.get(lane.namespace, ()) if limit.concerns(lane)]
        for limit in here:
            limit.lanes[lane.number] = lane
        lane.limits = tuple(limit for limit in here if not limit.in_order)

    def detach(self, lane: Lane) -> None:
        for limit in self._by_namespace.get(lane.namespace, ()):
            limit.lanes.pop(lane.number, None)

    # ---- what they leave room for

    def in_order(self, lane: Lane, taskname: str) -> list[Limit]:
        """The rates that hold for this task in a strict-order lane."""
        return [
            limit
            for limit in self._by_namespace.get(lane.namespace, ())
            if limit.in_order and limit.rule.taskname == taskname and lane.number in limit.lanes
        ]

    def next_token_ms(self, now_ms: int) -> int | None:
        """When the next token comes that somebody waits for; None: nobody waits for one."""
        due = [
            limit.bucket.ready_at_ms()
            for limit in self.rated
            if limit.bucket is not None and not limit.bucket.tokens(now_ms) and limit.pending()
        ]
        return min(due, default=None)

    def states(self, now_ms: int) -> list[LimitState]:
        """Every limit of namespaces and tasks."""
        found = []
        for limit in self._every():
            rule, room = limit.rule, limit.room(now_ms)
            waiting = 0 if room else limit.pending()
            found.append(LimitState(rule.kind, rule.name, rule.concurrency, rule.rate, limit.live(), waiting))
        return found

    def _every(self) -> Iterator[Limit]:
        for limits in self._by_namespace.values():
            yield from limits


def room(limits: Iterable[Limit], now_ms: int) -> int:
    """How many more may be handed out where all of these hold."""
    return min((limit.room(now_ms) for limit in limits), default=UNLIMITED)
