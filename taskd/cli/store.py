"""`taskd backup`, `taskd restore`, `taskd recover`, `taskd broker evacuate`: the care of a broker's store."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taskd.cli import flags

if TYPE_CHECKING:
    from collections.abc import Mapping

    from taskd.config.schema import BrokerConfig
    from taskd.daemon.recover import Recovered
    from taskd.inflight.base import Left

UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder.", show_default=False)],
    config: flags.Config = None,
    data_dir: flags.DataDir = None,
) -> None:
    """Copy the store, and the embedded log, while the broker runs.

    What was acknowledged before the backup began is in it. With Kafka only the store is copied; the
    records themselves are Kafka's.

    ```
    taskd backup --config /etc/taskd/broker.yaml /backups/2026-01-01
    ```
    """
    from taskd.clock import SystemClock
    from taskd.daemon.backup import back_up

    manifest = back_up(_settings(config, data_dir), folder, SystemClock())
    for name, size in manifest.files.items():
        typer.echo(f"{folder / name}  {size} bytes")


def restore(
    folder: Annotated[Path, typer.Argument(metavar="SRC", help="A folder made by `taskd backup`.")],
    config: flags.Config = None,
    data_dir: flags.DataDir = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Rename what is there, and put the backup in its place.")
    ] = False,
) -> None:
    """Put a backup in place of a store; the broker must not run.

    Time goes back to the backup: what finished since may run again, also what runs at most once.

    ```
    taskd restore --config /etc/taskd/broker.yaml /backups/2026-01-01
    ```
    """
    from taskd.clock import SystemClock
    from taskd.daemon import backup as backups

    done = backups.restore(_settings(config, data_dir), folder, SystemClock(), replace=replace)
    for path in done.set_aside:
        typer.echo(f"what was there is now {path}")
    for name in done.manifest.files:
        typer.echo(f"restored {name}")
    if done.manifest.log == "kafka":
        explain_offsets(done.manifest.offsets)


def explain_offsets(offsets: Mapping[str, int]) -> None:
    places = " ".join(f"--from-offset {place}={offset}" for place, offset in offsets.items())
    typer.echo(
        "Kafka keeps the group's offsets, and they were left alone. What the broker read after this backup "
        "is not in it; to read it again, before the broker starts:"
    )
    typer.echo(f"  taskd recover --config FILE {places or '--from-time TIME'}")


def recover(
    config: flags.Config = None,
    data_dir: flags.DataDir = None,
    from_offset: Annotated[
        list[str] | None,
        typer.Option(metavar="TOPIC/PARTITION=N", help="Read this partition again from N; may be repeated."),
    ] = None,
    from_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Read again from then: 2026-01-01T12:00:00Z, or a while ago: 90s, 30m, 2h, 1d.",
        ),
    ] = None,
) -> None:
    """Go on after a damaged store was set aside; the broker must not run.

    First what can be read of the damaged file is taken: what waits and runs, and the ids of what is
    finished. Then, with one of the options, the log is read again from there. Ids that are known are
    dropped; what finished longer ago than store.tombstone_ttl_s (10 minutes) before the damage is not
    known any more and runs again.

    ```
    taskd recover --config /etc/taskd/broker.yaml --from-time 2h
    taskd recover --config /etc/taskd/broker.yaml --from-offset taskd/0=120000
    ```
    """
    from functools import partial

    import trio

    from taskd.clock import SystemClock
    from taskd.daemon.recover import parse_place, recover
    from taskd.errors import TaskdError

    settings = _settings(config, data_dir)
    clock = SystemClock()
    try:
        offsets = dict(map(parse_place, from_offset or ()))
        time_ms = None if from_time is None else parse_time(from_time, clock.now().wall_ms)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if offsets and time_ms is not None:
        raise typer.BadParameter("expected --from-offset or --from-time, found both")
    done = trio.run(partial(recover, settings, clock, from_offsets=offsets, from_time_ms=time_ms))
    for line in summary(done, rewinds=bool(offsets) or time_ms is not None):
        typer.echo(line)
    if not done.salvaged and not done.rewound:
        raise TaskdError(
            "there was nothing to do: no damaged file lies beside the store. "
            "To read the log again, say from where with --from-offset or --from-time."
        )


def parse_time(text: str, now_ms: int) -> int:
    """Milliseconds since 1970 of an ISO 8601 time, or of so long ago; raises ValueError."""
    number, unit = text[:-1], text[-1:]
    if unit in UNITS_S and number.isdecimal():
        return now_ms - int(number) * UNITS_S[unit] * 1000
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise ValueError(
            "expected a time with its zone such as 2026-01-01T12:00:00Z, or a while such as 90s, 30m, 2h; "
            f"found {text!r}"
        )
    return round(time.timestamp() * 1000)


def summary(done: Recovered, *, rewinds: bool) -> list[str]:
    lines = []
    for path, found in done.salvaged:
        waiting = ", ".join(f"{count} {status.word}" for status, count in sorted(found.unfinished.items()))
        lines.append(f"{path}: {found.finished} finished ids; {waiting or 'nothing unfinished'}")
        if found.known:
            lines.append(f"  {found.known} were known already")
        if not found.complete:
            lines.append(f"  parts could not be read, {found.unusable} rows among them: read the log again")
    for entry in done.rewound:
        if entry.was is None or entry.now is None:
            lines.append(f"{entry.partition}: nothing was committed yet")
        elif entry.now < entry.was:
            lines.append(f"{entry.partition}: reads again from {entry.now}, {entry.was - entry.now} records")
        else:
            lines.append(f"{entry.partition}: stays at {entry.was}")
    if not rewinds and any(not found.complete for _, found in done.salvaged):
        lines.append("The log was not rewound: run this again with --from-time or --from-offset.")
    return lines


def evacuate(
    config: flags.Config = None,
    data_dir: flags.DataDir = None,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", help="How long to wait for what runs; default: drain_grace_s."
        ),
    ] = None,
) -> None:
    """Empty the store of a broker that is to go: stop the broker, then run this in its place.

    It reads nothing and hands out nothing. What waits goes back to Kafka, for the other brokers of the
    group; workers report what they run. Exit code 0 when nothing is left, else 1 and the ids.

    ```
    taskd broker evacuate --config /etc/taskd/broker.yaml --grace 300
    ```
    """
    import trio

    from taskd.cli.early import kept_signals
    from taskd.errors import TaskdError
    from taskd.signals import stop_on_signals
    from taskd.telemetry.logs import setup_logging

    settings = _settings(config, data_dir)
    setup_logging(settings.log_level, settings.log_format)

    from taskd.daemon.evacuate import evacuate

    left: list[Left] = []

    async def run() -> None:
        async with stop_on_signals(kept_signals) as stop:
            grace_s = settings.drain_grace_s if grace is None else grace
            left.extend(await evacuate(settings, grace_s=grace_s, stop=stop))

    trio.run(run)
    if left:
        names = "\n".join(
            f"{row.id} is {row.status.word}{f': {row.stuck}' if row.stuck else ''}" for row in left
        )
        raise TaskdError(f"the store is not empty; some of what is left:\n{names}")
    typer.echo("the store is empty")


def _settings(config: Path | None, data_dir: Path | None) -> BrokerConfig:
    from taskd.config.loader import load_broker_config

    return load_broker_config(config, {"data_dir": data_dir})
