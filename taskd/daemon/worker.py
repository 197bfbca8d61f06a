"""The worker: one pool of child processes, fed by the brokers its section of the configuration names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from taskd import aio
from taskd.config import live
from taskd.config.loader import pool_of
from taskd.config.schema import WorkerConfig
from taskd.daemon import notify, reload, status
from taskd.daemon.certificates import POOL, Certificates
from taskd.daemon.reload import Reloads
from taskd.rpc.access import Access, revealed
from taskd.rpc.client import connect
from taskd.telemetry.logs import setup_logging
from taskd.worker.pool import Pool, open_work_stream, run_pool
from taskd.worker.push import listener


async def run_worker(
    config: WorkerConfig,
    pool: str,
    *,
    stop: trio.Event,
    reloads: Reloads[WorkerConfig] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one pool until `stop`, then drain. Started once its children are warm.

    `reloads` says when the configuration is to be read again: the log's level and format change while it
    runs, and what the files of its TLS hold. Raises ConfigError when there is no such pool, StartupError
    when a file or port cannot be used.
    """
    section = pool_of(config, pool)
    certificates = Certificates(section, POOL)
    access = Access(revealed(section.secrets), certificates.contexts.get("tls"))

    async def run(task_status: trio.TaskStatus[Pool]) -> None:
        await run_pool(
            section,
            pool,
            stop=stop,
            task_status=task_status,
            connect=partial(open_work_stream, access=access),
            call=partial(connect, access=access),
            listen=listener(section, certificates.contexts.get("listen.tls")),
        )

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
                around.start_soon(_follow, reloads, config, partial(certificates.renew, section))
            task_status.started()
        around.cancel_scope.cancel()


async def _follow(reloads: Reloads[WorkerConfig], config: WorkerConfig, renew: Callable[[], None]) -> None:
    running = config

    def apply(wanted: WorkerConfig) -> None:
        nonlocal running
        running = wanted
        setup_logging(wanted.log_level, wanted.log_format)
        renew()

    await reload.follow(reloads, lambda: running, apply, live.WORKER)


async def _tell_stopping(stop: trio.Event) -> None:
    await stop.wait()
    notify.tell("STOPPING=1")
