"""Where `taskd` begins: what is slow to import comes after the signals are in hand."""

from __future__ import annotations

import sys

from taskd.cli import early


def main() -> None:
    """The console script; also `python -m taskd`."""
    if sys.argv[1:2] and sys.argv[1] in early.DAEMONS:
        early.keep_signals()

    from taskd.cli.app import app

    app(prog_name="taskd")
