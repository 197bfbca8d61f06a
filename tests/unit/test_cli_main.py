"""What the commands say and how they end, up to where a daemon would begin."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
import typer
from typer.testing import CliRunner

from taskd.cli.app import app

WIDE = {"COLUMNS": "160", "TERM": "dumb"}


@pytest.fixture(autouse=True)
def restored_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def run(*arguments: str, **environ: str):
    return CliRunner().invoke(app, list(arguments), env=WIDE | environ)


def test_help_names_every_command_and_teaches():
    said = run("--help").stdout
    for word in ("broker", "worker", "dev", "submit", "status", "plugins", "taskd submit demo:add"):
        assert word in said
    for command in ("broker", "worker", "dev", "submit", "status"):
        assert f"taskd {command} " in run(command, "--help").stdout


def commands_of(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_shows_how_it_is_used_and_what_its_options_are_for():
    for path, command in commands_of(typer.main.get_command(app)):
        assert f"taskd {' '.join(path)}" in run(*path, "--help").stdout.replace("Usage: taskd", ""), path
        assert [option.name for option in command.params if not getattr(option, "help", "")] == [], path


def test_version():
    assert run("version").stdout == "0.1.0\n"
    assert run("--version").stdout == "taskd 0.1.0\n"


def test_problems_of_the_configuration_come_all_at_once(tmp_path):
    path = tmp_path / "broker.yaml"
    path.write_text("store: {max_pending_cout: 5}\nrpc: {port: x}\n")
    result = run("broker", "--config", str(path))
    assert result.exit_code == 78
    assert result.stderr == (
        f"taskd: `rpc.port`: expected a whole number, found 'x' ({path}:2)\n"
        f"       unknown key `store.max_pending_cout`; did you mean `max_pending_count`? ({path}:1)\n"
    )


def test_a_flag_does_not_make_up_its_pool(tmp_path):
    path = tmp_path / "worker.yaml"
    path.write_text("pools: {mail: {slots: 1}}\n")
    result = run("worker", "--pool", "mial", "--config", str(path), "--slots", "3")
    assert result.exit_code == 78
    assert "no pool `mial` in the configuration; it has mail; did you mean `mail`?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("worker", "--broker", "nowhere"), 78, "expected HOST:PORT, such as 127.0.0.1:50051"),
        (("worker", "--protocol", "poll"), 78, "expected 'stream', 'pull' or 'push', found 'poll'"),
        (("worker", "--protocol", "push", "--broker", "a:1", "--broker", "b:1"), 78, "brokers must be one"),
        (("status", "x", "--broker", "nowhere"), 78, "expected HOST:PORT, such as 127.0.0.1:50051"),
        (("broker", "--config", "/nonexistent.yaml"), 78, "/nonexistent.yaml: no such file"),
        (("broker", "--rpc-port", "70000"), 2, "less than or equal to 65535"),
        (("submit", "demo:noop", "--kwargs", "{}", "--file", "-"), 2, "not both"),
        (("submit", "demo:noop", "--file", "/nonexistent"), 1, "/nonexistent: cannot be read"),
        (("submit", "demo:nop"), 1, "nearest: demo:noop"),
        (("submit", "noop"), 1, "expected NAMESPACE:TASK, such as demo:add, found 'noop'"),
        (("submit", "demo:add", "--kwargs", '{"a": 1}'), 1, "missing a required argument: 'b'"),
    ],
)
def test_what_cannot_be_is_a_sentence(arguments, code, said):
    result = run(*arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_nobody_there():
    result = run("status", "x", "--broker", "127.0.0.1:1")
    assert result.exit_code == 69
    assert "127.0.0.1:1" in result.stderr


@pytest.mark.slow
def test_what_could_not_be_sent_is_told():
    result = run("submit", "demo:noop", "--broker", "127.0.0.1:1", TASKD_TIMEOUT_S="0.3")
    assert result.exit_code == 1
    assert "was not scheduled" in result.stderr
    assert "not sent      1" in result.stdout


@pytest.mark.process
def test_help_loads_nothing_heavy():
    program = (
        "import sys; from taskd.cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('trio', 'grpclib', 'aiokafka', 'pydantic', 'apsw', 'betterproto2') "
        "if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.process
def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "taskd", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "taskd 0.1.0\n")
