"""One shape for our lines and those of libraries, on stderr."""

from __future__ import annotations

import json
import logging

import pytest
import structlog

from taskd.telemetry.logs import setup_logging


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_lines_on_stderr(capsys):
    setup_logging("info", "auto")
    structlog.get_logger("taskd.x").info("stored", rows=3, raw=b"\xff")
    logging.getLogger("some.library").warning("from %s", "afar")
    out, err = capsys.readouterr()
    ours, theirs = map(json.loads, err.splitlines())
    assert out == ""
    assert (ours["message"], ours["rows"], ours["logger"], ours["level"]) == ("stored", 3, "taskd.x", "info")
    assert (theirs["message"], theirs["logger"], theirs["level"]) == ("from afar", "some.library", "warning")
    assert ours["timestamp"].endswith("Z")


def test_levels(capsys):
    setup_logging("warning", "json")
    structlog.get_logger("taskd.x").info("quiet")
    structlog.get_logger("taskd.x").warning("loud")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["loud"]


def test_talkative_libraries_are_quiet_unless_debugging(capsys):
    setup_logging("info", "json")
    logging.getLogger("hypercorn.error").info("Running on")
    assert capsys.readouterr().err == ""
    setup_logging("debug", "json")
    logging.getLogger("hypercorn.error").info("Running on")
    assert "Running on" in capsys.readouterr().err


def test_a_second_setup_replaces_the_first(capsys):
    setup_logging("info", "json")
    setup_logging("info", "console")
    structlog.get_logger("taskd.x").info("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize("format", ["json", "console"])
def test_tracebacks_show_no_local_variables(capsys, format):
    setup_logging("info", format)
    secret = "hunter" + "2"
    try:
        int(secret[:0])
    except ValueError:
        structlog.get_logger("taskd.x").exception("failed")
    err = capsys.readouterr().err
    assert "ValueError" in err
    assert secret not in err
