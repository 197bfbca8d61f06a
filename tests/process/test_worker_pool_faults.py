"""What tasks can do to their child, with real processes: each is ended or told of, and its slot works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from worker_pool_scene import (
    COMPLETE,
    CRASHED,
    FAILURE,
    RETRY,
    Broker,
    call,
    gone,
    open_pool,
    remember_others,
)

pytestmark = [pytest.mark.process, pytest.mark.slow]

QUICK = {"exception_grace_s": 0.3, "terminate_grace_s": 0.3}
SLOT_IS_BACK_WITHIN_S = 15.0  # of a machine that is busy; alone it is less than one


@pytest.fixture(autouse=True)
def _others_known() -> None:
    remember_others()


async def works(broker: Broker, folder: Path, slots: int = 1) -> None:
    """Every slot is back: so many tasks run at the same time."""
    meeting = str(folder / "meeting")
    with trio.fail_after(SLOT_IS_BACK_WITHIN_S):
        results = await broker.run(*(call(f"after {n}", "meets", meeting, slots) for n in range(slots)))
        assert {result.status for result in results} == {COMPLETE}


# ---- the deadline


async def test_the_deadline_is_an_exception_first(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    async with open_pool(**QUICK) as (broker, pool):
        (result,) = await broker.run(call("a", "sleeps", str(notes), deadline_s=0.3))
        assert (result.status, result.reason, result.delay_on_retry_s) == (RETRY, "timeout", 7)
        assert "time.sleep(600)" in result.error, "the traceback says where it was"
        assert "ProcessingDeadlineExceeded" in result.error
        pid = notes.read_text().split()[-1]
        await broker.run(call("b", "whoami", str(notes)))
        assert notes.read_text().split()[-1] == pid, "its child lives on"
        assert (pool.statistics().timeouts, pool.statistics().crashes) == (1, 0)


async def test_no_task_outlives_its_deadline(tmp_path: Path) -> None:
    ended_by = {
        "cleans_up_badly": "ValueError: from the clean-up",
        "catches_errors": "ProcessingDeadlineExceeded",
        "backtracks": "ProcessingDeadlineExceeded",
        "swallows_everything": "killed by SIGTERM",
        "counts_in_c": "killed by SIGKILL",
        "ignores_signals": "killed by SIGKILL",
    }
    with capture_logs() as logs:
        async with open_pool(3, **QUICK) as (broker, pool):
            with trio.fail_after(2 * SLOT_IS_BACK_WITHIN_S):
                results = await broker.run(*(call(task, task, deadline_s=0.3) for task in ended_by))
            for result in results:
                assert (result.status, result.reason) == (FAILURE, "timeout"), result.id
                assert ended_by[result.id] in result.error
            await works(broker, tmp_path, slots=3)
            assert (pool.statistics().timeouts, pool.statistics().crashes) == (6, 0)
    lines: list[Any] = [line for line in logs if line["event"] == "task output"]
    for task in ("counts_in_c", "swallows_everything"):
        assert any(line["id"] == task and f"in {task}" in line["text"] for line in lines), (
            "it says where it was"
        )


async def test_a_task_that_takes_the_signals_keeps_them_for_itself_only(tmp_path: Path) -> None:
    async with open_pool(**QUICK) as (broker, _):
        first, second = await broker.run(
            call("a", "takes_the_signals_and_ends"), call("b", "catches_errors", deadline_s=0.3)
        )
        assert first.status is COMPLETE
        assert "ProcessingDeadlineExceeded" in second.error


# ---- stopped


async def test_what_is_stopped_gets_an_exception_first(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    async with open_pool(**QUICK) as (broker, pool):
        await broker.stop(call("a", "sleeps", str(notes)), writes=notes)
        await broker.run(call("b", "whoami", str(notes)))
        _, cancelled, after = notes.read_text().splitlines()
        assert cancelled == f"cancelled in {after}", "its child lives on"
        assert "a" not in broker.results
        assert pool.statistics().crashes == 0


async def test_what_is_stopped_ends(tmp_path: Path) -> None:
    async with open_pool(2, **QUICK) as (broker, pool):
        await broker.stop(call("a", "swallows_everything", deadline_s=600))
        await broker.stop(call("b", "counts_in_c", deadline_s=600))
        await works(broker, tmp_path, slots=2)
        assert not broker.results
        assert pool.statistics().crashes == 0


# ---- what tasks start


@pytest.mark.long
async def test_what_a_task_started_ends_with_it(tmp_path: Path) -> None:
    ways = ("exit", "overdue", "swallows", "exit alone", "overdue alone", "swallows alone")
    calls = [
        call(way, "leaves_a_process", str(tmp_path / way), "alone" in way, way.split()[0], deadline_s=1)
        for way in ways
    ]
    async with open_pool(3, **QUICK) as (broker, _):
        for result in await broker.run(*calls):
            assert result.status is (CRASHED if result.id.startswith("exit") else FAILURE)
        await works(broker, tmp_path, slots=3)
        for way in ways:
            await gone(int((tmp_path / way).read_text()))


async def test_what_a_task_started_has_its_time_to_end(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    async with open_pool(exception_grace_s=0.3, terminate_grace_s=5) as (broker, _):
        (result,) = await broker.run(call("a", "starts_a_careful_process", str(path), deadline_s=1))
        assert result.reason == "timeout"
        await gone(int(path.read_text().split()[0]))
        assert path.read_text().endswith("cleaned up")


@pytest.mark.long
async def test_a_daemon_that_a_task_forked_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    async with open_pool(**QUICK) as (broker, _):
        (result,) = await broker.run(call("a", "forks_a_session", str(path), deadline_s=0.5))
        assert result.reason == "timeout"
        await works(broker, tmp_path)
        await gone(int(path.read_text()))


async def test_what_a_task_leaves_running_does_not_keep_its_slot(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    async with open_pool(**QUICK, max_tasks_per_child=1) as (broker, pool):
        (result,) = await broker.run(call("a", "leaves_a_process", str(path), False, "returns"))
        assert result.status is COMPLETE
        await works(broker, tmp_path)
        await gone(int(path.read_text()))
        assert pool.statistics().crashes == 0


# ---- memory


async def test_a_task_beyond_the_memory_limit_gets_an_error(tmp_path: Path) -> None:
    async with open_pool(memory_limit_bytes=300 * 2**20) as (broker, pool):
        (result,) = await broker.run(call("a", "allocates"))
        assert (result.status, result.reason) == (FAILURE, "error")
        assert "MemoryError" in result.error
        await works(broker, tmp_path)
        assert pool.statistics().crashes == 0


# ---- ends


async def test_however_a_task_ends_its_child_it_is_told(tmp_path: Path) -> None:
    told = {
        "leaves_as_if_well": "exited with status 0",
        "closes_all_and_goes_on": "closed its pipe",
        "is_killed_from_elsewhere": "signal SIGKILL, not by its worker",
        "segfaults": "SIGSEGV",
    }
    async with open_pool(4) as (broker, pool):
        with trio.fail_after(SLOT_IS_BACK_WITHIN_S):
            results = await broker.run(*(call(task, task, deadline_s=600) for task in told))
        for result in results:
            assert (result.status, result.reason) == (CRASHED, "crashed")
            assert told[result.id] in result.error
        (memory,) = [word for word in results[2].error.split("; ") if "MiB" in word]
        assert int("".join(filter(str.isdigit, memory))) >= 64
        await works(broker, tmp_path, slots=4)
        assert pool.statistics().crashes == 4


# ---- output


async def test_printing_very_much_neither_blocks_nor_fills_the_log(tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with open_pool() as (broker, pool):
            (result,) = await broker.run(call("a", "prints_much", 100, deadline_s=60))
            assert result.status is COMPLETE
            await works(broker, tmp_path)
            assert pool.statistics().crashes == 0
    printed: list[Any] = [line for line in logs if line["event"] == "task output"]
    dropped: list[Any] = [line for line in logs if line["event"].startswith("output dropped")]
    logged_bytes = sum(len(line["text"]) + 1 for line in printed)
    assert logged_bytes < 2 * 2**20
    dropped_bytes = sum(line["dropped_bytes"] for line in dropped)
    assert logged_bytes + dropped_bytes == pytest.approx(100 * 2**20 // 100 * 100, rel=0.01)
    assert {line["id"] for line in printed} == {"a"}
