"""Where errors become exit codes, for every command.

| what happened | exit code | on stderr |
|---|---|---|
| a `TaskdError`, alone or in a group | its `exit_code` | one red sentence |
| Ctrl-C in a command that is no daemon | 130 | nothing |
| a first signal to a daemon, at whatever moment (see `taskd.cli.early`) | 0 | nothing |
| a second signal (see `taskd.signals`) | 130, 143 | nothing |
| anything else: a bug | 70 | the traceback |

Wrong usage of a command is typer's to report, with exit code 2.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from taskd.errors import TaskdError

if TYPE_CHECKING:
    from rich.console import Console

EX_SOFTWARE = 70
EX_INTERRUPTED = 130


class Commands(TyperGroup):
    """A group of commands whose errors become exit codes."""

    def invoke(self, ctx: Any) -> Any:
        with exit_codes():
            return super().invoke(ctx)


@contextmanager
def exit_codes() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if _is_typers(error) or isinstance(error, SystemExit):
            raise
        raise typer.Exit(_report(error)) from None


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def complain(message: str) -> None:
    """Print one sentence in red on stderr; further lines are indented under the first."""
    console = stderr_console()
    first, *rest = message.splitlines() or [""]
    lines = [f"taskd: {first}", *(f"       {line}" for line in rest)]
    console.print("\n".join(lines), style="red", markup=False, soft_wrap=True)


def _is_typers(error: BaseException) -> bool:
    # typer carries its own copy of click since 0.26, so click's base class has no public name to ask for.
    is_usage = hasattr(error, "format_message") and hasattr(error, "exit_code")
    closed_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE  # `taskd status ... | head`
    return isinstance(error, (typer.Exit, typer.Abort)) or is_usage or closed_pipe


def _report(error: BaseException) -> int:
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, SystemExit):
            return leaf.code if isinstance(leaf.code, int) else 1
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return EX_INTERRUPTED
    ours = [leaf for leaf in leaves if isinstance(leaf, TaskdError)]
    if len(ours) < len(leaves):
        traceback.print_exception(error)
        complain("this is a bug in taskd; please report it with the lines above")
        return EX_SOFTWARE
    for message in dict.fromkeys(map(str, ours)):
        complain(message)
    return ours[0].exit_code


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
