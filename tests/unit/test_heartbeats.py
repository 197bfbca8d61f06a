"""What a task says of itself, and how little of it is passed on."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable

import pytest

import taskd
from taskd.tasks import heartbeats
from taskd.tasks.current import CurrentTask, running
from taskd.tasks.heartbeats import INTERVAL_S, Heartbeats


class Clock:
    """Time that a test moves; what was put off happens on the way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.later: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr(heartbeats, "monotonic_s", lambda: self.now)

    def put_off(self, delay_s: float, function: Callable[[], None]) -> None:
        self.later.append((self.now + delay_s, function))

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [item for item in self.later if item[0] <= end]:
            first = min(due, key=lambda item: item[0])
            self.later.remove(first)
            self.now = first[0]
            first[1]()
        self.now = end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_loop_of_thousands_sends_four_a_second_and_the_last(clock: Clock) -> None:
    sent: list[tuple[float, float | None]] = []
    beats = Heartbeats(lambda progress, message: sent.append((clock.now, progress)), later=clock.put_off)
    for row in range(1_000):
        beats.beat(row / 1_000, "")
        clock.advance(0.001)
    assert len(sent) <= 1 / INTERVAL_S + 1
    clock.advance(10)
    assert sent[-1][1] == 0.999
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(sent)]
    assert min(gaps) >= INTERVAL_S - 1e-6


def test_a_lone_heartbeat_goes_at_once(clock: Clock) -> None:
    sent: list[str] = []
    beats = Heartbeats(lambda progress, message: sent.append(message), later=clock.put_off)
    for message in ("one", "two"):
        beats.beat(None, message)
        assert sent[-1] == message
        clock.advance(INTERVAL_S)
    assert clock.later == []


def test_nothing_is_sent_once_closed(clock: Clock) -> None:
    sent: list[str] = []
    beats = Heartbeats(lambda progress, message: sent.append(message), later=clock.put_off)
    beats.beat(None, "first")
    beats.beat(None, "held back")
    beats.close()
    beats.beat(None, "too late")
    clock.advance(10)
    assert sent == ["first"]


def test_what_is_held_back_comes_from_a_thread_of_its_own() -> None:
    sent: list[str] = []
    arrived = threading.Event()

    def send(progress: float | None, message: str) -> None:
        sent.append(message)
        if message == "last":
            arrived.set()

    beats = Heartbeats(send)
    for message in ("first", "passed over", "last"):
        beats.beat(None, message)
    assert arrived.wait(10)
    assert sent == ["first", "last"]


class Supervisor:
    def __init__(self) -> None:
        self.heard: list[tuple[float | None, str]] = []
        self.cancelled = False

    def heartbeat(self, progress: float | None, message: str) -> None:
        self.heard.append((progress, message))

    def is_cancelled(self) -> bool:
        return self.cancelled

    def remaining_s(self) -> float:
        return 4.5


def test_a_task_reaches_its_supervisor() -> None:
    supervisor = Supervisor()
    task = CurrentTask("a" * 32, "mail", "send", attempts=2, fence=7, supervisor=supervisor)
    with running(task):
        found = taskd.current_task()
        assert found is not None
        assert (found.attempt, found.attempts, found.fence, found.deadline) == (2, 2, 7, 4.5)
        told = [found.cancelled]
        supervisor.cancelled = True
        assert [*told, found.cancelled] == [False, True]
        found.heartbeat(progress=1 / 4, message="x" * 500)
        found.heartbeat(progress=7)
        taskd.heartbeat(message="by the function")
    assert supervisor.heard == [(0.25, "x" * 200), (1.0, ""), (None, "by the function")]


def test_outside_a_worker_a_heartbeat_does_nothing() -> None:
    taskd.heartbeat(0.5, "called directly")
    task = CurrentTask("a" * 32, "mail", "send")
    task.heartbeat(0.5)
    assert (task.deadline, task.cancelled) == (math.inf, False)


@pytest.mark.parametrize("progress", [math.nan, "0.5", True])
def test_a_progress_that_is_no_number_is_refused(progress: object) -> None:
    with pytest.raises(ValueError, match="progress: expected a number from 0 to 1"):
        CurrentTask("a" * 32, "mail", "send").heartbeat(progress)  # type: ignore[arg-type]


def test_a_message_that_cannot_be_sent_is_mended() -> None:
    assert heartbeats.checked(None, "größer \ud800") == (None, "größer ?")


def test_a_message_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="message: expected a text"):
        CurrentTask("a" * 32, "mail", "send").heartbeat(message=3)  # type: ignore[arg-type]


def test_a_machine_without_threads_costs_the_last_heartbeat_only(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(timer: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", start)
    sent: list[str] = []
    beats = Heartbeats(lambda progress, message: sent.append(message))
    for message in ("first", "lost"):
        beats.beat(None, message)
    clock.advance(INTERVAL_S)
    beats.beat(None, "next")
    assert sent == ["first", "next"]


def test_a_thread_of_a_task_is_handed_the_task() -> None:
    supervisor = Supervisor()
    with running(CurrentTask("a" * 32, "mail", "send", supervisor=supervisor)):
        task = taskd.current_task()
        assert task is not None
        for function in (taskd.heartbeat, task.heartbeat):
            thread = threading.Thread(target=function, args=(0.5,))
            thread.start()
            thread.join()
    assert supervisor.heard == [(0.5, "")]
