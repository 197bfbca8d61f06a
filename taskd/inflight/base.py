"""What the store of in-flight activations takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from taskd.activation.lifecycle import Status
from taskd.inflight.known import KnownTasks
from taskd.inflight.limits import LimitRule
from taskd.wire.frames import Assignment, LeaseRef

__all__ = [
    "MAX_CLAIM_BYTES",
    "Arrival",
    "ClaimRequest",
    "Claimed",
    "Depth",
    "Description",
    "Inserted",
    "Lease",
    "LeaseKind",
    "Leaving",
    "Left",
    "Outcome",
    "Policy",
    "Ref",
    "Report",
    "ReportStatus",
    "Settlement",
    "Verdict",
]


MAX_CLAIM_BYTES = 2 * 1024 * 1024  # far below what one message to a worker may have, and soon sent


class LeaseKind(IntEnum):
    """How a row was handed out; stored."""

    NONE = 0
    UNARY = 1
    STREAM = 2
    PUSH = 3


class ReportStatus(Enum):
    """What a worker says of a lease.

    CRASHED leaves the decision to the store: the attempts made decide. INTERRUPTED: the run was broken off
    through no fault of its own, such as by another task in the same child; the attempt does not count.
    """

    COMPLETE = "complete"
    FAILURE = "failure"
    RETRY = "retry"
    CRASHED = "crashed"
    INTERRUPTED = "interrupted"


class Verdict(Enum):
    """What the store did with a report, a start or a hand-back."""

    APPLIED = "applied"
    SUPERSEDED = "superseded"  # it came under a lease that is not the row's newest
    UNKNOWN = "unknown"  # no such row, or it is finished


class Outcome(Enum):
    """How a finished activation ended; stored with its tombstone."""

    COMPLETE = "complete"
    FAILED = "failed"
    RETRIED = "retried"
    EXPIRED = "expired"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits the store itself applies. Durations in milliseconds."""

    max_processing_attempts: int = 5
    max_crashes: int = 3
    max_processing_deadline_ms: int | None = None
    max_delay_ms: int | None = None
    enforce_max_attempts: bool = False
    grace_ms: int = 3_000
    claim_ms: int = 40_000  # how long a push may take, waiting for its turn included
    strict_order_namespaces: frozenset[str] = frozenset()
    limits: tuple[LimitRule, ...] = ()


class Arrival(NamedTuple):
    """One decoded record, ready to be stored. Durations in seconds, as produced."""

    id: str
    namespace: str
    taskname: str
    application: str
    received_at_ms: int | None
    processing_deadline_s: int
    expires_s: int | None
    delay_s: int | None
    attempts: int
    dead_letter: bool
    at_most_once: bool
    topic: str
    partition: int
    offset: int
    record_key: bytes | None
    activation: bytes
    undecodable: str = ""  # why its bytes could not be read: stored on its way to the dead letters


@dataclass(frozen=True, slots=True)
class Inserted:
    """What became of a batch of arrivals, in numbers; by id those whose producer should know."""

    pending: int = 0
    delayed: int = 0
    duplicate: int = 0
    expired: int = 0
    undecodable: int = 0
    dropped: int = 0  # killswitched
    forwarded: int = 0  # demoted
    shortened: tuple[str, ...] = ()  # their delay was beyond max_delay
    beyond_expiry: tuple[str, ...] = ()  # they expire before their delay is over


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """Who wants how much of what. `application` None: any; `namespaces` empty: any.

    A claim ends early, with one row at least, once its activations have `max_bytes` together, and at the
    turn of an activation beyond `at_most_once_limit`: the others wait with it, or it might never come.

    `knows`: only what is among these; None: whatever it is. What nobody knows, by `known_to_any`, is
    parked on the way; None: nothing is.
    """

    limit: int
    kind: LeaseKind
    holder: str | None = None
    pool: str = ""  # of the holder, for the limit of its pool
    application: str | None = None
    namespaces: tuple[str, ...] = ()
    max_bytes: int = MAX_CLAIM_BYTES
    at_most_once_limit: int | None = None  # of `limit`; None: all
    knows: KnownTasks | None = None
    known_to_any: KnownTasks | None = None


Ref = LeaseRef  # one lease: the hand-out of `id` under `fence`


class Lease(Assignment):
    """One activation handed out, just as it is told to a worker. Durations in milliseconds."""

    __slots__ = ()

    @property
    def ref(self) -> Ref:
        return self.lease

    @property
    def deadline_ms(self) -> int:
        return self.processing_deadline_ms


class Claimed(NamedTuple):
    """What one of several claims found. `cut_short`: it met so much that may not go that it left the rest."""

    leases: list[Lease]
    cut_short: bool


class Report(NamedTuple):
    """The outcome of one lease. `fence` None: reported by a unary call, which knows no fences."""

    id: str
    fence: int | None
    status: ReportStatus
    reason: str = ""
    error: str = ""
    max_attempts: int | None = None
    delay_on_retry_s: int | None = None


@dataclass(frozen=True, slots=True)
class Leaving:
    """A row whose retry, dead letter or copy is to be published before it is gone."""

    id: str
    status: Status
    activation: bytes
    record_key: bytes | None
    topic: str
    partition: int
    offset: int
    retry_attempts: int
    attempts: int
    dead_letter: bool
    namespace: str
    max_attempts: int | None
    delay_on_retry_s: int | None
    reason: str
    error: str
    received_at_ms: int = 0
    forward_topic: str | None = None  # of a forwarded row; None: the topic it came from


@dataclass(frozen=True, slots=True)
class Settlement:
    """What was published for a leaving row."""

    id: str
    continued_as: str | None = None
    dead_lettered: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """One activation that is not finished; `stuck`: why what must follow it can never be published."""

    id: str
    status: Status
    stuck: str


@dataclass(frozen=True, slots=True)
class Depth:
    application: str
    namespace: str
    status: Status
    count: int


@dataclass(frozen=True, slots=True)
class Description:
    """What the store knows of one activation; `status` None: it does not know that id.

    From `worker` on: of the lease it is held under, empty when nobody holds it.
    """

    id: str
    status: Status | None = None
    outcome: str = ""
    continued_as: str = ""
    dead_lettered: bool = False
    attempts: int = 0
    received_at_ms: int = 0
    finished_at_ms: int = 0
    reason: str = ""
    error: str = ""
    worker: str = ""
    fence: int = 0
    started_at_ms: int = 0
    deadline_in_ms: int | None = None  # until the lease ends, unless a heartbeat moves that
    permille: int | None = None  # of its work that is done, as its last heartbeat said
    message: str = ""
    heartbeat_age_ms: int | None = None  # since that heartbeat
