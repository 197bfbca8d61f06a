"""RQ's no-op. Results are dropped at once, and jobs have no time limit that would need an alarm each."""

from __future__ import annotations

import os

from counted import count
from redis import Redis
from rq import Queue


def noop() -> None:
    count()


def enqueue(number: int) -> None:
    queue = Queue(connection=Redis.from_url(f"unix://{os.environ['PEERS_REDIS']}"))
    at_once = 500
    for start in range(0, number, at_once):
        jobs = min(at_once, number - start)
        queue.enqueue_many([Queue.prepare_data(noop, result_ttl=0, timeout=-1) for _ in range(jobs)])
