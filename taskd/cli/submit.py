"""`taskd submit`: send calls of a task to the log, and wait for the outcome if asked to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taskd.cli import flags
from taskd.cli.calls import BadCalls, Kwargs, find_task, read_kwargs, read_lines
from taskd.cli.exits import EX_INTERRUPTED, complain
from taskd.cli.summary import Summary

if TYPE_CHECKING:
    import trio

    from taskd.config.schema import ProducerConfig
    from taskd.tasks.task import AnyTask

BATCH_CALLS = 1_000
ERRORS_NAMED = 5


def submit(
    task: Annotated[str, typer.Argument(metavar="NAMESPACE:TASK", help="As `taskd plugins list` shows it.")],
    kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="Arguments of the call, a JSON object.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One JSON object of arguments on each line; - reads stdin."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Send every call so many times.")] = 1,
    application: Annotated[
        str | None, typer.Option(metavar="NAME", help="When several applications have that task.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every call has ended.")] = False,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="With --wait: the longest wait.")
    ] = 600.0,
    broker: flags.Broker = None,
    json: flags.Json = False,
) -> None:
    """Send calls of a task, and with --wait tell how they ended.

    The task must belong to a plugin that is installed here; its options hold. Exit code 0: all was
    sent (with --wait: and is complete), 3: some tasks failed, 1: something was not sent, or its end
    is not known.

    ```
    taskd submit demo:add --kwargs '{"a": 2, "b": 3}' --wait
    taskd submit webhooks:deliver --file events.jsonl --wait --json
    taskd submit demo:noop --count 5000 --wait
    ```
    """
    import trio

    from taskd.config.loader import load_producer_config
    from taskd.telemetry.logs import setup_logging

    setup_logging("error", "auto")
    config = load_producer_config({"broker": broker})
    found = find_task(task, application)
    calls = _read(kwargs, file, found)
    summary = Summary(task, len(calls) * count)
    interrupted = trio.run(_submit, config, found, calls, count, timeout if wait else None, summary)
    for error in summary.errors[:ERRORS_NAMED]:
        complain(error)
    if json:
        from json import dumps

        typer.echo(dumps(summary.as_json(), ensure_ascii=False))
    else:
        typer.echo("\n".join(summary.lines()))
    raise typer.Exit(EX_INTERRUPTED if interrupted else summary.exit_code)


def _read(kwargs: str | None, file: Path | None, task: AnyTask) -> list[Kwargs]:
    if kwargs is not None and file is not None:
        raise typer.BadParameter("give --kwargs or --file, not both")
    if file is None:
        return [read_kwargs("{}" if kwargs is None else kwargs, task)]
    if str(file) == "-":
        return read_lines(sys.stdin.buffer, "stdin", task)
    try:
        with file.open("rb") as lines:
            return read_lines(lines, str(file), task)
    except OSError as error:
        raise BadCalls(f"{file}: cannot be read: {error.strerror}") from None


async def _submit(
    config: ProducerConfig,
    task: AnyTask,
    calls: Sequence[Kwargs],
    count: int,
    timeout_s: float | None,
    summary: Summary,
) -> bool:
    """Fill in the summary; True when a signal came first. `timeout_s` None: do not wait."""
    import trio

    from taskd.signals import stop_on_signals

    began_s = trio.current_time()
    async with stop_on_signals() as stop, trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on, stop, nursery.cancel_scope)
        try:
            await _send(config, task, calls, count, summary)
            if timeout_s is not None and summary.ids:
                await _wait(config, timeout_s, summary)
        finally:
            summary.seconds = trio.current_time() - began_s
        nursery.cancel_scope.cancel()
    return stop.is_set()


async def _cancel_on(stop: trio.Event, scope: trio.CancelScope) -> None:
    # Not by KeyboardInterrupt: raised inside asyncio code it would lock up for good.
    await stop.wait()
    scope.cancel()


async def _send(
    config: ProducerConfig, task: AnyTask, calls: Sequence[Kwargs], count: int, summary: Summary
) -> None:
    from taskd.cli.meter import meter
    from taskd.producer.client import open_producer

    attempted = 0
    with meter("sent", summary.total) as step:
        async with open_producer(config) as producer:
            for batch in _batches(calls, count):
                built = [task.to_call(kwargs=kwargs) for kwargs in batch]
                errors = await producer.send_many(built)
                pairs = list(zip(built, errors, strict=True))
                summary.ids += [call.id for call, error in pairs if error is None]
                summary.errors += [str(error) for _, error in pairs if error is not None]
                attempted += len(batch)
                step(len(summary.ids))
                if all(errors):  # nobody is there: each further batch would only wait out its time
                    break
    if attempted < summary.total and summary.errors:
        summary.errors.append(f"gave up; {summary.total - attempted} more were not tried")


def _batches(calls: Sequence[Kwargs], count: int) -> Iterator[list[Kwargs]]:
    batch: list[Kwargs] = []
    for _ in range(count):
        for kwargs in calls:
            batch.append(kwargs)
            if len(batch) == BATCH_CALLS:
                yield batch
                batch = []
    if batch:
        yield batch


async def _wait(config: ProducerConfig, timeout_s: float, summary: Summary) -> None:
    from taskd import aio
    from taskd.admin.wait import Progress, wait_for
    from taskd.cli.meter import meter
    from taskd.rpc.access import producer_access
    from taskd.rpc.client import connect

    with meter("ended", len(summary.ids)) as step:

        def show(progress: Progress) -> None:
            failed = f"{progress.failed} failed" if progress.failed else ""
            step(progress.done, progress.trouble or failed)

        async with aio.open_loop(), connect(config.broker, producer_access(config)) as client:
            summary.finals = await wait_for(client, summary.ids, on_progress=show, timeout_s=timeout_s)
