"""kill -9 of a process that appends to the embedded log: whatever was answered is there afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taskd.clock import SystemClock
from taskd.log.base import Partition
from taskd.log.embedded import open_embedded

APPENDER = """
import os, sys
from pathlib import Path
import trio
from taskd.clock import SystemClock
from taskd.log.base import Outgoing, Partition
from taskd.log.embedded import open_embedded

async def append(log, first):
    for number in range(first, 10**9, 8):
        (position,) = await log.append([Outgoing("t", b"%d" % number)])
        os.write(1, b"%d %d\\n" % (position.offset, number))

async def commit(log):
    async with log.open_reader(["t"], "g") as reader:
        while True:
            records = await reader.read_batch(100, 10)
            await reader.commit({Partition("t", 0): records[-1].offset + 1})
            os.write(1, b"committed %d\\n" % (records[-1].offset + 1))

async def main():
    async with open_embedded(Path(sys.argv[1]), clock=SystemClock()) as log, trio.open_nursery() as nursery:
        nursery.start_soon(commit, log)
        for first in range(8):
            nursery.start_soon(append, log, first)

trio.run(main)
"""


def appended_until_killed(data_dir: Path, lines: int) -> list[bytes]:
    """What the appender said: `lines` lines, and those that were in the pipe when the signal came."""
    process = subprocess.Popen([sys.executable, "-c", APPENDER, str(data_dir)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as said:
        first = [said.readline() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        rest = said.read().splitlines()
    process.wait()
    return first + rest


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 300, 2_000])
async def test_nothing_acknowledged_is_lost(tmp_path: Path, lines: int) -> None:
    said = appended_until_killed(tmp_path, lines)
    commits = [int(line.split()[1]) for line in said if line.startswith(b"committed")]
    answered = dict(line.split() for line in said if line.strip() and not line.startswith(b"committed"))
    async with open_embedded(tmp_path, clock=SystemClock()) as log:
        async with log.open_reader(["t"], "another") as reader:
            found = {}
            while records := await reader.read_batch(1_000, 0):
                found.update({record.offset: record.value for record in records})
        async with log.open_reader(["t"], "g") as reader:
            committed = await reader.committed(Partition("t", 0))
    assert answered or commits
    assert {offset: found[int(offset)] for offset in answered} == answered
    assert sorted(found) == list(range(len(found)))
    assert (committed or 0) >= max(commits, default=0)
