"""`taskd broker`, `taskd worker`, `taskd dev`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from taskd.cli import flags

if TYPE_CHECKING:
    import trio

    from taskd.config.schema import Section, WorkerConfig
    from taskd.daemon.broker import BrokerAddresses


broker_app = typer.Typer(invoke_without_command=True)


@broker_app.callback()
def broker(
    context: typer.Context,
    config: flags.Config = None,
    data_dir: flags.DataDir = None,
    rpc_port: flags.RpcPort = None,
    http_port: flags.HttpPort = None,
) -> None:
    """Run a broker: it reads the log, keeps what is in flight, and hands it to workers.

    SIGTERM or Ctrl-C drains it: what workers still run is waited for, then it exits with 0. A second
    signal stops it now (exit code 143 or 130); nothing that was acknowledged is lost either way.

    SIGHUP reads the configuration again: limits, log level and other keys that can change hold at once,
    the log names each key that needs a restart. An invalid file changes nothing.

    ```
    taskd broker --config /etc/taskd/broker.yaml
    taskd config check /etc/taskd/broker.yaml && systemctl reload taskd-broker
    TASKD_LOG__KIND=kafka TASKD_LOG__CLUSTERS__DEFAULT__ADDRESS=kafka:9092 taskd broker
    ```
    """
    if context.invoked_subcommand is not None:
        return
    from functools import partial

    from taskd.config.loader import load_broker_config
    from taskd.telemetry.logs import setup_logging

    overrides = {"data_dir": data_dir, "rpc.port": rpc_port, "http.port": http_port}
    settings = load_broker_config(config, overrides)
    setup_logging(settings.log_level, settings.log_format)
    _warn_of_names(type(settings))

    from taskd.daemon.broker import run_broker

    _run(partial(run_broker, settings), lambda: load_broker_config(config, overrides))


def worker(
    pool: Annotated[str, typer.Option(metavar="NAME", help="Section of `pools` in the configuration.")] = (
        "default"
    ),
    config: flags.Config = None,
    broker: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A broker to work for; may be repeated.", show_default=False),
    ] = None,
    slots: flags.Slots = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="stream|pull|push",
            help="How it gets work; see above. Default: what the pool says, else stream.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a worker: it takes activations from brokers and runs each in a child process.

    With `--protocol stream` it works for brokers of taskd: work comes as fast as it is done, and what was
    not started can be handed back. `pull` and `push` speak the published taskbroker protocol, for any broker
    that does: with `pull` the worker asks for task after task, with `push` the broker calls the worker, at
    `listen` of its pool, and gets the results back.

    SIGTERM or Ctrl-C drains it: what was not started is handed back, what runs is finished and reported.
    What still runs after `drain_grace_s` is ended, and runs elsewhere at once. A second signal ends
    everything now (exit code 143 or 130).

    SIGHUP reads the configuration again: the log level changes at once, the rest needs a restart, and
    the log says so.

    ```
    taskd worker --pool default --config /etc/taskd/worker.yaml
    taskd worker --broker 10.0.0.5:50051 --broker 10.0.0.6:50051 --slots 8
    taskd worker --protocol pull --broker taskbroker:50051
    TASKD_POOLS__DEFAULT__LISTEN__HOST=10.0.0.7 taskd worker --protocol push --broker taskbroker:50051
    ```
    """
    from functools import partial

    from taskd.config.loader import load_worker_config, pool_of
    from taskd.telemetry.logs import setup_logging

    # Without the flags first: a flag must not make up the pool that it speaks of.
    pool_of(load_worker_config(config, {}), pool)
    overrides = {"pools": {pool: {"brokers": broker or None, "slots": slots, "protocol": protocol}}}
    settings = load_worker_config(config, overrides)
    setup_logging(settings.log_level, settings.log_format)
    _warn_of_names(type(settings))

    from taskd.daemon.worker import run_worker

    _run(partial(run_worker, settings, pool), lambda: load_worker_config(config, overrides))


def dev(
    config: flags.Config = None,
    data_dir: flags.DataDir = None,
    rpc_port: flags.RpcPort = None,
    http_port: flags.HttpPort = None,
    slots: flags.Slots = None,
) -> None:
    """Run a broker and a worker together, on the embedded log, for development.

    Everything lies in ./taskd-data; delete that folder to start afresh. `--config` is a broker's file.

    ```
    taskd dev
    taskd dev --data-dir /tmp/try --rpc-port 0 --http-port 0 --slots 4
    ```
    """
    from taskd.config.loader import load_broker_config, load_worker_config
    from taskd.telemetry.logs import setup_logging

    overrides = {"data_dir": data_dir, "rpc.port": rpc_port, "http.port": http_port}
    settings = load_broker_config(config, overrides)
    pools: WorkerConfig = load_worker_config(None, {"pools": {"default": {"slots": slots}}})
    setup_logging(settings.log_level, settings.log_format)

    from taskd.daemon.dev import run_dev

    async def both(*, stop: trio.Event) -> None:
        import trio

        async with trio.open_nursery() as nursery:

            async def start(task_status: trio.TaskStatus[BrokerAddresses]) -> None:
                await run_dev(settings, pools, stop=stop, task_status=task_status)

            addresses = await nursery.start(start)
            _greet(settings.rpc.host, addresses.rpc_port, settings.http.host, addresses.http_port)

    _run(both)


def _warn_of_names(model: type[Section]) -> None:
    import structlog

    from taskd.config.loader import misspelt_names

    for warning in misspelt_names(model):
        structlog.get_logger("taskd.config").warning(warning)


def _greet(rpc_host: str, rpc_port: int, http_host: str, http_port: int) -> None:
    typer.echo(
        f"taskd dev is ready: broker {rpc_host}:{rpc_port}, health http://{http_host}:{http_port}/readyz\n"
        f"  taskd plugins list\n"
        f'  taskd submit demo:add --kwargs \'{{"a": 2, "b": 3}}\' --wait --broker {rpc_host}:{rpc_port}\n'
        "Ctrl-C stops it.",
        err=True,
    )


def _run(root: Callable[..., Awaitable[None]], load: Callable[[], Section] | None = None) -> None:
    """Run until a signal stops it. With `load`, SIGHUP makes it read its configuration again."""
    import trio

    from taskd.cli.early import kept_signals
    from taskd.daemon.collecting import collect_less
    from taskd.daemon.reload import Reloads
    from taskd.signals import hangups, stop_on_signals

    async def until_stopped() -> None:
        async with stop_on_signals(kept_signals) as stop:
            if stop.is_set():
                return  # asked before there was anything to stop
            if load is None:
                await root(stop=stop)
                return
            with hangups() as asked:
                await root(stop=stop, reloads=Reloads(asked, load))

    collect_less()
    trio.run(until_stopped)
