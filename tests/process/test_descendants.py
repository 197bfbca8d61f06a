"""Finding what a process started, wherever it went."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from taskd.worker import descendants

pytestmark = [pytest.mark.process, pytest.mark.slow]

# Prints who it is, and ends when its standard input does.
WAITS = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
# Starts one like that in a session of its own, and ends at once.
LEAVES = (
    f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {WAITS!r}], start_new_session=True)"
)


class Started:
    def __init__(self, program: str, mark: str | None) -> None:
        environment = {**os.environ} if mark is None else {**os.environ, descendants.MARK: mark}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.pid = int(self.process.stdout.readline())  # of whoever waits

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[type[Started]]:
    started: list[Started] = []

    class Remembered(Started):
        def __init__(self, program: str, mark: str | None) -> None:
            super().__init__(program, mark)
            started.append(self)

    yield Remembered
    for one in started:
        one.close()


def test_by_who_started_whom(start: type[Started]) -> None:
    child = start(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAITS!r}])", None)
    assert child.pid in descendants.of(os.getpid())
    assert descendants.of(child.process.pid) == [child.pid]
    assert descendants.of(child.pid) == []


def test_a_mark_leads_to_those_whose_parent_is_gone(start: type[Started]) -> None:
    orphan, other, unmarked = start(LEAVES, "one"), start(WAITS, "on"), start(WAITS, None)
    assert descendants.marked("one") == [orphan.pid]
    assert descendants.living([orphan.pid, other.pid, unmarked.pid], "on") == [other.pid]


def test_only_those_that_carry_the_mark_are_killed(start: type[Started]) -> None:
    ours, orphan, other = start(WAITS, "two"), start(LEAVES, "two"), start(WAITS, "three")
    orphan.process.wait()  # who started it carries the mark too, and is about to end
    assert descendants.kill("two") == 2
    assert ours.process.wait() == -signal.SIGKILL
    assert orphan.process.stdout is not None
    assert orphan.process.stdout.read() == b""  # now it is gone: a signal that was sent takes a moment
    assert descendants.marked("two") == []
    assert descendants.marked("three") == [other.pid]
    assert descendants.kill("nobody's") == 0
    assert orphan.pid not in descendants.marked("two")


def test_who_is_gone_is_nobody() -> None:
    assert descendants.of(2**22 + 1) == []
    assert descendants.living([2**22 + 1], "one") == []
