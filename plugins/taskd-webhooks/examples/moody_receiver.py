"""The demo's receiver: it takes most events at once, some on the second or third try, a few never."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from taskd_webhooks import HEADER, InvalidSignature, verify
from taskd_webhooks.testing import Reply, Request


class Mood(NamedTuple):
    """How the receiver treats one event: so many times this status, then it takes it. None: never."""

    status: int
    times: int | None


CONTENT = Mood(204, 0)


def mood_of(event_id: str) -> Mood:
    """The same in every run: the id decides."""
    number = int(hashlib.sha256(event_id.encode()).hexdigest(), 16) % 1000
    if number < 55:
        return Mood(503, 1)
    if number < 80:
        return Mood(503, 2)
    if number < 88:
        return Mood(500, None)
    if number < 92:
        return Mood(410, None)
    return CONTENT


@dataclass
class Receipts:
    """What the receiver saw, by event id. Its `answer` runs in the receiver's threads."""

    secret: str
    tries: Counter[str] = field(default_factory=Counter)
    taken: Counter[str] = field(default_factory=Counter)
    taken_at_s: dict[str, float] = field(default_factory=dict)
    forged: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Reply:
        try:
            verify(self.secret, request.body, request.headers.get(HEADER.lower()), now_s=time.time())
        except InvalidSignature as error:
            self.forged += 1
            return Reply(401, str(error).encode())
        event_id = json.loads(request.body)["id"]
        mood = mood_of(event_id)
        with self.lock:
            self.tries[event_id] += 1
            if mood.times is None or self.tries[event_id] <= mood.times:
                return Reply(mood.status, b"not now")
            self.taken[event_id] += 1
            self.taken_at_s.setdefault(event_id, time.monotonic())
            return Reply(204)
