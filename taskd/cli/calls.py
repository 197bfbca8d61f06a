"""What `taskd submit` sends: which task, with which arguments. All is checked before anything is sent."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from taskd.errors import TaskdError, UnknownTask

if TYPE_CHECKING:
    from taskd.tasks.registry import LoadedPlugin
    from taskd.tasks.task import AnyTask

LINES_NAMED = 20
Kwargs = dict[str, Any]


class BadCalls(TaskdError):
    """The arguments cannot be sent; nothing was sent."""


def find_task(name: str, application: str | None) -> AnyTask:
    """The task `NAMESPACE:TASK` of the installed plugins. Raises UnknownTask with the nearest names."""
    from taskd.tasks.registry import load_plugins, registered

    loaded = load_plugins()
    namespace, colon, taskname = name.partition(":")
    if not (namespace and colon and taskname):
        raise UnknownTask(f"expected NAMESPACE:TASK, such as demo:add, found {name!r}")
    known = registered()
    matching = [
        task
        for task in known
        if (task.namespace.name, task.name) == (namespace, taskname)
        and application in (None, task.namespace.application)
    ]
    if len(matching) == 1:
        return matching[0]
    if matching:
        applications = ", ".join(sorted(repr(task.namespace.application) for task in matching))
        raise UnknownTask(
            f"{name} is a task of several applications: {applications}; name one by --application"
        )
    raise UnknownTask(_unknown(name, application, known, loaded))


def _unknown(
    name: str, application: str | None, known: Iterable[AnyTask], loaded: Iterable[LoadedPlugin]
) -> str:
    of = "" if application is None else f" of application {application!r}"
    message = f"no installed plugin registers a task {name}{of}"
    names = {f"{task.namespace.name}:{task.name}" for task in known}
    nearest = difflib.get_close_matches(name, names, n=3)
    if nearest:
        message += f"; nearest: {', '.join(nearest)}"
    failed = [plugin.distribution for plugin in loaded if plugin.error is not None]
    if failed:
        message += f"; {', '.join(failed)} failed to load"
    return f"{message}. `taskd plugins list` tells what is installed"


def read_kwargs(text: str, task: AnyTask) -> Kwargs:
    """The arguments of one call, from JSON. Raises BadCalls."""
    try:
        return _kwargs(text, task)
    except ValueError as error:
        raise BadCalls(f"--kwargs: {error}; nothing was sent") from None


def read_lines(lines: Iterable[bytes], source: str, task: AnyTask) -> list[Kwargs]:
    """One call for each line of JSON; empty lines do not count. Raises BadCalls, naming every bad one."""
    calls, problems = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                calls.append(_kwargs(line.decode("utf-8-sig" if number == 1 else "utf-8"), task))
            except ValueError as error:
                problems.append(f"{source}:{number}: {error}")
    if problems:
        more = len(problems) - LINES_NAMED
        named = problems[:LINES_NAMED] + ([f"and {more} more"] if more > 0 else [])
        raise BadCalls(
            "\n".join([f"{len(problems)} of {number} lines cannot be sent; nothing was sent:", *named])
        )
    if not calls:
        raise BadCalls(f"{source}: expected one JSON object of arguments on each line, found nothing")
    return calls


def _kwargs(text: str, task: AnyTask) -> Kwargs:
    try:
        kwargs = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(kwargs, dict):
        raise ValueError(f"expected a JSON object of keyword arguments, found {_kind(kwargs)}")
    _check_signature(kwargs, task)
    return kwargs


def _refuse_constant(name: str) -> float:
    raise ValueError(f"not valid JSON: {name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> Kwargs:
    found: Kwargs = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is given twice")
        found[key] = value
    return found


def _kind(value: object) -> str:
    kinds: Mapping[type, str] = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _check_signature(kwargs: Kwargs, task: AnyTask) -> None:
    extra: Kwargs = {"headers": {}} if task.pass_headers else {}
    try:
        signature = inspect.signature(task.function)
    except ValueError:  # some functions written in C tell none
        return
    try:
        signature.bind(**{**kwargs, **extra})
    except TypeError as error:
        raise ValueError(f"{task} takes {signature}: {error}") from None
