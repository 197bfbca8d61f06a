"""One place makes exit codes of errors."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from taskd.cli.exits import Commands
from taskd.errors import ConfigError, StartupError, TaskdError


def run(error: BaseException):
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    @app.callback()
    def group() -> None: ...

    return CliRunner().invoke(app, ["fail"], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (TaskdError("it is broken"), 1, "taskd: it is broken\n"),
        (ConfigError("one\ntwo"), 78, "taskd: one\n       two\n"),
        (StartupError("port taken", exit_code=75), 75, "taskd: port taken\n"),
        (StartupError("[red]no markup[/red]"), 69, "taskd: [red]no markup[/red]\n"),
        (
            ExceptionGroup("", [ExceptionGroup("", [StartupError("a", exit_code=73)]), TaskdError("b")]),
            73,
            "taskd: a\ntaskd: b\n",
        ),
        (ExceptionGroup("", [TaskdError("same"), TaskdError("same")]), 1, "taskd: same\n"),
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("", [KeyboardInterrupt(), ValueError("on the way out")]), 130, ""),
        (BaseExceptionGroup("", [SystemExit(143), TaskdError("x")]), 143, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_sentence_and_code(error, code, said):
    result = run(error)
    assert (result.exit_code, result.stderr, result.stdout) == (code, said, "")


@pytest.mark.parametrize(
    "error", [ValueError("oops"), ExceptionGroup("", [TaskdError("x"), ValueError("oops")]), OSError(5, "io")]
)
def test_a_bug_shows_its_traceback(error):
    result = run(error)
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "this is a bug in taskd" in result.stderr


def test_wrong_usage_stays_with_typer():
    assert run(typer.BadParameter("not so")).exit_code == 2
    assert run(typer.Exit(5)).exit_code == 5
