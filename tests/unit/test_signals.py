"""Signals of a real process: ask, insist, end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

PROGRAM = """
import sys, trio
from taskd.signals import stop_on_signals
from taskd.telemetry.logs import setup_logging

setup_logging("info", "json")

async def main():
    async with stop_on_signals() as stop:
        print("up", flush=True)
        await stop.wait()
        print("stopping", flush=True)
        {after}

trio.run(main)
"""


def start(after: str) -> subprocess.Popen[str]:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(after=after)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    return program


def heard(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_exit_code_is_the_blocks(number):
    with start("pass") as program:
        program.send_signal(number)
        assert heard(program) == "stopping\n"
        assert program.wait(20) == 0
        assert program.stderr is not None
        assert "Traceback" not in program.stderr.read()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_cancels(number, code):
    with start("await trio.sleep_forever()") as program:
        program.send_signal(signal.SIGTERM)
        assert heard(program) == "stopping\n"
        program.send_signal(number)
        assert program.wait(20) == code


def test_an_error_while_stopping_now_is_told_and_the_code_stays():
    after = "\n        ".join(
        ["try:", "    await trio.sleep_forever()", "finally:", "    raise OSError('disk is gone')"]
    )
    with start(after) as program:
        program.send_signal(signal.SIGTERM)
        assert heard(program) == "stopping\n"
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == 143
        assert program.stderr is not None
        assert "disk is gone" in program.stderr.read()


def test_the_third_ends_what_holds_up_its_cancellation():
    after = "\n        ".join(
        [
            "try:",
            "    await trio.sleep_forever()",
            "finally:",
            "    print('held up', flush=True)",
            "    with trio.CancelScope(shield=True): await trio.sleep_forever()",
        ]
    )
    with start(after) as program:
        program.send_signal(signal.SIGTERM)
        assert heard(program) == "stopping\n"
        program.send_signal(signal.SIGTERM)
        assert heard(program) == "held up\n"
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == 143
