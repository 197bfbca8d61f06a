"""Flags that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="YAML file; without one, defaults and the environment (TASKD_…) hold.",
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the store and the embedded log.", show_default=False),
]
RpcPort = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, metavar="PORT", help="Port for workers and producers; 0 takes a free one."
    ),
]
HttpPort = Annotated[
    int | None,
    typer.Option(min=0, max=65535, metavar="PORT", help="Port for health and metrics; 0 takes a free one."),
]
Slots = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Child processes; each runs one task at a time.")
]
Broker = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The broker to ask. Default: TASKD_BROKER, or 127.0.0.1:50051.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
