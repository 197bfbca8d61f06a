"""What a real child notes of its tasks is what its worker tells and judges by."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
from worker_pool_scene import COMPLETE, CRASHED, call, open_pool, remember_others, spawner

from taskd.wire.frames import Result
from taskd.worker import entry_note, slot
from taskd.worker import entry_pipe as pipe
from taskd.worker.child import Piece

pytestmark = [pytest.mark.process, pytest.mark.slow]

WRITER = """
import mmap, sys
from taskd.worker import entry_note, entry_pipe as pipe
shared = mmap.mmap(int(sys.argv[1]), entry_note.NOTE_BYTES)
number = 0
print(flush=True)
while True:
    number += 1
    verdict = pipe.Verdict(1 + number % 4, "timeout", "", number, number)
    entry_note.write(shared, pipe.Started(number, verdict, bool(number % 2)), number)
"""


@pytest.fixture(autouse=True)
def _others_known() -> None:
    remember_others()


def freeze(seconds: float) -> None:
    """Nothing runs in this process, as when it is stopped: its child goes on."""
    time.sleep(seconds)


def test_what_is_read_is_one_note_while_another_process_writes() -> None:
    fd = os.memfd_create("notes")
    os.ftruncate(fd, entry_note.NOTE_BYTES)
    command = [sys.executable, "-c", WRITER, str(fd)]
    with subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE) as writer:
        shared = mmap.mmap(fd, entry_note.NOTE_BYTES)
        os.close(fd)
        assert writer.stdout is not None
        writer.stdout.readline()
        newest = 0
        for _ in range(50_000):
            read = entry_note.read(shared)
            if read is not None:
                number = read.number
                assert read[:3] == (number, (1 + number % 4, "timeout", "", number, number), number % 2)
                assert number >= newest
                newest = number
        writer.kill()
    assert newest
    shared.close()


async def test_a_task_that_lasts_is_told_with_its_true_start() -> None:
    async with spawner().open() as child:
        quick = call("quick", "noop").activation
        assert child.give([Piece(quick), Piece(quick), Piece(call("a", "naps", 0.4).activation)])
        told: list[pipe.Report] = []
        while pipe.Done not in map(type, told[-1:]) or told[-1].number < 3:  # type: ignore[union-attr]
            told += await child.receive()
    ends = [report.number for report in told if isinstance(report, pipe.Done)]
    assert ends == [1, 2, 3]
    last, end = told[-2:]
    assert isinstance(last, pipe.Started)
    assert isinstance(end, pipe.Done)
    assert (last.number, last.on_timeout) == (3, pipe.Verdict(2, "timeout"))
    assert 0.001 <= last.ago_s <= end.duration_us / 1e6


async def test_a_crash_is_of_the_task_that_ran_and_of_no_other_that_ended_just_before() -> None:
    async with open_pool() as (broker, pool):
        await broker.run(*(call(f"teach {number}", "noop") for number in range(100)))
        before = [call(f"before {number}", "noop") for number in range(50)]
        after = [call(f"after {number}", "noop") for number in range(50)]
        results = await broker.run(*before, call("bad", "segfaults"), *after)
        assert {result.id: result.status for result in results if result.status is not COMPLETE} == {
            "bad": CRASHED
        }
        assert pool.statistics().crashes == 1
        assert call("bad", "segfaults").lease in broker.started, "the broker counts crashes by starts"


async def test_the_deadline_does_not_run_while_reports_wait_for_the_worker() -> None:
    async with spawner().open() as child:
        fcntl.fcntl(child._ends.reports, fcntl.F_SETPIPE_SZ, 4096)
        bad = Piece(call("bad", "raises", "x" * 1000).activation, deadline_s=0.5)
        nap = Piece(call("nap", "naps", 0.05).activation, deadline_s=0.5)
        child.give([*[bad] * 40, *[nap] * 3])
        await child.flush()
        freeze(1.0)
        ends: list[pipe.Done] = []
        with trio.fail_after(30):
            while len(ends) < 43:
                ends += [report for report in await child.receive() if isinstance(report, pipe.Done)]
    assert [end.number for end in ends if end.verdict.reason == "timeout"] == []


async def test_a_worker_that_slept_does_not_blame_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "BEGIN_WITHIN_S", 0.5)
    async with open_pool() as (broker, pool):
        await broker.run(*(call(f"teach {number}", "noop") for number in range(100)))
        calls = [call(f"quick {number}", "naps", 0.0003) for number in range(100)]
        results: list[Result] = []

        async def run() -> None:
            results.extend(await broker.run(*calls, call("long", "naps", 1.5), call("behind", "noop")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.012)  # some of the quick ones are over
            freeze(0.8)
        assert {result.status for result in results} == {COMPLETE}
        assert pool.statistics().crashes == 0


async def test_what_is_stopped_around_its_start_ends(tmp_path: Path) -> None:
    async with open_pool(exception_grace_s=0.3, terminate_grace_s=0.3) as (broker, pool):
        await broker.run(call("warm", "noop"))
        for step in range(20):
            stopped = call(f"stopped {step}", "sleeps", str(tmp_path / "notes"), deadline_s=600)
            with trio.fail_after(30):
                await broker.stop_after(stopped, step * 0.0003)
                (result,) = await broker.run(call(f"next {step}", "noop"))
            assert result.status is COMPLETE
        assert not broker.results
        assert pool.statistics().crashes == 0
