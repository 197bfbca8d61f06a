"""Dramatiq's no-op, with the middleware that does nothing for it left out."""

from __future__ import annotations

import os

import dramatiq
from counted import count
from dramatiq.brokers.redis import RedisBroker

broker = RedisBroker(url=f"unix://{os.environ['PEERS_REDIS']}", middleware=[])
dramatiq.set_broker(broker)


@dramatiq.actor(actor_name="noop")
def noop() -> None:
    count()


def enqueue(number: int) -> None:
    for _ in range(number):
        noop.send()
