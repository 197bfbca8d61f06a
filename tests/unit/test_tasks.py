from __future__ import annotations

import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import taskd
from taskd import LastAction, Retry, Task, TaskNamespace, instrumented_task
from taskd.errors import UnknownTask
from taskd.tasks import outbox, registry
from taskd.tasks.outbox import Call


class Collected:
    """An outbox that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[Call, bool]] = []
        self.closed = False

    def send(self, call: Call, *, wait: bool) -> None:
        self.sent.append((call, wait))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def sent() -> Iterator[list[tuple[Call, bool]]]:
    double = Collected()
    outbox.bind(double)
    yield double.sent
    outbox.unbind()


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_tasks", dict(registry._tasks))


@pytest.fixture
def issues() -> TaskNamespace:
    return TaskNamespace("issues", application="monitor", retry=Retry(times=2), expires=600)


async def test_calling_an_async_task_gives_its_coroutine(issues: TaskNamespace) -> None:
    @issues.register(name="double")
    async def double(number: int) -> int:
        return number * 2

    assert double.is_async
    result: int = await double(4)
    assert result == 8


def test_an_async_task_is_sent_like_any_other(issues: TaskNamespace, sent: list[tuple[Call, bool]]) -> None:
    @issues.register(name="double")
    async def double(number: int) -> int:
        return number * 2

    id_: str = double.delay(4)
    ((call, wait),) = sent
    assert (call.id, call.args, wait) == (id_, (4,), True)


def test_calling_a_task_runs_it_here(issues: TaskNamespace) -> None:
    @issues.register(name="double")
    def double(number: int) -> int:
        """Twice."""
        return number * 2

    result: int = double(4)
    assert result == 8
    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    assert str(double) == "task issues:double"
    assert not double.is_async


def test_delay_sends_the_call(issues: TaskNamespace, sent: list[tuple[Call, bool]]) -> None:
    @instrumented_task(
        name="deliver",
        namespace=issues,
        retry=Retry(times=3, times_exceeded=LastAction.Deadletter, delay=7),
    )
    def deliver(organization_id: int, group_id: int) -> None: ...

    activation_id = deliver.delay(1, group_id=2)

    ((call, wait),) = sent
    assert wait
    assert len(activation_id) == 32
    assert call == Call(
        id=activation_id,
        namespace="issues",
        taskname="deliver",
        application="monitor",
        topic="",
        args=(1,),
        kwargs={"group_id": 2},
        processing_deadline_s=10,
        expires_s=600,
        max_attempts=4,
        dead_letter=True,
        delay_on_retry_s=7,
    )


def test_apply_async_says_more(issues: TaskNamespace, sent: list[tuple[Call, bool]]) -> None:
    @issues.register(
        name="deliver",
        processing_deadline_duration=timedelta(minutes=1),
        wait_for_delivery=False,
        compression_type="zstd",
    )
    def deliver(group_id: int) -> None: ...

    deliver.apply_async(
        kwargs={"group_id": 2},
        headers={"source": "tutorial", "number": 3, "none": None},
        expires=3600,
        countdown=timedelta(minutes=5),
    )
    ((call, wait),) = sent
    assert not wait
    assert (call.args, call.kwargs) == ((), {"group_id": 2})
    assert call.headers == {"source": "tutorial", "number": "3", "none": "None"}
    assert (call.expires_s, call.delay_s, call.processing_deadline_s) == (3600, 300, 60)
    assert call.compression_type == "zstd"
    assert call.max_attempts == 3  # the namespace's policy


def test_a_task_without_policy_carries_no_retry_state(sent: list[tuple[Call, bool]]) -> None:
    @TaskNamespace("plain").register(name="plain")
    def plain() -> None: ...

    plain.delay()
    assert sent[0][0].max_attempts is None
    assert not sent[0][0].dead_letter


@pytest.mark.parametrize(("expires", "countdown"), [(60, 60), (1, timedelta(seconds=2)), (None, 600)])
def test_it_may_not_expire_before_it_starts(issues: TaskNamespace, expires: Any, countdown: Any) -> None:
    task = issues.register(name="t")(lambda: None)
    with pytest.raises(ValueError, match="must be longer than countdown"):
        task.to_call(expires=expires, countdown=countdown)


@pytest.mark.parametrize("duration", [1.5, "5", True, -1, 10**12, timedelta(seconds=-1)])
def test_durations_are_seconds(issues: TaskNamespace, duration: Any) -> None:
    task = TaskNamespace("durations").register(name="t")(lambda: None)
    with pytest.raises(ValueError, match="countdown"):
        task.to_call(countdown=duration)
    with pytest.raises(ValueError, match="processing_deadline_duration"):
        TaskNamespace("durations", processing_deadline_duration=duration)


def test_fractions_of_a_second_are_rounded_up() -> None:
    namespace = TaskNamespace("durations", processing_deadline_duration=timedelta(milliseconds=1200))
    assert namespace.processing_deadline_s == 2


class TestAtMostOnce:
    def test_excludes_a_retry(self, issues: TaskNamespace) -> None:
        with pytest.raises(ValueError, match="exclude each other"):
            issues.register(name="once", at_most_once=True, retry=Retry(times=2))(lambda: None)

    def test_overrides_the_namespaces_retry(self, issues: TaskNamespace) -> None:
        task = issues.register(name="once", at_most_once=True)(lambda: None)
        call = task.to_call()
        assert call.at_most_once
        assert call.max_attempts == 1
        assert task.retry == Retry(times=1)

    def test_may_dead_letter(self, issues: TaskNamespace) -> None:
        policy = Retry(times=1, times_exceeded=LastAction.Deadletter)
        task = issues.register(name="once", at_most_once=True, retry=policy)(lambda: None)
        assert task.to_call().dead_letter


def test_what_cannot_be_a_task_is_refused_with_a_sentence(issues: TaskNamespace) -> None:
    def several() -> Iterator[int]:
        yield 1

    async def several_later() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match="several is a generator"):
        issues.register(name="a")(several)
    with pytest.raises(TypeError, match="several_later is a generator"):
        issues.register(name="a")(several_later)
    with pytest.raises(TypeError, match="takes no `headers` keyword"):
        issues.register(name="a", pass_headers=True)(lambda: None)
    with pytest.raises(TypeError, match="the task's name: expected text"):
        issues.register(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compression_type is"):
        issues.register(name="a", compression_type="gzip")(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="silenced_exceptions: expected a tuple of exception types"):
        issues.register(name="a", silenced_exceptions=OSError)(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a Retry, found 3"):
        issues.register(name="a", retry=3)(lambda: None)  # type: ignore[arg-type]


def test_headers_are_passed_to_those_who_ask(issues: TaskNamespace) -> None:
    @issues.register(name="with", pass_headers=True)
    def with_headers(number: int, headers: Mapping[str, str]) -> object:
        return number, headers

    @issues.register(name="without")
    def without(number: int) -> object:
        return number

    assert with_headers.run([1], {}, {"source": "x"}) == (1, {"source": "x"})
    assert without.run([], {"number": 1}, {"source": "x"}) == 1


class TestNames:
    def test_a_name_is_given_once(self, issues: TaskNamespace) -> None:
        def first() -> None: ...
        def second() -> None: ...

        issues.register(name="same")(first)
        with pytest.raises(
            ValueError, match=r"registered twice: by .*first.*test_tasks.py:\d+.* and by .*second"
        ):
            issues.register(name="same")(second)
        assert registry.find("monitor", "issues", "same").function is first

    def test_namespaces_of_one_name_are_one(self, issues: TaskNamespace) -> None:
        issues.register(name="same")(lambda: None)
        with pytest.raises(ValueError, match="registered twice"):
            TaskNamespace("issues", "monitor").register(name="same")(lambda: None)
        TaskNamespace("issues", "another").register(name="same")(lambda: None)

    def test_internal_is_reserved(self) -> None:
        with pytest.raises(ValueError, match="'internal' is reserved"):
            TaskNamespace("internal")

    @pytest.mark.parametrize("name", ["", None, 3])
    def test_they_are_text(self, name: Any) -> None:
        with pytest.raises(TypeError, match="expected text"):
            TaskNamespace(name)

    def test_every_application_has_the_canary(self) -> None:
        canary = registry.find("whatever", "internal", "canary_task")
        assert canary.run([1], {"x": 2}, {}) is None
        assert canary.processing_deadline_s == 10


class TestFind:
    def test_nearest_names(self, issues: TaskNamespace) -> None:
        issues.register(name="deliver_webhook")(lambda: None)
        with pytest.raises(UnknownTask, match=r"nearest: issues:deliver_webhook.*taskd plugins list"):
            registry.find("monitor", "issues", "deliver_webhok")

    def test_another_application_has_it(self, issues: TaskNamespace) -> None:
        issues.register(name="deliver")(lambda: None)
        with pytest.raises(
            UnknownTask, match="of application '' is known here; application 'monitor' has it"
        ):
            registry.find("", "issues", "deliver")

    def test_registered(self, issues: TaskNamespace) -> None:
        task: Task[[], None] = issues.register(name="deliver")(lambda: None)
        assert task in registry.registered()


def test_the_version_is_the_distributions() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        assert taskd.__version__ == tomllib.load(file)["project"]["version"]
