"""Huey's no-op. No results; workers wait in Redis, not by asking again and again."""

from __future__ import annotations

import os

from counted import count
from huey import RedisHuey

huey = RedisHuey("peers", url=f"unix://{os.environ['PEERS_REDIS']}", results=False, blocking=True)


@huey.task(name="noop")
def noop() -> None:
    count()


def enqueue(number: int) -> None:
    for _ in range(number):
        noop()
