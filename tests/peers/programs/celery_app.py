"""Celery's no-op. No results, events or remote control; acknowledged early, as is its default."""

from __future__ import annotations

import os

from celery import Celery
from counted import count

app = Celery("peers", broker=f"redis+socket://{os.environ['PEERS_REDIS']}")
app.conf.update(
    task_ignore_result=True,
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    worker_disable_rate_limits=True,
    broker_connection_retry_on_startup=True,
)


@app.task(name="noop")
def noop() -> None:
    count()


def enqueue(number: int) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        for _ in range(number):
            noop.apply_async(producer=producer)
