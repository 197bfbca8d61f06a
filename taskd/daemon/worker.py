"""The worker: one pool of child processes, fed by the brokers its section of the configuration names."""

from __future__ import annotations

import trio

from taskd import aio
from taskd.config import live
from taskd.config.loader import pool_of
from taskd.config.schema import WorkerConfig
from taskd.daemon import notify, reload, status
from taskd.daemon.reload import Reloads
from taskd.telemetry.logs import setup_logging
from taskd.worker.pool import Pool, run_pool


async def run_worker(
    config: WorkerConfig,
    pool: str,
    *,
    stop: trio.Event,
    reloads: Reloads[WorkerConfig] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one pool until `stop`, then drain. Started once its children are warm.

    `reloads` says when the configuration is to be read again: only the log's level and format change
    while it runs. Raises ConfigError when there is no such pool.
    """
    section = pool_of(config, pool)

    async def run(task_status: trio.TaskStatus[Pool]) -> None:
        await run_pool(section, pool, stop=stop, task_status=task_status)

    notify.tell(f"STATUS=starting {section.slots} slots")
    async with aio.open_loop(), trio.open_nursery() as around:
        around.start_soon(_tell_stopping, stop)
        async with trio.open_nursery() as working:
            warm: Pool = await working.start(run)
            if not stop.is_set():
                notify.tell("READY=1")
            around.start_soon(notify.keep_watchdog, warm.stuck)
            around.start_soon(status.keep_status, status.WorkerStatus(warm, stop))
            if reloads is not None:
                around.start_soon(_follow, reloads, config)
            task_status.started()
        around.cancel_scope.cancel()


async def _follow(reloads: Reloads[WorkerConfig], config: WorkerConfig) -> None:
    running = config

    def apply(wanted: WorkerConfig) -> None:
        nonlocal running
        running = wanted
        setup_logging(wanted.log_level, wanted.log_format)

    await reload.follow(reloads, lambda: running, apply, live.WORKER)


async def _tell_stopping(stop: trio.Event) -> None:
    await stop.wait()
    notify.tell("STOPPING=1")
