"""`taskd plugins list`."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from taskd.cli.exits import complain

if TYPE_CHECKING:
    from taskd.tasks.registry import LoadedPlugin

UNWRAPPED_COLUMNS = 240  # where nobody looks at a terminal, a row stays on its line

app = typer.Typer(no_args_is_help=True, help="Show the plugins that are installed here.")


@app.command("list")
def list_plugins(
    traceback: Annotated[bool, typer.Option(help="Show where a plugin failed.")] = False,
) -> None:
    """List the tasks of every installed plugin: pip packages with an entry point in `taskd.tasks`.

    Exit code 1 when one of them cannot be loaded; the others still work.

    ```
    taskd plugins list
    taskd plugins list --traceback
    ```
    """
    from taskd.tasks.registry import load_plugins

    loaded = load_plugins()
    _print_table(loaded)
    failed = [plugin for plugin in loaded if plugin.error is not None]
    for plugin in failed:
        complain(f"{plugin} failed to load: {type(plugin.error).__name__}: {plugin.error}")
        if traceback:
            typer.echo(plugin.traceback, err=True)
    if failed:
        raise typer.Exit(1)


def _print_table(loaded: list[LoadedPlugin]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not loaded:
        typer.echo("no plugin is installed; `pip install taskd-demo` brings the smallest one")
        return
    table = Table("distribution", "version", "entry point", "application", "namespace", "task", box=None)
    for plugin in loaded:
        about = (plugin.distribution, plugin.version, plugin.entry_point)
        for row in _rows(plugin):
            table.add_row(*(Text(cell) for cell in (*about, *row)))
    console = Console(highlight=False)
    console.print(table, width=None if console.is_terminal else UNWRAPPED_COLUMNS)


def _rows(plugin: LoadedPlugin) -> list[tuple[str, str, str]]:
    from taskd.tasks.registry import registered

    applications: dict[str, list[str]] = defaultdict(list)
    for task in registered():
        applications[f"{task.namespace.name}:{task.name}"].append(task.namespace.application)
    rows = []
    for name in plugin.tasks:
        namespace, _, taskname = name.partition(":")
        rows += [(application or "''", namespace, taskname) for application in applications[name]]
    if not rows:
        return [("", "", "failed to load" if plugin.error else "registers no task")]
    return rows
