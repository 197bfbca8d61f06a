"""The README's task does what the README says of it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskd import Task
from taskd.activation.retry import Raised, RetryAfter, decide
from taskd.tasks import registry
from taskd.tasks.current import CurrentTask, running

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the example defines; `answers` is what its service answers, in order."""
    monkeypatch.setattr(registry, "_tasks", dict(registry._tasks))
    section = README.partition("## What a task can ask for")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"answers": []}
    names["send"] = lambda row: names["answers"].pop(0)
    exec(code[1], names)
    return names


@pytest.fixture
def upload(example: dict[str, Any]) -> Task[Any, None]:
    task = example["upload"]
    assert isinstance(task, Task)
    return task


@pytest.mark.parametrize(
    ("error", "delays"),
    [
        (ConnectionError(), [5, 10, 20, 40, 80, 160, 320]),
        (TimeoutError(), [60, 120]),
        (ValueError(), []),
        (RetryAfter(30), [30] * 7),
    ],
)
def test_its_policy(upload: Task[Any, None], error: Exception, delays: list[int]) -> None:
    decisions = [decide(upload.retry, attempts, Raised(error)) for attempts in range(8)]
    retries = [decision for decision in decisions if decision.status == "retry"]
    assert decisions[: len(retries)] == retries, "then it has failed for good"
    assert [decision.delay_on_retry for decision in retries] == delays


def test_its_run(example: dict[str, Any], upload: Task[Any, None]) -> None:
    heard: list[tuple[float | None, str]] = []
    supervisor = SimpleNamespace(heartbeat=lambda *said: heard.append(said))
    slow_down = SimpleNamespace(status=429, headers={"Retry-After": "90"})
    example["answers"] += [SimpleNamespace(status=200), slow_down]
    with (
        running(CurrentTask("a" * 32, "reports", "upload", supervisor=supervisor)),  # type: ignore[arg-type]
        pytest.raises(RetryAfter) as asked,
    ):
        upload(["first", "second", "third"])
    assert asked.value.delay == 90
    assert heard == [(0.0, "row 0"), (1 / 3, "row 1")]


def test_called_directly_it_runs_all_the_same(example: dict[str, Any], upload: Task[Any, None]) -> None:
    example["answers"] += [SimpleNamespace(status=200)]
    upload(["only"])
    assert example["answers"] == []
