"""Who may import whom, and who may read a clock: the architecture, enforced on the source.

The rules are in ARCHITECTURE.md. Imports inside functions and under TYPE_CHECKING count like any
other; what is excused is named below, each with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "taskd"

# An import goes to an earlier cell or stays in its own folder. Folders of one cell never import
# each other; single modules of one cell may.
CELLS = [
    "errors clock signals locks",
    "activation",
    "tasks wire config telemetry aio groupcommit database",
    "log inflight rpc",
    "producer",
    "ingest dispatch worker upkeep scheduler admin",
    "web testing",
    "daemon",
    "bench",
    "cli",
    "__main__",
]
RANK = {name: rank for rank, cell in enumerate(CELLS) for name in cell.split()}

LATE_IMPORTS = {
    ("__init__.py", "producer"): "`import taskd` stays light; .delay() loads what sends when it first sends",
}
FACE = {"errors", "activation", "tasks"}  # what taskd/__init__.py shows to authors of tasks
ENTRY = {"activation", "tasks", "wire", "errors"}  # what a child process may load of taskd

# Tasks of other children run whatever loop they like, and their children start quickly. An async child
# *is* a Trio loop: only its modules load Trio, and nothing else in a child loads them.
ASYNC_ENTRY = "worker/entry_async"

# A library is let in by its own door only. A folder ends with a slash.
DOORS = {
    "grpclib": ("rpc/",),
    "aiokafka": ("log/kafka/",),
    "trio_asyncio": ("aio.py",),
    "asyncio": ("aio.py", "log/kafka/", "rpc/"),
    "apsw": (
        "database.py",
        "inflight/sqlite",
        "inflight/schema.py",
        "inflight/salvage.py",
        "log/embedded.py",
        "testing/faults.py",
    ),
    "pickle": (),  # bytes from a queue never become code
}

CLOCKS = {
    *(f"time.{name}" for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter")),
    *(f"datetime.{name}" for name in ("now", "utcnow", "today")),
    *(f"datetime.datetime.{name}" for name in ("now", "utcnow", "today")),
    *(f"random.{name}" for name in ("random", "randint", "randrange", "choice", "shuffle", "uniform")),
}
CLOCK_READERS = {
    "clock.py": "the reader everybody else is given",
    "testing/kafka.py": "waits for a real process, with a deadline",
    "worker/entry": "a child process measures how long a task ran, and tells nobody the time",
}


@dataclass(frozen=True)
class Import:
    module: str  # dotted, absolute
    line: int
    late: bool  # inside a function


def sources() -> list[str]:
    """Every module of taskd, relative to the package; generated ones are not ours to judge."""
    paths = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
    return sorted(path for path in paths if not path.startswith("wire/generated/"))


def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), path)


def imports(tree: ast.AST, late: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            # `from taskd import log` names a folder of ours in the second half
            modules = {imported_module(node.module or "", alias.name) for alias in node.names}
            yield from (Import(module, node.lineno, late) for module in sorted(modules))
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, late or inside)


def imported_module(source: str, name: str) -> str:
    """What `from source import name` loads: in the case of a folder, the module in it."""
    folder = ROOT.parent.joinpath(*source.split("."))
    of_ours = source.split(".")[0] == "taskd" and folder.is_dir()
    if source == "taskd" or (of_ours and ((folder / name).is_dir() or (folder / f"{name}.py").exists())):
        return f"{source}.{name}"
    return source


def unit(path: str) -> str:
    """The folder of a module, or the name of a single module: what has a place in CELLS."""
    return path.split("/")[0].removesuffix(".py")


def verdict(path: str, found: Import) -> str | None:
    """Why this import is not allowed, or None."""
    package, *rest = found.module.split(".")
    in_child = path.startswith("worker/entry") and not path.startswith(ASYNC_ENTRY)
    if in_child and (package == "trio" or found.module.startswith("taskd.worker.entry_async")):
        return f"of what a child loads, only {ASYNC_ENTRY}* may import trio"
    if package != "taskd" or not rest:
        doors = DOORS.get(package)
        if doors is None or path.startswith(doors):
            return None
        return f"{package} may be imported only by {' '.join(doors) or 'nobody'}"
    target, own = rest[0], unit(path)
    if found.late and (path, target) in LATE_IMPORTS:
        return None
    if path == "__init__.py":
        return None if target in FACE else f"taskd/__init__.py may import only {sorted(FACE)}"
    if path.startswith("worker/entry"):
        if found.module.startswith("taskd.worker.entry"):
            return None
        if target in ENTRY and not found.module.startswith("taskd.wire.generated"):
            return None
        return f"worker/entry may import only {sorted(ENTRY)}, and no generated messages"
    if target == "__version__":
        return None
    if target not in RANK:
        return f"taskd.{target} has no place in CELLS; names of taskd/__init__.py are for authors of tasks"
    if target == own or RANK[target] < RANK[own]:
        return None
    if RANK[target] == RANK[own] and not (ROOT / target).is_dir() and not (ROOT / own).is_dir():
        return None
    return f"{own} may not import {target}: an import goes left, or stays in its folder"


def clock_readings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in CLOCKS:
            yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "random"):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in CLOCKS:
                    yield f"from {node.module} import {alias.name}", node.lineno


def test_every_folder_has_a_place_in_the_layers() -> None:
    assert {unit(path) for path in sources()} <= {*RANK, "__init__"}


@pytest.mark.parametrize("path", sources())
def test_imports_go_left(path: str) -> None:
    wrong = [
        f"taskd/{path}:{found.line}: {found.module}: {why}"
        for found in imports(parsed(path))
        if (why := verdict(path, found))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sources())
def test_time_and_randomness_are_arguments(path: str) -> None:
    if path.startswith(tuple(CLOCK_READERS)):
        return
    wrong = [f"taskd/{path}:{line}: {name}" for name, line in clock_readings(parsed(path))]
    assert not wrong, "only clock.py reads clocks, only roots seed generators:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("log/kafka/reader.py", "from taskd.ingest import reader"),
        ("log/kafka/reader.py", "def f():\n    import taskd.daemon.broker"),
        ("log/kafka/reader.py", "import taskd.rpc.server"),
        ("log/embedded.py", "import aiokafka"),
        ("wire/envelope.py", "from taskd import tasks"),
        ("worker/entry.py", "from taskd.wire.generated.taskd import v1"),
        ("worker/entry.py", "from taskd.wire import generated"),
        ("worker/entry.py", "from taskd.telemetry import logs"),
        ("worker/entry_run.py", "import trio"),
        ("worker/entry_run.py", "from taskd.worker.entry_async_task import Activity"),
        ("worker/entry_async.py", "from taskd.worker.backlog import Backlog"),
        ("daemon/broker.py", "import asyncio"),
        ("__init__.py", "import taskd.producer"),
        ("upkeep/duties.py", "import pickle"),
    ],
)
def test_the_rule_catches(path: str, source: str) -> None:
    assert any(verdict(path, found) for found in imports(ast.parse(source)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("log/kafka/reader.py", "import aiokafka\nfrom taskd.log import base\nfrom taskd import aio"),
        ("__init__.py", "def configure():\n    from taskd.producer import outbox"),
        ("database.py", "from taskd.groupcommit import Write"),
        ("cli/main.py", "from taskd.daemon import broker"),
        ("worker/entry.py", "from taskd.wire import envelope\nfrom taskd.wire.frames import Started"),
        ("worker/entry_async.py", "import trio\nfrom taskd.worker.entry_async_task import Activity"),
    ],
)
def test_the_rule_lets_pass(path: str, source: str) -> None:
    assert not any(verdict(path, found) for found in imports(ast.parse(source)))


def test_clock_readings_are_seen() -> None:
    source = "from time import monotonic\nx = time.time(), random.random(), datetime.now(tz), rng.random()"
    assert len(list(clock_readings(ast.parse(source)))) == 4
