"""Every task this process knows, and the plugins they came from.

A plugin is a distribution with an entry point in the group `taskd.tasks`; importing what it names
registers its tasks.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from taskd.errors import UnknownTask

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from taskd.tasks.task import AnyTask

ENTRY_POINT_GROUP = "taskd.tasks"
INTERNAL = "internal"  # the reserved namespace; its tasks belong to every application


class TaskKey(NamedTuple):
    application: str
    namespace: str
    taskname: str


_task_key = partial(tuple.__new__, TaskKey)  # for each run, without the call of Python code the name costs


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """One entry point after loading. `error` is None when it loaded; `value` is what it names."""

    distribution: str
    version: str
    entry_point: str
    value: str
    tasks: tuple[str, ...] = ()  # namespace:task
    error: BaseException | None = None
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (entry point {self.entry_point} = {self.value})"


_tasks: dict[TaskKey, AnyTask] = {}


def add(task: AnyTask) -> None:
    """Make a task known. Raises ValueError that names both functions when its name is taken."""
    key = _key(task)
    other = _tasks.get(key)
    if other is not None:
        raise ValueError(
            f"{task} of application {key.application!r} is registered twice: "
            f"by {_origin(other)} and by {_origin(task)}; rename one"
        )
    _tasks[key] = task


def find(application: str, namespace: str, taskname: str) -> AnyTask:
    """The task an activation names. Raises UnknownTask, which tells the nearest names."""
    key = _task_key(("" if namespace == INTERNAL else application, namespace, taskname))
    task = _tasks.get(key)
    if task is None:
        raise UnknownTask(_unknown(key))
    return task


def registered() -> list[AnyTask]:
    """Every known task, by application, namespace and name."""
    return [_tasks[key] for key in sorted(_tasks)]


def load_plugins() -> list[LoadedPlugin]:
    """Import every installed plugin. One that fails is reported in its place and the others still load."""
    entry_points = _entry_points()
    failures = [_load(entry_point) for entry_point in entry_points]
    return [_report(*pair) for pair in zip(entry_points, failures, strict=True)]


def _entry_points() -> Sequence[EntryPoint]:
    import importlib.metadata  # costs a fifth of what `import taskd` may take, and producers never need it

    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return sorted(found, key=lambda entry_point: (_distribution(entry_point), entry_point.name))


def _load(entry_point: EntryPoint) -> BaseException | None:
    try:
        entry_point.load()
    except (Exception, SystemExit) as error:
        _forget_unloaded()
        return error
    return None


def _forget_unloaded() -> None:
    # Python drops a module whose import failed; its functions lack what their module never defined.
    for key, task in list(_tasks.items()):
        module = sys.modules.get(task.function.__module__)
        if getattr(task.function, "__globals__", None) is not getattr(module, "__dict__", None):
            del _tasks[key]


def _report(entry_point: EntryPoint, error: BaseException | None) -> LoadedPlugin:
    tasks = (
        f"{task.namespace.name}:{task.name}" for task in registered() if _ships(entry_point, _module(task))
    )
    return LoadedPlugin(
        distribution=entry_point.dist.name if entry_point.dist else "unknown distribution",
        version=entry_point.dist.version if entry_point.dist else "",
        entry_point=entry_point.name,
        value=entry_point.value,
        tasks=tuple(tasks),
        error=error,
        traceback="".join(traceback.format_exception(error)) if error else "",
    )


def _distribution(entry_point: EntryPoint) -> str:
    return f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else ""


def _ships(entry_point: EntryPoint, module: str) -> bool:
    """Whether a module is in the package of the module that the entry point names."""
    package = entry_point.module.rpartition(".")[0] or entry_point.module
    return module == package or module.startswith(f"{package}.")


def _key(task: AnyTask) -> TaskKey:
    return TaskKey(task.namespace.application, task.namespace.name, task.name)


def _module(task: AnyTask) -> str:
    return task.function.__module__ or ""


def _origin(task: AnyTask) -> str:
    shipped_by = next((_distribution(e) for e in _entry_points() if _ships(e, _module(task))), "")
    return f"{task.origin}" + (f" of {shipped_by}" if shipped_by else "")


def _unknown(key: TaskKey) -> str:
    message = f"no task {key.namespace}:{key.taskname} of application {key.application!r} is known here"
    elsewhere = [k.application for k in _tasks if k[1:] == key[1:]]
    names = {f"{k.namespace}:{k.taskname}" for k in _tasks if k.application == key.application}
    nearest = difflib.get_close_matches(f"{key.namespace}:{key.taskname}", names, n=3)
    if elsewhere:
        message += f"; application {', '.join(map(repr, sorted(elsewhere)))} has it"
    elif nearest:
        message += f"; nearest: {', '.join(nearest)}"
    return f"{message}. `taskd plugins list` tells which plugins are installed and what they ship"
