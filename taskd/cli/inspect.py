"""`taskd status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from taskd.cli import flags

if TYPE_CHECKING:
    from taskd.admin.wait import Seen
    from taskd.config.schema import ProducerConfig


def status(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of activations.")],
    broker: flags.Broker = None,
    json: flags.Json = False,
) -> None:
    """Tell what became of activations, by the ids that `taskd submit` and `.delay()` gave.

    The broker remembers what is finished for ten minutes (store.tombstone_ttl_s). Exit code 1 when it
    does not know one of the ids.

    ```
    taskd status 1f0c2d4a5b6c7d8e9f00112233445566
    ```
    """
    import trio

    from taskd.config.loader import load_producer_config
    from taskd.telemetry.logs import setup_logging

    setup_logging("warning", "auto")
    found = trio.run(_ask, load_producer_config({"broker": broker}), ids)
    if json:
        from dataclasses import asdict
        from json import dumps

        typer.echo(dumps([asdict(seen) for seen in found], ensure_ascii=False))
    else:
        for seen in found:
            typer.echo(_line(seen))
    if any(seen.state == "unknown" for seen in found):
        raise typer.Exit(1)


async def _ask(config: ProducerConfig, ids: list[str]) -> list[Seen]:
    from taskd import aio
    from taskd.admin.wait import get_status
    from taskd.rpc.access import producer_access
    from taskd.rpc.client import connect

    async with aio.open_loop(), connect(config.broker, producer_access(config)) as client:
        return await get_status(client, ids)


def _line(seen: Seen) -> str:
    if seen.state == "unknown":
        return f"{seen.id}  unknown to this broker: still in the log, another broker's, or forgotten"
    parts = [seen.id, f" {seen.outcome or seen.state}"]
    if seen.attempts:
        parts.append(f"started {seen.attempts} time{'s' if seen.attempts > 1 else ''}")
    if seen.received_at_ms and seen.finished_at_ms:
        parts.append(f"after {max(0, seen.finished_at_ms - seen.received_at_ms)} ms")
    parts += _running(seen)
    if seen.continued_as:
        parts.append(f"continued as {seen.continued_as}")
    if seen.dead_lettered:
        parts.append("dead-lettered")
    if seen.reason == "cancelled":  # the error says by whom
        parts.append(f"({seen.reason} {seen.error})")
    elif seen.reason or seen.error:
        parts.append(f"({': '.join(filter(None, (seen.reason, seen.error)))})")
    return " ".join(parts)


def _running(seen: Seen) -> list[str]:
    """Where it runs, since when, until when, and what it says of itself."""
    from datetime import UTC, datetime

    parts = []
    if seen.worker:
        parts.append(f"by worker {seen.worker}")
    if seen.started_at_ms:
        parts.append(f"since {datetime.fromtimestamp(seen.started_at_ms / 1000, UTC):%Y-%m-%d %H:%M:%SZ}")
    if seen.deadline_in_ms is not None:
        parts.append(f"lease ends in {max(seen.deadline_in_ms, 0) / 1000:.0f} s")
    if seen.permille is not None:
        parts.append(f"{seen.permille / 10:.0f} %")
    if seen.message:  # of a task: it may hold what a terminal would obey
        parts.append("".join(c if c.isprintable() else " " for c in seen.message))
    if seen.heartbeat_age_ms is not None:
        parts.append(f"(heartbeat {seen.heartbeat_age_ms / 1000:.0f} s ago)")
    return parts
