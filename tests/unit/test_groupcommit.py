from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import apsw
import outcome
import pytest
import trio
import trio.testing

from taskd.database import apply_in_one_transaction, hold_lock, open_database
from taskd.errors import StartupError, StoreError
from taskd.groupcommit import GroupCommit, InlineCommitter, Write, open_group_commit


class Gate:
    """An `apply` that waits to be let through, so that a test decides what gathers behind it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.batches: list[int] = []
        self.error: BaseException | None = None

    def apply(self, writes: Sequence[Write]) -> list[outcome.Outcome[object]]:
        self.entered.set()
        assert self.open.wait(10)
        self.batches.append(len(writes))
        if self.error is not None:
            raise self.error
        return [outcome.capture(write) for write in writes]


def answer(value: object) -> Callable[[], object]:
    return lambda: value


async def test_what_gathers_becomes_one_transaction() -> None:
    gate = Gate()
    sizes: list[int] = []
    answers: dict[int, object] = {}

    async def submit(committer: GroupCommit, number: int) -> None:
        answers[number] = await committer.submit(answer(number))

    async with (
        open_group_commit(gate.apply, name="test", on_batch=lambda size, _: sizes.append(size)) as committer,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(submit, committer, 0)
        while not gate.entered.is_set():  # the thread holds the first, alone
            await trio.lowlevel.checkpoint()
        for number in range(1, 101):
            nursery.start_soon(submit, committer, number)
        await trio.testing.wait_all_tasks_blocked()
        gate.open.set()
    assert answers == {number: number for number in range(101)}
    assert gate.batches == [1, 100]
    assert sizes == gate.batches


async def test_a_batch_is_bounded() -> None:
    gate = Gate()
    async with (
        open_group_commit(gate.apply, name="test", max_batch=4) as committer,
        trio.open_nursery() as nursery,
    ):
        for number in range(10):
            nursery.start_soon(committer.submit, answer(number))
        await trio.testing.wait_all_tasks_blocked()
        gate.open.set()
    assert sum(gate.batches) == 10
    assert max(gate.batches) <= 4


async def test_each_caller_gets_its_own_error() -> None:
    gate = Gate()
    gate.open.set()

    def fails() -> object:
        raise ValueError("mine")

    async with open_group_commit(gate.apply, name="test") as committer:
        with pytest.raises(ValueError, match="mine"):
            await committer.submit(fails)
        assert await committer.submit(answer(1)) == 1


@pytest.mark.parametrize("error", [StoreError("disk"), SystemExit(3)])
async def test_a_failed_transaction_fails_all_its_callers_and_the_thread_lives(error: BaseException) -> None:
    gate = Gate()
    gate.open.set()
    gate.error = error
    async with open_group_commit(gate.apply, name="test") as committer:
        with pytest.raises(type(error)):
            await committer.submit(answer(1))
        gate.error = None
        assert await committer.submit(answer(2)) == 2


async def test_lost_results_fail_loudly() -> None:
    async with open_group_commit(lambda writes: [], name="test") as committer:
        with pytest.raises(RuntimeError, match="expected 1 results of a transaction, found 0"):
            await committer.submit(answer(1))


async def test_cancelled_before_submission_nothing_happens() -> None:
    gate = Gate()
    gate.open.set()
    async with open_group_commit(gate.apply, name="test") as committer:
        with trio.CancelScope() as scope:
            scope.cancel()
            await committer.submit(answer(1))
    assert scope.cancelled_caught
    assert gate.batches == []


async def test_cancelled_after_submission_it_is_answered_all_the_same() -> None:
    gate = Gate()
    answers: list[object] = []
    async with open_group_commit(gate.apply, name="test") as committer:
        scope = trio.CancelScope()

        async def submit() -> None:
            with scope:
                answers.append(await committer.submit(answer(1)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(submit)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert answers == []
            gate.open.set()
    assert answers == [1]


async def test_closing_commits_what_was_submitted() -> None:
    gate = Gate()
    answers: list[object] = []

    async def submit(committer: GroupCommit) -> None:
        answers.append(await committer.submit(answer(1)))

    async with trio.open_nursery() as nursery, open_group_commit(gate.apply, name="test") as committer:
        for _ in range(5):
            nursery.start_soon(submit, committer)
        await trio.testing.wait_all_tasks_blocked()
        gate.open.set()
    assert answers == [1] * 5
    with pytest.raises(RuntimeError, match="submitted after close"):
        await committer.submit(answer(1))


async def test_inline(autojump_clock: trio.testing.MockClock) -> None:
    def fails() -> object:
        raise ValueError("mine")

    committer = InlineCommitter(lambda writes: [outcome.capture(write) for write in writes])
    assert await committer.submit(answer(1)) == 1
    with pytest.raises(ValueError, match="mine"):
        await committer.submit(fails)
    ran: list[int] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await committer.submit(lambda: ran.append(1))
    assert scope.cancelled_caught
    assert ran == []
    with trio.CancelScope() as scope:
        await committer.submit(scope.cancel)  # cancelled while it is written: answered first
        ran.append(2)
    assert ran == [2]


# ---- one transaction, a savepoint for each write


@pytest.fixture
def db(tmp_path: Path) -> apsw.Connection:
    db = open_database(tmp_path / "test.sqlite")
    db.execute("CREATE TABLE t (n INTEGER UNIQUE)")
    return db


def rows(db: apsw.Connection) -> list[object]:
    return [n for (n,) in db.execute("SELECT n FROM t ORDER BY n")]


def test_a_failing_write_undoes_only_itself(db: apsw.Connection) -> None:
    def half() -> None:
        db.execute("INSERT INTO t VALUES (2)")
        raise ValueError("half done")

    results = apply_in_one_transaction(
        db,
        [
            lambda: db.execute("INSERT INTO t VALUES (1)").fetchall(),
            half,
            lambda: db.execute("INSERT INTO t VALUES (1)"),
            lambda: db.execute("INSERT INTO t VALUES (3)").fetchall(),
        ],
    )
    assert [type(result) for result in results] == [
        outcome.Value, outcome.Error, outcome.Error, outcome.Value
    ]  # fmt: skip
    with pytest.raises(StoreError, match="ConstraintError: UNIQUE"):
        results[2].unwrap()
    assert rows(db) == [1, 3]


def test_what_fails_before_the_commit_undoes_everything(db: apsw.Connection) -> None:
    def fails() -> None:
        raise ValueError("no counters")

    with pytest.raises(ValueError, match="no counters"):
        apply_in_one_transaction(db, [lambda: db.execute("INSERT INTO t VALUES (1)")], before_commit=fails)
    assert rows(db) == []
    assert not db.in_transaction


def test_a_commit_that_fails_undoes_everything(db: apsw.Connection) -> None:
    db.set_commit_hook(lambda: True)
    with pytest.raises(StoreError):
        apply_in_one_transaction(db, [lambda: db.execute("INSERT INTO t VALUES (1)").fetchall()])
    db.set_commit_hook(None)
    assert rows(db) == []


def test_the_file_is_durable_and_gives_room_back(db: apsw.Connection) -> None:
    assert db.pragma("synchronous") == 2  # FULL
    assert db.pragma("journal_mode") == "wal"
    assert db.pragma("auto_vacuum") == 2  # INCREMENTAL


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot open the database") as refused:
        open_database(tmp_path / "file" / "test.sqlite")
    assert refused.value.exit_code == 73
    with (
        pytest.raises(StartupError, match="cannot write in") as refused,
        hold_lock(tmp_path / "file" / "lock"),
    ):
        pass
    assert refused.value.exit_code == 73


def test_a_lock_names_its_holder(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "lock"):
        with (
            pytest.raises(StartupError, match=r"another running broker \(process \d+\)") as refused,
            hold_lock(tmp_path / "lock"),
        ):
            pass
        assert refused.value.exit_code == 75
    with hold_lock(tmp_path / "lock"):
        pass
