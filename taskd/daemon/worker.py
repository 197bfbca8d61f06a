"""The worker: one pool of child processes, fed by the brokers its section of the configuration names."""

from __future__ import annotations

import trio

from taskd import aio
from taskd.config.loader import pool_of
from taskd.config.schema import WorkerConfig
from taskd.worker.pool import run_pool


async def run_worker(
    config: WorkerConfig,
    pool: str,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one pool until `stop`, then drain. Started once its children are warm.

    Raises ConfigError when there is no such pool.
    """
    section = pool_of(config, pool)
    async with aio.open_loop():
        await run_pool(section, pool, stop=stop, task_status=task_status)
