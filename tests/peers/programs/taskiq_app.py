"""Taskiq's no-op: a coroutine, as its plain functions go through a pool of threads. No result backend."""

from __future__ import annotations

import asyncio
import os

from counted import count
from taskiq.serializers import ORJSONSerializer
from taskiq_redis import ListQueueBroker

broker = ListQueueBroker(f"unix://{os.environ['PEERS_REDIS']}").with_serializer(ORJSONSerializer())


@broker.task(task_name="noop")
async def noop() -> None:
    count()


def enqueue(number: int) -> None:
    asyncio.run(_enqueue(number))


async def _enqueue(number: int) -> None:
    await broker.startup()
    at_once = 100
    for start in range(0, number, at_once):
        await asyncio.gather(*(noop.kiq() for _ in range(min(at_once, number - start))))
    await broker.shutdown()
