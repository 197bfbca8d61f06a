"""An order to cancel reaches its task at whatever moment it comes, and no other task."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from taskd.activation.retry import TaskCancelled
from taskd.clock import monotonic_s
from taskd.worker import entry_pipe as pipe
from taskd.worker.entry_watch import Watch


class Scene:
    """A watch whose signals are delivered by hand: nothing is installed in the process of the tests."""

    def __init__(self) -> None:
        read, self._write = os.pipe()
        self._fds = (read, self._write)
        self.watch = Watch(read, lambda heartbeat: None)

    def order(self, number: int) -> None:
        os.write(self._write, pipe.encode_order(pipe.Order(pipe.OrderKind.CANCEL, number)))
        self.watch._on_order(signal.SIGTERM, None)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(signal, "setitimer", lambda *_: None)
    made = Scene()
    yield made
    made.close()


WORK = pipe.Work(b"", None, 1, 600.0, None)
NOW_S = monotonic_s()


def test_one_that_comes_before_the_task_is_watched_ends_it_where_it_begins(scene: Scene) -> None:
    scene.order(2)
    first, second = scene.watch.supervise(1, WORK, NOW_S), scene.watch.supervise(2, WORK, NOW_S)
    scene.watch.open(first)
    scene.watch.shut()
    assert not first.cancelled
    with pytest.raises(TaskCancelled):
        scene.watch.open(second)
    assert second.cancelled
    scene.watch.shut()


def test_one_that_comes_while_it_runs_ends_it_once(scene: Scene) -> None:
    task = scene.watch.supervise(1, WORK, NOW_S)
    scene.watch.open(task)
    with pytest.raises(TaskCancelled):
        scene.order(1)
    scene.order(1)  # it cleans up: not interrupted again
    scene.watch.shut()
    assert task.cancelled


def test_one_that_comes_too_late_ends_nothing(scene: Scene) -> None:
    first, second = scene.watch.supervise(1, WORK, NOW_S), scene.watch.supervise(2, WORK, NOW_S)
    scene.watch.open(first)
    scene.watch.shut()
    scene.order(1)
    scene.watch.open(second)
    scene.order(1)
    scene.watch.shut()
    assert not second.cancelled
