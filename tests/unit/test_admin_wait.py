"""Waiting follows every activation to its end, whatever the broker does meanwhile."""

from __future__ import annotations

import pytest

from taskd.admin.wait import BATCH_IDS, Progress, get_status, wait_for
from taskd.errors import PeerUnavailable, Refused
from taskd.wire.generated.taskd.v1 import ActivationStatus, GetStatusRequest, GetStatusResponse


class Broker:
    """Answers as a broker whose activations move on one step at each question."""

    def __init__(self, **stories: list[ActivationStatus]) -> None:
        self.stories = stories
        self.asked: list[int] = []
        self.failures: list[Exception] = []

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        assert path == "/taskd.v1.InspectService/GetStatus"
        if self.failures:
            raise self.failures.pop(0)
        ids = GetStatusRequest.parse(body).ids
        self.asked.append(len(ids))
        return bytes(GetStatusResponse(statuses=[self._next(id_) for id_ in ids]))

    def _next(self, id_: str) -> ActivationStatus:
        story = self.stories.get(id_, [ActivationStatus(state="unknown")])
        now = story.pop(0) if len(story) > 1 else story[0]
        now.id = id_
        return now


def at(state: str, outcome: str = "", **more: object) -> ActivationStatus:
    return ActivationStatus(state=state, outcome=outcome, **more)


async def test_from_the_log_to_the_end(autojump_clock):
    broker = Broker(
        a=[
            at("unknown"),
            at("pending", received_at_ms=1000),
            at("processing", received_at_ms=1000),
            at("gone", "complete", received_at_ms=1000, finished_at_ms=1250),
        ]
    )
    (final,) = await wait_for(broker, ["a"])
    assert (final.id, final.outcome, final.latency_ms, final.accounted) == ("a", "complete", 250, True)


async def test_a_retry_is_followed_and_the_first_arrival_counts(autojump_clock):
    broker = Broker(
        a=[at("gone", "retried", continued_as="b", received_at_ms=1000, finished_at_ms=1100)],
        b=[at("unknown"), at("gone", "retried", continued_as="c", received_at_ms=1100)],
        c=[
            at("delayed", received_at_ms=1100),
            at(
                "gone",
                "failed",
                dead_lettered=True,
                received_at_ms=1100,
                finished_at_ms=3000,
                reason="exhausted",
                error="boom",
            ),
        ],
    )
    (final,) = await wait_for(broker, ["a"])
    assert (final.outcome, final.retries, final.dead_lettered, final.last_id) == ("failed", 2, True, "c")
    assert (final.latency_ms, final.reason, final.error) == (2000, "exhausted", "boom")


async def test_what_has_not_ended_in_time_is_unfinished(autojump_clock):
    broker = Broker(a=[at("pending", received_at_ms=5)], b=[at("gone", "expired")])
    finals = await wait_for(broker, ["a", "b", "never-heard-of"], timeout_s=30)
    assert [(f.outcome, f.state, f.accounted) for f in finals] == [
        ("unfinished", "pending", False),
        ("expired", "gone", True),
        ("unfinished", "unknown", False),
    ]
    assert len(broker.asked) < 60  # patient, not greedy


async def test_what_the_broker_knew_and_forgot(autojump_clock):
    broker = Broker(a=[at("processing"), at("unknown")])
    (final,) = await wait_for(broker, ["a"])
    assert (final.outcome, final.accounted) == ("forgotten", False)


async def test_a_broker_that_restarts_is_asked_again(autojump_clock):
    broker = Broker(a=[at("gone", "complete")])
    broker.failures = [PeerUnavailable("127.0.0.1:1: nobody answers")] * 3
    said: list[Progress] = []
    (final,) = await wait_for(broker, ["a"], on_progress=said.append)
    assert final.outcome == "complete"
    assert [progress.trouble for progress in said] == ["", *["127.0.0.1:1: nobody answers"] * 3, ""]
    assert said[-1] == Progress(total=1, done=1)


async def test_a_refusal_is_not_waited_out(autojump_clock):
    broker = Broker()
    broker.failures = [Refused("UNIMPLEMENTED", "no such method")]
    with pytest.raises(Refused):
        await wait_for(broker, ["a"])


async def test_many_are_asked_for_in_batches_and_only_as_long_as_they_are_open(autojump_clock):
    ids = [f"id{number}" for number in range(BATCH_IDS + 20)]
    broker = Broker(**{id_: [at("gone", "complete")] for id_ in ids})
    broker.stories["id3"] = [at("processing"), at("gone", "failed")]
    said: list[Progress] = []
    finals = await wait_for(broker, ids, on_progress=said.append)
    assert broker.asked == [BATCH_IDS, 20, 1]
    assert [final.id for final in finals] == ids
    assert (said[-1].done, said[-1].failed) == (BATCH_IDS + 20, 1)


async def test_nothing_to_wait_for(autojump_clock):
    assert await wait_for(Broker(), []) == []
    assert await get_status(Broker(), []) == []
