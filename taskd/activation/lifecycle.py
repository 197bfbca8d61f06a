"""The life cycle of an activation in the broker, as one table.

An activation waits (pending, delayed, parked), is held by somebody (claimed, processing), or is on
its way out (complete, retry, failure, expired, dropped, forwarded). On its way out it is kept until
what must follow it - a retry, a dead letter, a copy elsewhere - is published; then it is gone,
and its id is remembered for a while so that a redelivered record does not run again.

`TRANSITIONS` says which event moves which status where. Whatever is not in the table is illegal and
raises `IllegalTransition`; nothing changes a status without asking `after`. The store, the upkeep,
the documentation and the tests read this same table.
"""

from __future__ import annotations

from enum import Enum, IntEnum

from taskd.errors import TaskdError


class Status(IntEnum):
    """Where an activation stands. The numbers are stored; never reuse one."""

    PENDING = 1  # waits for a worker
    DELAYED = 2  # waits for a time
    PARKED = 3  # no connected pool knows its task
    CLAIMED = 4  # chosen for a push that is under way
    PROCESSING = 5  # handed out under a lease
    COMPLETE = 6
    RETRY = 7  # its retry is to be published
    FAILURE = 8  # its dead letter is to be published, or it is discarded
    EXPIRED = 9
    DROPPED = 10  # killed by a switch, or cancelled
    FORWARDED = 11  # its copy is to be published elsewhere
    GONE = 12  # remembered by id only

    @property
    def word(self) -> str:
        return self.name.lower()


WAITING = frozenset({Status.PENDING, Status.DELAYED, Status.PARKED})
HELD = frozenset({Status.CLAIMED, Status.PROCESSING})
LEAVING = frozenset(
    {Status.COMPLETE, Status.RETRY, Status.FAILURE, Status.EXPIRED, Status.DROPPED, Status.FORWARDED}
)


class Event(Enum):
    """What happens to an activation. The value is the word in logs, metrics and history."""

    ARRIVED = "arrived"
    ARRIVED_DELAYED = "arrived_delayed"
    ARRIVED_EXPIRED = "arrived_expired"
    ARRIVED_UNDECODABLE = "arrived_undecodable"
    ARRIVED_DROPPED = "arrived_dropped"  # killswitched
    ARRIVED_FORWARDED = "arrived_forwarded"  # demoted
    HANDED_OUT = "handed_out"
    CLAIMED = "claimed"
    PUSHED = "pushed"
    CLAIM_ENDED = "claim_ended"
    HANDED_BACK = "handed_back"
    LEASE_ENDED = "lease_ended"
    EXHAUSTED = "exhausted"
    BECAME_DUE = "became_due"
    EXPIRED = "expired"
    DROPPED = "dropped"
    FORWARDED = "forwarded"
    PARKED = "parked"
    UNPARKED = "unparked"
    COMPLETED = "completed"
    FAILED = "failed"
    RETRY_ASKED = "retry_asked"
    SETTLED = "settled"  # what had to follow is published, or nothing has to

    __hash__ = object.__hash__  # members are single; Enum's own hash is a slow call on the hot path


class IllegalTransition(TaskdError):
    """That event cannot happen to an activation in that status."""

    def __init__(self, status: Status | None, event: Event) -> None:
        where = "not in the store" if status is None else status.word
        legal = ", ".join(e.value for (s, e) in TRANSITIONS if s is status) or "nothing"
        super().__init__(f"{event.value} cannot happen to an activation that is {where}; what can: {legal}")


_S, _E = Status, Event

# A report counts exactly when it comes under the newest lease. So it may find its row waiting again:
# the lease ended, nobody else took the row, and the work it reports was done after all. And it may
# find its row claimed: a quick worker reports before the call that pushed the work has returned.
_REPORTABLE = (_S.PROCESSING, _S.PENDING, _S.CLAIMED)

TRANSITIONS: dict[tuple[Status | None, Event], Status] = {
    (None, _E.ARRIVED): _S.PENDING,
    (None, _E.ARRIVED_DELAYED): _S.DELAYED,
    (None, _E.ARRIVED_EXPIRED): _S.EXPIRED,
    (None, _E.ARRIVED_UNDECODABLE): _S.FAILURE,
    (None, _E.ARRIVED_DROPPED): _S.DROPPED,
    (None, _E.ARRIVED_FORWARDED): _S.FORWARDED,
    (_S.PENDING, _E.HANDED_OUT): _S.PROCESSING,
    (_S.PENDING, _E.CLAIMED): _S.CLAIMED,
    (_S.CLAIMED, _E.PUSHED): _S.PROCESSING,
    (_S.CLAIMED, _E.CLAIM_ENDED): _S.PENDING,
    (_S.PROCESSING, _E.HANDED_BACK): _S.PENDING,
    (_S.PROCESSING, _E.LEASE_ENDED): _S.PENDING,
    (_S.PROCESSING, _E.EXHAUSTED): _S.FAILURE,
    (_S.DELAYED, _E.BECAME_DUE): _S.PENDING,
    (_S.PENDING, _E.PARKED): _S.PARKED,
    (_S.PARKED, _E.UNPARKED): _S.PENDING,
    **{(status, _E.EXPIRED): _S.EXPIRED for status in sorted(WAITING)},
    **{(status, _E.DROPPED): _S.DROPPED for status in sorted(WAITING | HELD | {_S.RETRY})},
    **{(status, _E.FORWARDED): _S.FORWARDED for status in sorted(WAITING)},
    **{(status, _E.COMPLETED): _S.COMPLETE for status in _REPORTABLE},
    **{(status, _E.FAILED): _S.FAILURE for status in _REPORTABLE},
    **{(status, _E.RETRY_ASKED): _S.RETRY for status in _REPORTABLE},
    **{(status, _E.SETTLED): _S.GONE for status in sorted(LEAVING)},
}


def after(status: Status | None, event: Event) -> Status:
    """The status that `event` leads to; `status` None: not in the store yet.

    Raises IllegalTransition.
    """
    try:
        return TRANSITIONS[status, event]
    except KeyError:
        raise IllegalTransition(status, event) from None
