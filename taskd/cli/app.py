"""The `taskd` command: flags become a configuration, something runs, an exit code comes back.

Whatever is slow to import is imported inside the commands, so that `taskd --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from taskd import __version__
from taskd.cli import bench, cancel, config, daemons, inspect, operate, plugins, store, submit
from taskd.cli.exits import Commands

HELP = """Runs functions later, reliably.

Try it on this machine: **taskd dev** in one terminal, and in another

```
taskd plugins list
taskd submit demo:add --kwargs '{"a": 2, "b": 3}' --wait
```
"""

app = typer.Typer(
    name="taskd",
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(daemons.broker_app, name="broker", rich_help_panel="Run")
app.command(rich_help_panel="Run")(daemons.worker)
app.command(rich_help_panel="Run")(daemons.dev)
app.command(rich_help_panel="Use")(submit.submit)
app.command(rich_help_panel="Use")(inspect.status)
app.add_typer(plugins.app, name="plugins", rich_help_panel="Use")
app.command(rich_help_panel="Operate")(operate.pause)
app.command(rich_help_panel="Operate")(operate.resume)
app.add_typer(operate.killswitch, name="killswitch", rich_help_panel="Operate")
app.command(rich_help_panel="Operate")(operate.switches)
app.command(rich_help_panel="Operate")(cancel.cancel)
app.command(rich_help_panel="Operate")(store.backup)
app.command(rich_help_panel="Operate")(store.restore)
app.command(rich_help_panel="Operate")(store.recover)
daemons.broker_app.command()(store.evacuate)
app.add_typer(config.app, name="config", rich_help_panel="Run")
app.add_typer(bench.app, name="bench", rich_help_panel="Use")


@app.command(rich_help_panel="Use")
def version() -> None:
    """Print the version.

    ```
    taskd version
    ```
    """
    typer.echo(__version__)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"taskd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass
