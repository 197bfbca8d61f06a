"""Waits for activations to end, following each retry to the next, by asking the broker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from taskd.admin.inspect import METHOD
from taskd.errors import PeerError, Undecodable
from taskd.wire.protobuf import fields, signed, text_field

BATCH_IDS = 500  # of one request
CALL_TIMEOUT_S = 10.0
SHORTEST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class Caller(Protocol):
    """What is needed of `taskd.rpc.client.Client`."""

    async def call(self, path: str, body: bytes, *, timeout_s: float) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What the broker knows of one activation now. `state`: a status of the life cycle, gone, or unknown.

    From `worker` on: of the lease it is held under. `permille` (of its work that is done) and `message`
    are what the task said in its last heartbeat, `heartbeat_age_ms` ago.
    """

    id: str
    state: str = "unknown"
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
    deadline_in_ms: int | None = None
    permille: int | None = None
    message: str = ""
    heartbeat_age_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Final:
    """How one activation ended, its retries included.

    `outcome`: complete, failed, expired or dropped. `unfinished`: the time was over before it ended.
    `forgotten`: the broker knew it, and its memory of it ended before it was asked again.
    """

    id: str
    outcome: str
    retries: int = 0  # how many times it was published again
    dead_lettered: bool = False
    last_id: str = ""  # of the last retry; `id` itself without one
    state: str = ""  # of `last_id`, when last seen
    received_at_ms: int = 0  # of the first
    finished_at_ms: int = 0  # of the last
    reason: str = ""
    error: str = ""

    @property
    def accounted(self) -> bool:
        """Whether it is known how it ended."""
        return self.outcome not in ("unfinished", "forgotten")

    @property
    def latency_ms(self) -> int | None:
        """From the first received_at to the last end; wall clock of the producer and the broker."""
        if not (self.received_at_ms and self.finished_at_ms):
            return None
        return max(0, self.finished_at_ms - self.received_at_ms)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the waiting is. `trouble`: why the broker could not be asked the last time, or empty."""

    total: int
    done: int
    failed: int = 0
    retried: int = 0  # were published again at least once
    trouble: str = ""


async def get_status(client: Caller, ids: Sequence[str], *, timeout_s: float = CALL_TIMEOUT_S) -> list[Seen]:
    """What the broker knows of each id, in order. Raises PeerError."""
    seen: list[Seen] = []
    for start in range(0, len(ids), BATCH_IDS):
        batch = ids[start : start + BATCH_IDS]
        request = b"".join(text_field(1, id_) for id_ in batch)
        answered = _decoded(await client.call(METHOD, request, timeout_s=timeout_s))
        if len(answered) != len(batch):
            raise Undecodable(f"expected the status of {len(batch)} activations, found {len(answered)}")
        seen += answered
    return seen


async def wait_for(
    client: Caller,
    ids: Iterable[str],
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    timeout_s: float = float("inf"),
) -> list[Final]:
    """Wait until each of these activations has ended; for each, in order, how.

    A broker that does not answer is asked again until the time is over: it may be restarting. An id
    it does not know may still lie in the log, so that is waited for too. When the time is over, the
    rest is reported as `unfinished`. Raises Refused when the broker does not allow the question.
    """
    trails = [_Trail(id_, id_) for id_ in ids]
    with trio.move_on_after(timeout_s):
        await _follow_all(client, trails, on_progress)
    return [trail.final() for trail in trails]


@dataclass(slots=True)
class _Trail:
    """One activation and the retry that is followed now."""

    id: str
    current: str
    seen: Seen | None = None  # of `current`, once the broker knew it
    retries: int = 0
    received_at_ms: int = 0
    outcome: str = field(default="unfinished")

    @property
    def open(self) -> bool:
        return self.outcome == "unfinished"

    def look(self, now: Seen) -> bool:
        """Take in what the broker said; True when the trail goes on under a new id."""
        if now.state == "unknown":
            if self.seen is not None:  # it was there: the time its id is remembered for is over
                self.outcome = "forgotten"
            return False
        self.seen = now
        self.received_at_ms = self.received_at_ms or now.received_at_ms
        if now.state != "gone":
            return False
        if now.outcome == "retried" and now.continued_as:
            self.current, self.seen = now.continued_as, None
            self.retries += 1
            return True
        self.outcome = now.outcome or "forgotten"
        return False

    def final(self) -> Final:
        last = self.seen or Seen(self.current)
        return Final(
            id=self.id,
            outcome=self.outcome,
            retries=self.retries,
            dead_lettered=last.dead_lettered,
            last_id=self.current,
            state=last.state,
            received_at_ms=self.received_at_ms,
            finished_at_ms=last.finished_at_ms if not self.open else 0,
            reason=last.reason,
            error=last.error,
        )


async def _follow_all(
    client: Caller, trails: Sequence[_Trail], on_progress: Callable[[Progress], None]
) -> None:
    pause_s = SHORTEST_PAUSE_S
    on_progress(_progress(trails))
    while waiting := [trail for trail in trails if trail.open]:
        began = trio.current_time()
        before, trouble = _stage(trails), ""
        try:
            await _look_at(client, waiting)
        except PeerError as error:
            if not error.retryable:
                raise
            trouble = str(error)
        on_progress(_progress(trails, trouble))
        moved = _stage(trails) != before
        pause_s = SHORTEST_PAUSE_S if moved else min(pause_s * 1.5, LONGEST_PAUSE_S)
        if any(trail.open for trail in trails):
            # Asking takes the broker's time: never more than half of ours goes into it.
            await trio.sleep(max(pause_s, trio.current_time() - began))


async def _look_at(client: Caller, trails: Sequence[_Trail]) -> None:
    while trails:
        further = []
        for start in range(0, len(trails), BATCH_IDS):
            batch = trails[start : start + BATCH_IDS]
            statuses = await get_status(client, [trail.current for trail in batch])
            further += [trail for trail, now in zip(batch, statuses, strict=True) if trail.look(now)]
        trails = further  # a retry may have ended meanwhile as well


def _stage(trails: Sequence[_Trail]) -> tuple[int, int]:
    return sum(not trail.open for trail in trails), sum(trail.retries for trail in trails)


def _progress(trails: Sequence[_Trail], trouble: str = "") -> Progress:
    ended = [trail for trail in trails if not trail.open]
    return Progress(
        total=len(trails),
        done=len(ended),
        failed=sum(trail.outcome != "complete" for trail in ended),
        retried=sum(trail.retries > 0 for trail in trails),
        trouble=trouble,
    )


def _decoded(reply: bytes) -> list[Seen]:
    """The statuses of a taskd.v1.GetStatusResponse; by hand: thousands are asked for repeatedly."""
    return [_seen(raw) for number, _, raw, _, _ in fields(reply) if number == 1 and isinstance(raw, bytes)]


def _seen(raw: bytes) -> Seen:
    found: dict[int, int | bytes] = {number: value for number, _, value, _, _ in fields(raw)}

    def text(number: int) -> str:
        value = found.get(number, b"")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""

    def whole(number: int) -> int:
        value = found.get(number, 0)
        return signed(value) if isinstance(value, int) else 0

    return Seen(
        id=text(1),
        state=text(2),
        outcome=text(3),
        continued_as=text(4),
        dead_lettered=bool(whole(5)),
        attempts=whole(6),
        received_at_ms=whole(7),
        finished_at_ms=whole(8),
        reason=text(9),
        error=text(10),
        worker=text(11),
        fence=whole(12),
        started_at_ms=whole(13),
        deadline_in_ms=whole(14) if 14 in found else None,
        permille=whole(15) if 15 in found else None,
        message=text(16),
        heartbeat_age_ms=whole(17) if 17 in found else None,
    )
