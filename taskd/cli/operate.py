"""`taskd pause`, `resume`, `killswitch`, `switches`: orders to a running broker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from taskd.cli import flags
from taskd.cli.exits import Commands

if TYPE_CHECKING:
    from taskd.activation.switches import Switch
    from taskd.admin.operate import Operator

T = TypeVar("T")

Socket = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", help="The broker's admin socket. Default: that of --config.", show_default=False
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="A broker elsewhere, with a secret of its admin.secrets in TASKD_ADMIN_SECRET.",
        show_default=False,
    ),
]
Subject = Annotated[
    list[str], typer.Argument(metavar="WHAT...", help="application=A, namespace=N, task=T: all must fit.")
]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept with the switch and in the log.")]
For = Annotated[
    str | None,
    typer.Option("--for", metavar="TIME", help="How long, such as 90s, 30m, 2h, 1d.", show_default=False),
]
Author = Annotated[
    str | None, typer.Option(metavar="NAME", help="Who. Default: the user of this shell.", show_default=False)
]
InNamespace = Annotated[
    str | None,
    typer.Option("--namespace", metavar="NAME", help="Only in this namespace.", show_default=False),
]
OfApplication = Annotated[
    str | None,
    typer.Option("--application", metavar="NAME", help="Only of this application.", show_default=False),
]

killswitch = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Drop calls of a task: those that arrive and those that wait.",
)


def pause(
    what: Subject,
    reason: Reason,
    for_: For = None,
    author: Author = None,
    config: flags.Config = None,
    socket: Socket = None,
    address: Address = None,
) -> None:
    """Hand out nothing of an application, a namespace or a task. What is paused waits, and may expire.

    Workers finish what they have. Of several parts all must fit.

    ```
    taskd pause application=shop --reason 'database moves' --for 2h
    taskd pause namespace=mail task=mail.send --reason 'provider is down'
    ```
    """
    from taskd.admin.operate import duration_ms, subject

    meant, for_ms = subject(what), duration_ms(for_)
    _show([ask(config, socket, address, lambda who: who.pause(meant, reason, or_user(author), for_ms))], "")


def resume(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="WHAT...", help="As it was paused: application=A, …")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Everything that is paused.")] = False,
    reason: Reason = "",
    author: Author = None,
    config: flags.Config = None,
    socket: Socket = None,
    address: Address = None,
) -> None:
    """Hand out again what was paused.

    ```
    taskd resume application=shop
    taskd resume --all --reason 'database is back'
    ```
    """
    from taskd.admin.operate import subject

    if bool(what) == all_:
        raise typer.BadParameter("name what was paused, such as application=shop, or give --all")
    meant = subject(what) if what else None
    _show(ask(config, socket, address, lambda who: who.resume(meant, reason, or_user(author))), "resumed: ")


def switches(
    config: flags.Config = None, socket: Socket = None, address: Address = None, json: flags.Json = False
) -> None:
    """List what is paused, killed or demoted: by whom, why and until when.

    ```
    taskd switches --config /etc/taskd/broker.yaml
    ```
    """
    found = ask(config, socket, address, lambda who: who.switches())
    _list(found, json)


@killswitch.command("add")
def killswitch_add(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task.")],
    reason: Reason,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POSITION=JSON", help="Only calls with this positional argument.", show_default=False
        ),
    ] = None,
    kwarg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help="Only calls with this keyword argument.", show_default=False),
    ] = None,
    namespace: InNamespace = None,
    application: OfApplication = None,
    for_: For = None,
    author: Author = None,
    config: flags.Config = None,
    socket: Socket = None,
    address: Address = None,
) -> None:
    """Drop the calls of a task, for good and without a dead letter.

    With --arg or --kwarg, those calls of which any such argument is exactly that value: 1, 1.0 and true
    are three values, and text stands in double quotes.

    ```
    taskd killswitch add mail.send --reason 'sends twice' --for 30m
    taskd killswitch add mail.send --arg 0=17 --kwarg 'template="digest"' --reason 'customer 17'
    ```
    """
    from taskd.admin.operate import conditions, duration_ms, killed

    meant = killed(task, application, namespace, conditions(arg or (), kwarg or ()))
    for_ms = duration_ms(for_)
    _show([ask(config, socket, address, lambda who: who.kill(meant, reason, or_user(author), for_ms))], "")


@killswitch.command("remove")
def killswitch_remove(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task.")],
    namespace: InNamespace = None,
    application: OfApplication = None,
    reason: Reason = "",
    author: Author = None,
    config: flags.Config = None,
    socket: Socket = None,
    address: Address = None,
) -> None:
    """Let the calls of a task run again. What was dropped does not come back.

    ```
    taskd killswitch remove mail.send
    ```
    """
    from taskd.admin.operate import killed

    meant = killed(task, application, namespace, ())
    _show(ask(config, socket, address, lambda who: who.spare(meant, reason, or_user(author))), "removed: ")


@killswitch.command("list")
def killswitch_list(
    config: flags.Config = None, socket: Socket = None, address: Address = None, json: flags.Json = False
) -> None:
    """List the killswitches.

    ```
    taskd killswitch list
    ```
    """
    found = ask(config, socket, address, lambda who: who.switches())
    _list([switch for switch in found if switch.kind.value == "killswitch"], json)


def or_user(author: str | None) -> str:
    """Who gives an order."""
    import getpass
    import os

    try:
        return author or getpass.getuser()
    except (KeyError, OSError):  # this system has no name for the user, as in many containers
        return f"uid {os.getuid()}"


def ask(
    config: Path | None,
    socket: Path | None,
    address: str | None,
    order: Callable[[Operator], Awaitable[T]],
) -> T:
    """What the broker answers to `order`, by its socket or at `address`. Raises TaskdError."""
    if socket is not None and address is not None:
        raise typer.BadParameter("give --socket or --address, not both")
    import trio

    from taskd.admin.operate import open_operator
    from taskd.config.loader import load_broker_config, load_producer_config
    from taskd.daemon.operators import socket_path
    from taskd.rpc.access import producer_access
    from taskd.telemetry.logs import setup_logging

    setup_logging("warning", "auto")
    path, tls = None, None
    if address is None:
        path = socket or socket_path(load_broker_config(config, {}))
    else:
        tls = producer_access(load_producer_config({})).tls

    async def ask() -> T:
        from taskd import aio

        async with aio.open_loop(), open_operator(path, address, tls) as operator:
            return await order(operator)

    return trio.run(ask)


def _show(found: list[Switch], before: str) -> None:
    for switch in found:
        typer.echo(f"{before}{line(switch)}")
    if not found:
        typer.echo("there was none")


def _list(found: list[Switch], as_json: bool) -> None:
    if as_json:
        from json import dumps

        typer.echo(dumps([_fields(switch) for switch in found], ensure_ascii=False))
        return
    for switch in found:
        typer.echo(line(switch))
    if not found:
        typer.echo("nothing is switched")


def line(switch: Switch) -> str:
    until = f"until {_time(switch.until_ms)}" if switch.until_ms is not None else "until taken back"
    return (
        f"{switch.kind.value} {switch.words}, {until}, since {_time(switch.created_at_ms)} "
        f"by {switch.author}: {switch.reason}"
    )


def _fields(switch: Switch) -> dict[str, object]:
    return {
        "number": switch.number,
        "kind": switch.kind.value,
        "application": switch.application,
        "namespace": switch.namespace,
        "task": switch.taskname,
        "conditions": [[condition.place, condition.value] for condition in switch.conditions],
        "reason": switch.reason,
        "author": switch.author,
        "source": switch.source.value,
        "created_at_ms": switch.created_at_ms,
        "until_ms": switch.until_ms,
    }


def _time(wall_ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(wall_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
