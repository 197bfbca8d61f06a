"""What a child prints becomes log lines: of the right task, bounded in length and number, never blocking."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from taskd.worker.output import BUDGET_BYTES, LINE_BYTES, MAX_LINE_BYTES, Budget, Stream

NAMES = {0: None, 1: "one", 2: "two"}


class Pipe:
    """A child's standard output, and what became of it."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self.budget = Budget()
        self.stream = Stream(self._read, "stdout", 20, self.budget)

    def prints(self, data: bytes, now: float = 0.0) -> list[Any]:
        """The lines that `data` brings into the log, as (id, text)."""
        return [(line["id"], line["text"]) for line in self.logs(data, now)]

    def logs(self, data: bytes, now: float = 0.0) -> list[Any]:
        with capture_logs() as logs:
            while data:
                data = data[os.write(self._write, data) :]
                self.stream.drain(NAMES.get, now)
        return logs

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    it = Pipe()
    yield it
    it.close()


def test_a_line_is_logged_when_it_is_complete(pipe: Pipe) -> None:
    assert pipe.prints(b"\x1e1\nhello") == []
    assert pipe.prints(b" world\nnext\n\nla") == [("one", "hello world"), ("one", "next")]
    with capture_logs() as logs:
        pipe.stream.finish()
    assert [line["text"] for line in logs] == ["la"]


def test_a_line_that_its_task_did_not_end_is_still_its_own(pipe: Pipe) -> None:
    assert pipe.prints(b"\x1e1\nno end\x1e2\nother\n") == [("one", "no end"), ("two", "other")]


def test_a_line_without_end_belongs_to_the_task_that_ran(pipe: Pipe) -> None:
    running = ["one"]
    with capture_logs() as logs:
        os.write(pipe._write, b"no end")
        pipe.stream.drain(lambda number: running[0], 0.0)
        running[0] = "two"
        os.write(pipe._write, b"other\n")
        pipe.stream.drain(lambda number: running[0], 0.0)
    assert [(line["id"], line["text"]) for line in logs] == [("one", "no end"), ("two", "other")]


def test_lines_are_bounded_and_what_is_cut_is_counted(pipe: Pipe) -> None:
    ((id_, text),) = pipe.prints(b"x" * 50_000 + b"\nshort"[:1])
    assert (id_, text) == (None, "x" * MAX_LINE_BYTES)
    assert pipe.budget.dropped_bytes == 50_000 - MAX_LINE_BYTES
    assert pipe.prints(b"short\n") == [(None, "short")]


def test_beyond_the_budget_output_is_read_and_dropped_and_that_is_said(pipe: Pipe) -> None:
    line = b"y" * 99 + b"\n"
    logs = pipe.logs(line * 20_000)
    assert len(logs) <= BUDGET_BYTES // LINE_BYTES
    logged_bytes = sum(len(entry["text"]) for entry in logs)
    assert logged_bytes + pipe.budget.dropped_bytes == pytest.approx(20_000 * 100, rel=0.01)
    with capture_logs() as said:
        pipe.budget.say_dropped("one", 0.0)
        pipe.budget.say_dropped("one", 0.1)
    assert [entry["id"] for entry in said] == ["one"]
    assert pipe.prints(b"later\n", now=60.0) == [(None, "later")]


def test_the_task_is_known_again_after_output_was_dropped(pipe: Pipe) -> None:
    pipe.prints(b"\x1e1\n" + b"z\n" * 100_000)
    pipe.prints(b"\x1e2\n" + b"z\n" * 100)
    assert pipe.prints(b"late\n", now=60.0) == [("two", "late")]


def test_records_of_logging_keep_their_level_and_their_lines(pipe: Pipe) -> None:
    (entry,) = pipe.logs(b"\x1f40 plugin.part\x1ffirst\x1dsecond\n")
    assert (entry["log_level"], entry["source"], entry["text"]) == ("error", "plugin.part", "first\nsecond")
    (entry,) = pipe.logs(b"\x1f25 custom\x1fbetween\n")
    assert entry["log_level"] == "info"


@pytest.mark.parametrize(
    "junk", [b"\x1f", b"\x1fx y\x1fz", b"\x1f999999999999 \x1f", b"\x1e\x1e", b"\xff\x00"]
)
def test_junk_is_text(pipe: Pipe, junk: bytes) -> None:
    pipe.prints(junk + b"\n" + b"\x1e" + b"9" * 100 + b"\n")
    assert pipe.prints(b"\x1e1\nfine\n") == [("one", "fine")]


def test_a_record_separator_that_a_task_prints_is_text(pipe: Pipe) -> None:
    """As in sequences of JSON texts (RFC 7464)."""
    line = '\x1e{"a": 1}'
    assert pipe.prints(b"\x1e1\n" + 2 * f"{line}\n".encode()) == [("one", line)] * 2
    assert pipe.prints(f"{line}\x1e2\nother\n".encode()) == [("one", line), ("two", "other")]
    pipe.prints(f"{line}\n".encode() * (BUDGET_BYTES // 100))
    assert pipe.budget.spent
    assert pipe.prints(b"next\n", now=1_000) == [("two", "next")]
