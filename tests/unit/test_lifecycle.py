from __future__ import annotations

import itertools

import pytest

from taskd.activation.lifecycle import (
    HELD,
    LEAVING,
    TRANSITIONS,
    WAITING,
    Event,
    IllegalTransition,
    Status,
    after,
)

P, D, K, C, R = Status.PENDING, Status.DELAYED, Status.PARKED, Status.CLAIMED, Status.PROCESSING
E = Event

# Written out once more, from the contract, so that a change of the table is a change of two places.
TABLE = {
    (None, E.ARRIVED): P,
    (None, E.ARRIVED_DELAYED): D,
    (None, E.ARRIVED_EXPIRED): Status.EXPIRED,
    (None, E.ARRIVED_UNDECODABLE): Status.FAILURE,
    (None, E.ARRIVED_DROPPED): Status.DROPPED,
    (None, E.ARRIVED_FORWARDED): Status.FORWARDED,
    (P, E.HANDED_OUT): R,
    (P, E.CLAIMED): C,
    (C, E.PUSHED): R,
    (C, E.CLAIM_ENDED): P,
    (R, E.HANDED_BACK): P,
    (R, E.LEASE_ENDED): P,
    (R, E.EXHAUSTED): Status.FAILURE,
    (D, E.BECAME_DUE): P,
    (P, E.PARKED): K,
    (K, E.UNPARKED): P,
    (P, E.EXPIRED): Status.EXPIRED,
    (D, E.EXPIRED): Status.EXPIRED,
    (K, E.EXPIRED): Status.EXPIRED,
    (P, E.DROPPED): Status.DROPPED,
    (D, E.DROPPED): Status.DROPPED,
    (K, E.DROPPED): Status.DROPPED,
    (C, E.DROPPED): Status.DROPPED,
    (R, E.DROPPED): Status.DROPPED,
    (Status.RETRY, E.DROPPED): Status.DROPPED,
    (P, E.FORWARDED): Status.FORWARDED,
    (D, E.FORWARDED): Status.FORWARDED,
    (K, E.FORWARDED): Status.FORWARDED,
    (R, E.COMPLETED): Status.COMPLETE,
    (P, E.COMPLETED): Status.COMPLETE,
    (C, E.COMPLETED): Status.COMPLETE,
    (R, E.FAILED): Status.FAILURE,
    (P, E.FAILED): Status.FAILURE,
    (C, E.FAILED): Status.FAILURE,
    (R, E.RETRY_ASKED): Status.RETRY,
    (P, E.RETRY_ASKED): Status.RETRY,
    (C, E.RETRY_ASKED): Status.RETRY,
    (Status.COMPLETE, E.SETTLED): Status.GONE,
    (Status.RETRY, E.SETTLED): Status.GONE,
    (Status.FAILURE, E.SETTLED): Status.GONE,
    (Status.EXPIRED, E.SETTLED): Status.GONE,
    (Status.DROPPED, E.SETTLED): Status.GONE,
    (Status.FORWARDED, E.SETTLED): Status.GONE,
}


def test_the_table_is_the_contracts() -> None:
    assert TRANSITIONS == TABLE


@pytest.mark.parametrize(("before", "event"), list(itertools.product([None, *Status], Event)))
def test_every_move_is_in_the_table_or_an_error(before: Status | None, event: Event) -> None:
    if (before, event) in TABLE:
        assert after(before, event) is TABLE[before, event]
        return
    with pytest.raises(IllegalTransition):
        after(before, event)


def test_the_error_is_a_sentence() -> None:
    with pytest.raises(IllegalTransition) as error:
        after(Status.CLAIMED, Event.BECAME_DUE)
    assert str(error.value) == (
        "became_due cannot happen to an activation that is claimed; "
        "what can: pushed, claim_ended, dropped, completed, failed, retry_asked"
    )
    with pytest.raises(IllegalTransition, match="is not in the store; what can: arrived, "):
        after(None, Event.SETTLED)
    with pytest.raises(IllegalTransition, match="what can: nothing"):
        after(Status.GONE, Event.SETTLED)


def test_every_status_is_of_one_kind_and_every_event_has_a_word_of_its_own() -> None:
    kinds = [*WAITING, *HELD, *LEAVING, Status.GONE]
    assert sorted(kinds) == sorted(Status)
    assert len({event.value for event in Event}) == len(Event)
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_stored_numbers_never_change() -> None:
    assert [(status.value, status.word) for status in Status] == [
        (1, "pending"), (2, "delayed"), (3, "parked"), (4, "claimed"), (5, "processing"), (6, "complete"),
        (7, "retry"), (8, "failure"), (9, "expired"), (10, "dropped"), (11, "forwarded"), (12, "gone"),
    ]  # fmt: skip


def test_everything_that_is_stored_can_end() -> None:
    def ends(status: Status, seen: frozenset[Status]) -> bool:
        return status is Status.GONE or any(
            ends(to, seen | {status})
            for (at, _), to in TRANSITIONS.items()
            if at is status and to not in seen
        )

    assert all(ends(status, frozenset()) for status in Status)
