"""`taskd cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from taskd.cli import flags, operate

if TYPE_CHECKING:
    from taskd.wire.generated.taskd.v1 import CancelledActivation


def cancel(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of activations; -: from stdin.")],
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="Why; kept with each activation and in the log.")
    ],
    even_if_unknown: Annotated[
        bool,
        typer.Option(
            "--even-if-unknown",
            help="Drop what is not here yet when it arrives, within store.tombstone_ttl_s (10 minutes).",
        ),
    ] = False,
    author: operate.Author = None,
    config: flags.Config = None,
    socket: operate.Socket = None,
    address: operate.Address = None,
    json: flags.Json = False,
) -> None:
    """End activations: what waits is dropped, what runs is stopped. No dead letter, no retry.

    A retry goes on under an id of its own; the id it began with cancels it too. Our workers stop what
    they run; other workers cannot be told, and their result is ignored. Exit code 1 when something was
    not cancelled: unknown to this broker, ended already, or on its way elsewhere.

    ```
    taskd cancel 1f0c2d4a5b6c7d8e9f00112233445566 --reason 'customer closed the account'
    taskd cancel - --reason 'wrong template' < ids.txt
    ```
    """
    meant = _ids(ids)
    found = operate.ask(
        config,
        socket,
        address,
        lambda who: who.cancel(meant, reason, operate.or_user(author), even_unknown=even_if_unknown),
    )
    if json:
        from json import dumps

        typer.echo(dumps([_fields(one) for one in found], ensure_ascii=False))
    else:
        for one in found:
            typer.echo(f"{one.id}  {words(one)}")
    if not all(map(_is_cancelled, found)):
        raise typer.Exit(1)


def _ids(given: list[str]) -> list[str]:
    """Each once, in the order given; `-` stands for the words of stdin."""
    found: list[str] = []
    for id_ in given:
        found += typer.get_text_stream("stdin").read().split() if id_ == "-" else [id_]
    if not found:
        raise typer.BadParameter("expected ids on stdin, found none")
    return list(dict.fromkeys(found))


def _is_cancelled(one: CancelledActivation) -> bool:
    from taskd.wire.generated.taskd.v1 import CancelEffect as Effect

    if one.effect == Effect.ENDED:
        return one.outcome == "dropped"
    return one.effect in (Effect.DROPPED, Effect.STOPPING, Effect.UNTOLD, Effect.EXPECTED)


def words(one: CancelledActivation) -> str:
    """What became of it, for people."""
    from taskd.wire.generated.taskd.v1 import CancelEffect as Effect

    told = {
        Effect.DROPPED: f"was {one.state}: dropped",
        Effect.STOPPING: "was running: dropped, its worker is told to stop it",
        Effect.UNTOLD: "was with a worker that cannot be told: dropped, it may run to its end there, its "
        "result will be ignored",
        Effect.EXPECTED: "is not here yet: will be dropped if it comes while the broker remembers this "
        "(store.tombstone_ttl_s)",
        Effect.ENDED: f"ended before: {one.outcome}",
        Effect.LEAVING: f"cannot be cancelled any more: {_LEAVING.get(one.state, one.state)}",
        Effect.UNKNOWN: "unknown to this broker: still in the log, another broker's, or forgotten; give the "
        "order again later, or with --even-if-unknown",
    }.get(one.effect, "answered in a way that this version does not know; `taskd status` tells")
    if not one.newest:
        return told
    if one.state == "retry":
        return f"was about to be retried: dropped, and its retry {one.newest} too should it come here"
    return f"was retried as {one.newest}, which {told}"


_LEAVING = {
    "failure": "it failed, and its dead letter is being published",
    "expired": "it expired, and its dead letter is being published",
    "forwarded": "it is on its way to another topic",
}


def _fields(one: CancelledActivation) -> dict[str, object]:
    return {
        "id": one.id,
        "effect": (one.effect.name or "unknown").lower(),
        "cancelled": _is_cancelled(one),
        "state": one.state,
        "outcome": one.outcome,
        "newest": one.newest,
    }
