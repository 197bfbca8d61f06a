"""The frames of `taskd.v1.DispatchService/Work`. `proto/taskd/v1/taskd.proto` says what each means;
`frames_codec.py` writes and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import NamedTuple

from taskd.wire.status import ResultStatus as ResultStatus

VERSION = 1  # of the stream; hello carries the range a worker speaks


class LeaseRef(NamedTuple):
    id: str
    fence: int


# Of a pair; for each activation, without the call of Python code that the name costs.
lease_ref = partial(tuple.__new__, LeaseRef)


class TaskName(NamedTuple):
    """A task as its activations name it."""

    application: str
    namespace: str
    taskname: str


class CreditKind(IntEnum):
    ANY = 0
    ASYNC = 1  # only the worker's async tasks
    PLAIN = 2  # only its other tasks


class StopReason(IntEnum):
    UNSPECIFIED = 0
    CANCELLED = 1  # by an operator's order
    LOST = 2  # the lease is over: somebody else has the activation, or it is gone


@dataclass(frozen=True, slots=True)
class Hello:
    """`tasks`: what the worker can run; empty: it does not say. `async_tasks`: of those."""

    worker_id: str
    pool: str
    application: str | None = None
    namespaces: tuple[str, ...] = ()
    store_id: str = ""
    holding: tuple[LeaseRef, ...] = ()
    version_min: int = VERSION
    version_max: int = VERSION
    tasks: tuple[TaskName, ...] = ()
    slots: int = 0
    async_tasks: tuple[TaskName, ...] = ()


@dataclass(frozen=True, slots=True)
class Credit:
    """How many assignments are welcome in all, counted from the stream's beginning.

    `idle_total`: the same for at_most_once, as far as slots are idle. `kind`: only of this kind from now on.
    """

    number: int
    total: int
    idle_total: int = 0
    kind: CreditKind = CreditKind.ANY


@dataclass(frozen=True, slots=True)
class Started:
    leases: tuple[LeaseRef, ...]


class Result(NamedTuple):
    """What became of one lease. `delay_on_retry_s` in seconds."""

    id: str
    fence: int
    status: ResultStatus
    reason: str = ""
    error: str = ""
    max_attempts: int | None = None
    delay_on_retry_s: int | None = None

    @property
    def lease(self) -> LeaseRef:
        return lease_ref((self.id, self.fence))


@dataclass(frozen=True, slots=True)
class Results:
    results: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class HandBack:
    leases: tuple[LeaseRef, ...]


@dataclass(frozen=True, slots=True)
class TaskProgress:
    """A running task's own sign of life. `permille` of its work is done; None: it does not say."""

    id: str
    fence: int
    permille: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    tasks: tuple[TaskProgress, ...] = ()


WorkerFrame = Hello | Credit | Started | Results | HandBack | Heartbeat


@dataclass(frozen=True, slots=True)
class Welcome:
    """`max_deadline_ms`: how far after its start a task's own signs of life can move its deadline; 0: any."""

    version: int
    store_id: str
    lease_ms: int
    max_deadline_ms: int = 0


class Assignment(NamedTuple):
    """One activation handed out. Durations in milliseconds, counted from the frame's arrival."""

    id: str
    fence: int
    activation: bytes
    processing_deadline_ms: int
    expires_in_ms: int | None = None

    @property
    def lease(self) -> LeaseRef:
        return lease_ref((self.id, self.fence))


@dataclass(frozen=True, slots=True)
class Assignments:
    """`credit`: the number of the newest credit seen."""

    assignments: tuple[Assignment, ...]
    credit: int = 0


@dataclass(frozen=True, slots=True)
class Taken:
    leases: tuple[LeaseRef, ...]


@dataclass(frozen=True, slots=True)
class Draining:
    pass


@dataclass(frozen=True, slots=True)
class Stop:
    leases: tuple[LeaseRef, ...]
    reason: StopReason = StopReason.UNSPECIFIED


BrokerFrame = Welcome | Assignments | Taken | Draining | Stop
