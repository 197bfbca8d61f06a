"""Real children, and tasks that misbehave: each costs one child at most, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from worker_pool_scene import (
    COMPLETE,
    CRASHED,
    FAILURE,
    RETRY,
    call,
    children,
    gone,
    open_descriptors,
    open_pool,
    remember_others,
    spawner,
)

import taskd.worker.entry_pipe as pipe
from taskd.errors import StartupError
from taskd.wire.frames import Assignment, Result
from taskd.worker.child import Piece
from taskd.worker.output import MAX_LINE_BYTES
from taskd.worker.process import ProcessSpawner

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _others_known() -> None:
    remember_others()


async def test_outcomes_of_well_behaved_tasks(tmp_path: Path) -> None:
    async with open_pool() as (broker, pool):
        path = tmp_path / "attempts"
        fine, wrong, asked, exhausted, unknown, undecodable, context = await broker.run(
            call("fine", "noop"),
            call("wrong", "raises", "déjà vu \udcff"[:7]),
            call("asked", "asks"),
            call("exhausted", "raises", "again", attempts=2),
            call("unknown", "nop"),
            call("undecodable", "noop", raw=b"\xc1"),
            call("context", "attempts", str(path), attempts=1),
        )
        assert fine == Result("fine", 1, COMPLETE)
        assert (wrong.status, wrong.reason, wrong.max_attempts, wrong.delay_on_retry_s) == (
            RETRY,
            "error",
            4,
            2,
        )
        assert "ValueError: déjà vu" in wrong.error
        assert "entry.py" not in wrong.error
        assert (asked.status, asked.reason, asked.delay_on_retry_s) == (RETRY, "requested", 11)
        assert (exhausted.status, exhausted.reason) == (FAILURE, "error")
        assert (unknown.status, unknown.reason) == (FAILURE, "unknown_task")
        assert "tests:noop" in unknown.error
        assert (undecodable.status, undecodable.reason) == (FAILURE, "undecodable")
        assert context.status is COMPLETE
        assert path.read_text() == "context 1 attempts me"
        assert pool.statistics().crashes == 0


async def test_not_an_activation_at_all() -> None:
    async with open_pool() as (broker, _):
        (result,) = await broker.run(Assignment("x", 1, b"\xff\xff", 1000))
        assert (result.status, result.reason) == (FAILURE, "undecodable")


async def test_errors_that_end_programs_end_only_the_task() -> None:
    async with open_pool() as (broker, pool):
        results = await broker.run(
            call("a", "system_exit"), call("b", "interrupted"), call("c", "unprintable"), call("d", "noop")
        )
        assert [result.status for result in results] == [FAILURE, FAILURE, FAILURE, COMPLETE]
        assert "SystemExit: as if this were a script" in results[0].error
        assert "Unprintable" in results[2].error
        assert pool.statistics().crashes == 0


async def test_prints_get_into_the_log_and_not_into_the_protocol() -> None:
    with capture_logs() as logs:
        async with open_pool() as (broker, pool):
            results = await broker.run(call("a", "prints"), call("b", "noop"), call("c", "logs"))
            assert [result.status for result in results] == [COMPLETE, COMPLETE, COMPLETE]
            assert pool.statistics().crashes == 0
    printed = [line for line in logs if line["event"] == "task output"]
    assert {line["id"] for line in printed} == {"a", "c"}
    by_stream = {
        line.get("stream"): (line["id"], line["log_level"], line["text"])
        for line in reversed(printed)
        if line["id"] == "a"
    }
    assert by_stream["stdout"] == ("a", "info", "x" * MAX_LINE_BYTES)
    assert by_stream["stderr"] == ("a", "warning", "y")
    (record,) = [line for line in printed if line["id"] == "c"]
    assert (record["source"], record["log_level"]) == ("plugin.part", "error")
    assert record["text"].startswith("it failed\nTraceback")
    assert record["text"].endswith("ValueError: why")


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("leaves", "exited with status 3"),
        ("segfaults", "SIGSEGV"),
        ("closes_everything", "closed its pipe"),
        ("writes_junk", "protocol"),
    ],
)
async def test_a_broken_child_costs_one_task(task: str, why: str) -> None:
    async with open_pool() as (broker, pool):
        bad, good = await broker.run(call("bad", task), call("good", "noop"))
        assert (bad.status, bad.reason) == (CRASHED, "crashed")
        assert why in bad.error or task == "closes_everything"
        assert good.status is COMPLETE
        assert pool.statistics().crashes == 1


async def test_the_deadline_holds_in_c_code_and_against_handlers() -> None:
    async with open_pool(slots=2) as (broker, pool):
        in_c, stubborn = await broker.run(
            call("a", "blocks_in_c", deadline_s=0.3), call("b", "retried_on_timeout", deadline_s=0.3)
        )
        assert (in_c.status, in_c.reason) == (FAILURE, "timeout")
        assert (stubborn.status, stubborn.reason, stubborn.delay_on_retry_s) == (RETRY, "timeout", 7)
        assert pool.statistics().timeouts == 2
        (after,) = await broker.run(call("c", "noop"))
        assert after.status is COMPLETE


async def test_what_a_task_started_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    async with open_pool() as (broker, _):
        (result,) = await broker.run(call("a", "starts_a_process", str(path), deadline_s=1.5))
        assert result.reason == "timeout"
        await gone(int(path.read_text()))


async def test_a_forked_copy_of_a_task_does_not_report() -> None:
    async with open_pool() as (broker, pool):
        results = await broker.run(
            call("a", "forks"), call("b", "noop"), call("c", "forks"), call("d", "noop")
        )
        assert {result.status for result in results} == {COMPLETE}
        assert pool.statistics().crashes == 0


async def test_a_forked_copy_gives_no_heartbeats_and_writes_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "opened by the copy"
    async with open_pool() as (broker, _):
        (result,) = await broker.run(call("a", "beats_in_a_fork", str(path)))
        assert (result.status, result.error) == (COMPLETE, "")
    assert path.read_bytes() == b""


async def test_signals_to_the_child_are_not_for_it() -> None:
    async with open_pool() as (broker, pool):
        (pid,) = children()
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        (result,) = await broker.run(call("a", "noop"))
        assert result.status is COMPLETE
        assert children() == [pid]
        assert pool.statistics().crashes == 0


async def test_an_idle_child_that_dies_is_replaced() -> None:
    async with open_pool() as (broker, pool):
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        (result,) = await broker.run(call("a", "noop"))
        assert result.status is COMPLETE
        assert children() != [pid]
        assert pool.statistics().crashes == 0


async def test_large_activations_pass(tmp_path: Path) -> None:
    async with open_pool() as (broker, _):
        path = tmp_path / "lines"
        results = await broker.run(
            *(call(str(number), "append", str(path), "x" * 2_900_000) for number in range(4))
        )
        assert {result.status for result in results} == {COMPLETE}
        assert path.stat().st_size == 4 * 2_900_001


async def test_work_taken_back_is_never_started(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    async with spawner().open() as child:
        slow = call("slow", "starts_a_process", str(tmp_path / "pid")).activation
        assert child.give([Piece(slow)])
        await child.receive()
        large = call("large", "append", str(path), "x" * 1_000_000).activation
        async with trio.open_nursery() as nursery:
            assert not child.give([Piece(large), Piece(large)])
            nursery.start_soon(child.flush)
            await trio.testing.wait_all_tasks_blocked()
            assert child.take_back() == 2
            assert child.take_back() == 2, "the tokens to skip them can be taken as well"
            nursery.cancel_scope.cancel()
        child.kill()
    assert not path.exists()


async def test_work_taken_back_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    async with spawner().open() as child:
        assert child.give([Piece(call(str(n), "append", str(path), str(n)).activation) for n in range(200)])
        taken = child.take_back()
        assert child.give([Piece(call("last", "append", str(path), "last").activation)])
        numbers: set[int] = set()
        with trio.fail_after(10):
            while 201 not in numbers:
                numbers |= {r.number for r in await child.receive() if isinstance(r, pipe.Done)}
        assert numbers == {*range(1, 200 - taken + 1), 201}
        assert path.read_text().split() == [*map(str, range(200 - taken)), "last"]


async def test_a_child_that_cannot_start_is_a_startup_error(tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(StartupError, match="exited with status"):
        async with ProcessSpawner(environment={"PYTHONHOME": "/nonexistent"}).open():
            pass
    assert open_descriptors() == before
    assert not children()


async def test_a_plugin_that_hangs_is_a_startup_error(tmp_path: Path) -> None:
    (tmp_path / "hangs_on_import.py").write_text("import time; time.sleep(600)")
    hanging = ProcessSpawner(
        modules=["hangs_on_import"],
        environment={**os.environ, "PYTHONPATH": str(tmp_path)},
        ready_within_s=1,
    )
    with pytest.raises(StartupError, match="not ready within 1 s"):
        async with hanging.open():
            pass
    assert not children()


async def test_a_module_that_fails_is_named_and_the_others_load() -> None:
    async with spawner("no_such_module", "worker_child_tasks").open() as child:
        assert "tests:noop" in map(str, child.ready.tasks)
        assert "internal:canary_task" in map(str, child.ready.tasks)
        assert "ModuleNotFoundError" in dict(child.ready.failures)["module no_such_module"]


async def test_children_die_with_their_worker(tmp_path: Path) -> None:
    program = (
        "import trio, sys\n"
        "from taskd.worker.process import ProcessSpawner\n"
        "async def main():\n"
        "    async with ProcessSpawner().open() as child:\n"
        "        print(child.pid, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    worker = await trio.lowlevel.open_process([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    async with worker.stdout:
        pid = int(await worker.stdout.receive_some())
    worker.kill()
    await worker.wait()
    await gone(pid)


async def test_children_are_started_by_a_thread_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child dies with the thread that started it (prctl(2)), and Trio's worker threads end when idle."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a thread was used")

    monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
    monkeypatch.setattr("trio._subprocess.trio.to_thread.run_sync", refuse)
    async with spawner().open() as child:
        assert "tests:noop" in map(str, child.ready.tasks)


async def test_the_child_loads_no_daemon_libraries() -> None:
    program = (
        "import sys, taskd.worker.entry\n"
        "unwanted = {'trio', 'grpclib', 'aiokafka', 'betterproto2', 'pydantic', 'asyncio'}\n"
        "print(sorted(unwanted & sys.modules.keys()))"
    )
    found = await trio.run_process([sys.executable, "-c", program], capture_stdout=True)
    assert found.stdout.strip() == b"[]"
