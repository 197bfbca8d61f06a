"""Broker and worker in one process tree, for local development."""

from __future__ import annotations

import trio

from taskd.config.loader import pool_of
from taskd.config.schema import BrokerConfig, WorkerConfig
from taskd.daemon.broker import BrokerAddresses, run_broker
from taskd.daemon.worker import run_worker
from taskd.errors import ConfigError


async def run_dev(
    broker: BrokerConfig,
    worker: WorkerConfig,
    pool: str = "default",
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[BrokerAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run both until `stop`: the worker drains first, the broker takes its last results and follows.

    The pool works for this broker, whatever addresses and secrets its section names.

    Raises ConfigError when the broker wants TLS and the pool knows none.
    """
    if broker.rpc.tls is not None and pool_of(worker, pool).tls is None:
        raise ConfigError(
            f"rpc.tls is set, so pools.{pool}.tls must be: {{ca: FILE}} of who signed its certificate"
        )
    stop_broker = trio.Event()
    async with trio.open_nursery() as nursery:

        async def start_broker(task_status: trio.TaskStatus[BrokerAddresses]) -> None:
            await run_broker(broker, stop=stop_broker, task_status=task_status)

        addresses = await nursery.start(start_broker)
        brokers = (f"{broker.rpc.host}:{addresses.rpc_port}",)
        secrets = broker.rpc.secrets or pool_of(worker, pool).secrets
        section = pool_of(worker, pool).model_copy(update={"brokers": brokers, "secrets": secrets})
        here = worker.model_copy(update={"pools": {pool: section}})
        try:
            async with trio.open_nursery() as working:

                async def start_worker(task_status: trio.TaskStatus[None]) -> None:
                    await run_worker(here, pool, stop=stop, task_status=task_status)

                await working.start(start_worker)
                task_status.started(addresses)
        finally:
            stop_broker.set()
