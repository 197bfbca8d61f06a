"""What is to be sent is checked before anything is sent."""

from __future__ import annotations

import pytest

from taskd import TaskNamespace
from taskd.cli.calls import BadCalls, find_task, read_kwargs, read_lines
from taskd.errors import UnknownTask
from taskd.tasks import registry


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_tasks", {})
    monkeypatch.setattr(registry, "load_plugins", list)


@pytest.fixture
def add():
    return TaskNamespace("sums").register(name="add")(lambda a, b=0: None)


def test_lines(add):
    lines = [b'\xef\xbb\xbf{"a": 1}\n', b"\n", '{"a": "é", "b": [1, {"c": null}]}'.encode()]
    assert read_lines(lines, "x", add) == [{"a": 1}, {"a": "é", "b": [1, {"c": None}]}]


def test_every_bad_line_is_named(add):
    lines = [
        b'{"a": 1}',
        b'{"a": 1,}',
        b"[1]",
        b'{"b": 1}',
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ]
    with pytest.raises(BadCalls) as caught:
        read_lines(lines, "events.jsonl", add)
    first, *named = str(caught.value).splitlines()
    assert first == "8 of 9 lines cannot be sent; nothing was sent:"
    assert [line.split(": ")[0] for line in named] == [f"events.jsonl:{number}" for number in range(2, 10)]
    for line, said in zip(
        named,
        ["not valid JSON", "found a list", "missing a required argument: 'a'", "given twice", "NaN", "utf-8"],
        strict=False,
    ):
        assert said in line


def test_many_bad_lines_are_cut_short(add):
    with pytest.raises(BadCalls) as caught:
        read_lines([b"x"] * 100, "f", add)
    assert str(caught.value).splitlines()[-1] == "and 80 more"


def test_nothing_in_the_file(add):
    with pytest.raises(BadCalls, match="found nothing"):
        read_lines([b"\n"], "f", add)


@pytest.mark.parametrize("text", ["1", '"x"', "null", "true", "[]", "", "{'a': 1}"])
def test_kwargs_are_a_json_object(add, text):
    with pytest.raises(BadCalls, match=r"^--kwargs: (expected a JSON object|not valid JSON)"):
        read_kwargs(text, add)


def test_headers_come_from_the_worker():
    def takes(a: int, headers: dict[str, str]) -> None: ...

    task = TaskNamespace("sums").register(name="takes", pass_headers=True)(takes)
    assert read_kwargs('{"a": 1}', task) == {"a": 1}


def test_one_of_several_applications():
    for application in ("shop", "mill"):
        TaskNamespace("sums", application=application).register(name="add")(lambda: None)
    with pytest.raises(UnknownTask, match="several applications: 'mill', 'shop'; name one by --application"):
        find_task("sums:add", None)
    assert find_task("sums:add", "mill").namespace.application == "mill"
    with pytest.raises(UnknownTask, match="no installed plugin registers a task sums:add of application 'x'"):
        find_task("sums:add", "x")
