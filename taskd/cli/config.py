"""`taskd config check|show|schema|import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taskd.cli import flags
from taskd.cli.exits import Commands, stderr_console
from taskd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from taskd.config.schema import Section

HELP = """Check a configuration, show what holds, or make one.

```
taskd config check /etc/taskd/broker.yaml
taskd config show /etc/taskd/broker.yaml --only-changed
taskd config import /etc/taskbroker.yaml > broker.yaml
```
"""

app = typer.Typer(no_args_is_help=True, cls=Commands, help=HELP)

File = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of a broker or of a worker.")]
Worker = Annotated[
    bool | None,
    typer.Option(
        "--worker/--broker",
        help="Whose configuration it is. Default: a worker's when the file has `pools`.",
        show_default=False,
    ),
]


@app.command()
def check(file: File, worker: Worker = None) -> None:
    """Say whether a daemon would start with this file and the environment variables (TASKD_…) that are set.

    Every problem is told at once, each with its line and the nearest valid name. Files it names, such as
    certificates and the file of switches, are looked at too: what is wrong there is a warning. Nothing is
    connected to. Exit code 0 when it is valid, 78 when not.

    ```
    taskd config check conf/broker.yaml && systemctl reload taskd-broker
    ```
    """
    from taskd.config.files import troubles
    from taskd.config.loader import gather, misspelt_names, validated

    model = _model(file, worker)
    _warn(misspelt_names(model))
    _warn(troubles(validated(model, gather(model, file, {}))))
    typer.echo(f"{file}: a valid configuration of `taskd {_daemon(model)}`")


@app.command()
def show(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="YAML file; without one, defaults and the environment."),
    ] = None,
    worker: Worker = None,
    only_changed: Annotated[
        bool, typer.Option("--only-changed", help="Only what differs from the defaults.")
    ] = False,
    data_dir: flags.DataDir = None,
    rpc_port: flags.RpcPort = None,
    http_port: flags.HttpPort = None,
) -> None:
    """Print the configuration that holds as YAML: file < environment < flags, secrets hidden.

    Behind each value stands where it comes from: `default`, the file and line, the environment variable,
    or the command line. The three flags are those of `taskd broker`.

    ```
    taskd config show conf/broker.yaml --only-changed
    TASKD_STORE__MAX_PENDING_COUNT=5000 taskd config show
    ```
    """
    from taskd.config.effective import as_yaml, effective
    from taskd.config.loader import gather, misspelt_names, validated

    model = _model(file, worker)
    given = {"data_dir": data_dir, "rpc.port": rpc_port, "http.port": http_port}
    _warn(misspelt_names(model))
    merged = gather(model, file, given)
    typer.echo(as_yaml(effective(validated(model, merged), merged), only_changed=only_changed), nl=False)


@app.command()
def schema(
    worker: Annotated[bool, typer.Option("--worker", help="Of a worker's file, not of a broker's.")] = False,
) -> None:
    """Print the JSON Schema of a configuration file: every key with its unit, default and purpose.

    Editors complete and check with it; for those that use yaml-language-server, begin the file with
    `# yaml-language-server: $schema=broker.schema.json`.

    ```
    taskd config schema > broker.schema.json
    taskd config schema --worker > worker.schema.json
    ```
    """
    import json

    from taskd.config.editor_schema import json_schema
    from taskd.config.schema import BrokerConfig, WorkerConfig

    typer.echo(json.dumps(json_schema(WorkerConfig if worker else BrokerConfig), indent=2))


@app.command("import")
def import_(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="YAML file of an existing taskbroker, old or new style."),
    ] = None,
    environment: Annotated[
        bool,
        typer.Option("--environment", help="Take its variables (TASKBROKER_…) too; they win over the file."),
    ] = False,
) -> None:
    """Translate the configuration of an existing taskbroker: ours on stdout, warnings on stderr.

    What cannot be carried over is named with the reason. Defaults of theirs that differ from ours are
    written out. Secrets are carried over in plain text, so keep the result private.

    ```
    taskd config import /etc/taskbroker.yaml > broker.yaml
    taskd config check broker.yaml
    ```
    """
    import os

    from taskd.config.taskbroker import import_config

    if file is None and not environment:
        raise typer.BadParameter("give a FILE, or --environment, or both")
    found = import_config(file, os.environ if environment else {})
    _warn(found.warnings)
    typer.echo(found.yaml, nl=False)
    if found.problems:
        raise ConfigError("\n".join(["taskd would refuse the result:", *found.problems]))


def _model(file: Path | None, worker: bool | None) -> type[Section]:
    from taskd.config.schema import BrokerConfig, WorkerConfig
    from taskd.config.yaml_file import read_yaml

    if worker is None:
        worker = file is not None and "pools" in read_yaml(file).tree
    return WorkerConfig if worker else BrokerConfig


def _daemon(model: type[Section]) -> str:
    return model.__name__.removesuffix("Config").lower()


def _warn(warnings: Iterable[str]) -> None:
    console = stderr_console()
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
