"""What `taskd status` prints of one activation."""

from __future__ import annotations

from taskd.activation.lifecycle import Status
from taskd.admin import inspect
from taskd.admin.wait import Seen, get_status
from taskd.cli.inspect import _line
from taskd.inflight.base import Description
from taskd.wire.generated.taskd.v1 import GetStatusResponse

RUNNING = Description(
    "a" * 32,
    Status.PROCESSING,
    attempts=1,
    received_at_ms=1_767_225_599_000,
    worker="w1",
    fence=7,
    started_at_ms=1_767_225_600_000,
    deadline_in_ms=11_400,
    permille=250,
    message="row 1 of 4\x1b[2J",
    heartbeat_age_ms=0,
)


class Broker:
    """Answers every question with one description."""

    def __init__(self, found: Description) -> None:
        self.found = found

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        return bytes(GetStatusResponse(statuses=[inspect._status(self.found)]))


async def seen(found: Description) -> Seen:
    (answer,) = await get_status(Broker(found), [found.id])
    return answer


async def test_a_running_task_shows_where_it_is_and_how_far() -> None:
    assert _line(await seen(RUNNING)) == (
        f"{'a' * 32}  processing started 1 time by worker w1 since 2026-01-01 00:00:00Z lease ends in 11 s "
        "25 % row 1 of 4 [2J (heartbeat 0 s ago)"
    )


async def test_one_that_gave_no_heartbeat_shows_none() -> None:
    found = Description("b" * 32, Status.PROCESSING, attempts=1, worker="w1", fence=7, started_at_ms=1_000)
    answer = await seen(found)
    assert (answer.permille, answer.heartbeat_age_ms, answer.deadline_in_ms) == (None, None, None)
    assert _line(answer) == f"{'b' * 32}  processing started 1 time by worker w1 since 1970-01-01 00:00:01Z"


async def test_a_lease_that_is_over_shows_so() -> None:
    found = Description("c" * 32, Status.PROCESSING, worker="w1", deadline_in_ms=-500)
    assert _line(await seen(found)).endswith("lease ends in 0 s")
