"""The task: what it sends, and what each answer makes of the activation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from taskd_webhooks import verify
from taskd_webhooks.post import NotDelivered
from taskd_webhooks.tasks import SECRET_VARIABLE, deliver
from taskd_webhooks.testing import Receiver, Reply

from taskd import LastAction, RetryTaskError

EVENT = {
    "id": "evt_1",
    "type": "order.created",
    "data": {"city": "Zürich", "lines": [{"sku": "緑茶", "n": 2}]},
}


@pytest.fixture(autouse=True)
def _no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)


def test_the_event_arrives_as_it_was(receiver: Receiver) -> None:
    deliver(f"{receiver.url}/hooks", EVENT)
    (request,) = receiver.requests
    assert json.loads(request.body) == EVENT
    assert request.headers["content-type"] == "application/json"


def test_without_a_secret_nothing_is_signed(receiver: Receiver) -> None:
    deliver(receiver.url, EVENT)
    assert "x-taskd-signature" not in receiver.requests[0].headers


def test_with_a_secret_the_receiver_can_verify(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "s3cret")
    deliver(receiver.url, EVENT)
    (request,) = receiver.requests
    header = request.headers["x-taskd-signature"]
    signed_at_s = int(header.partition(",")[0].removeprefix("t="))
    verify("s3cret", request.body, header, now_s=signed_at_s)


def test_every_try_carries_the_same_key_and_body(receiver: Receiver) -> None:
    receiver.answer = lambda request: Reply(503)
    for _ in range(2):
        with pytest.raises(RetryTaskError):
            deliver(receiver.url, EVENT)
    first, second = receiver.requests
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"] == "evt_1"
    assert first.body == second.body


def test_a_passing_trouble_asks_for_another_run(receiver: Receiver) -> None:
    receiver.answer = lambda request: Reply(503, headers={"Retry-After": "9"})
    with pytest.raises(RetryTaskError, match=r"event evt_1: .* answered 503") as caught:
        deliver(receiver.url, EVENT)
    assert caught.value.delay == 9


def test_without_retry_after_the_policy_decides_when(receiver: Receiver) -> None:
    receiver.answer = lambda request: Reply(500)
    with pytest.raises(RetryTaskError) as caught:
        deliver(receiver.url, EVENT)
    assert caught.value.delay is None


def test_a_refusal_fails_at_once(receiver: Receiver) -> None:
    receiver.answer = lambda request: Reply(404)
    with pytest.raises(NotDelivered, match="answered 404"):
        deliver(receiver.url, EVENT)


@pytest.mark.parametrize("key", [None, "", 7, "two\nlines", "ümlaut", "x" * 256])
def test_an_event_without_a_usable_id_is_refused(receiver: Receiver, key: Any) -> None:
    with pytest.raises(ValueError, match="expected event"):
        deliver(receiver.url, {"id": key})
    assert receiver.requests == []


@pytest.mark.parametrize("value", [float("nan"), {1}, b"x"])
def test_an_event_that_is_not_json_is_refused(receiver: Receiver, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        deliver(receiver.url, {"id": "evt_1", "value": value})
    assert receiver.requests == []


def test_five_runs_then_the_dead_letter_queue() -> None:
    policy = deliver.retry
    assert policy is not None
    assert (policy.times, policy.delay, policy.times_exceeded) == (5, 1, LastAction.Deadletter)
