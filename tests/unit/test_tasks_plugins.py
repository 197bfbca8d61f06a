from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskd.tasks import registry
from taskd.tasks.registry import LoadedPlugin, load_plugins

Install = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_tasks", dict(registry._tasks))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install distributions of one module each, called `<name>_tasks`."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, source: str) -> None:
        (tmp_path / f"{name}_tasks.py").write_text(source)
        metadata = tmp_path / f"{name}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[taskd.tasks]\nmain = {name}_tasks\n")

    yield install
    for module in [module for module in sys.modules if module.endswith("_tasks") and "." not in module]:
        del sys.modules[module]


def plugin(name: str) -> LoadedPlugin:
    return next(loaded for loaded in load_plugins() if loaded.distribution == name)


TASK = """
from taskd import TaskNamespace
@TaskNamespace("plugin").register(name="{name}")
def {function}():
    return 1
"""


def test_importing_registers(install: Install) -> None:
    install("good", TASK.format(name="one", function="one"))
    assert plugin("good") == LoadedPlugin("good", "1.2", "main", "good_tasks", ("plugin:one",))
    assert registry.find("", "plugin", "one")() == 1


def test_one_that_fails_is_reported_and_the_others_load(install: Install) -> None:
    install("bad", TASK.format(name="two", function="two") + "import nowhere_to_be_found\n")
    install("good", TASK.format(name="one", function="one"))
    bad = plugin("bad")
    assert isinstance(bad.error, ModuleNotFoundError)
    assert "import nowhere_to_be_found" in bad.traceback
    assert str(bad) == "bad 1.2 (entry point main = bad_tasks)"
    assert plugin("good").error is None
    # Its module is gone, so what it had registered is not offered; trying again tells the same.
    assert bad.tasks == ()
    assert ("", "plugin", "two") not in registry._tasks
    assert isinstance(plugin("bad").error, ModuleNotFoundError)


def test_one_that_exits_is_reported(install: Install) -> None:
    install("exits", "raise SystemExit(3)\n")
    assert isinstance(plugin("exits").error, SystemExit)


def test_the_same_name_twice_names_both_distributions(install: Install) -> None:
    install("alpha", TASK.format(name="same", function="first"))
    install("beta", TASK.format(name="same", function="second"))
    error = str(plugin("beta").error)
    assert "task plugin:same of application '' is registered twice" in error
    assert "alpha_tasks.first" in error
    assert "of alpha 1.2 and by beta_tasks.second" in error
    assert error.endswith("of beta 1.2; rename one")
    assert plugin("alpha").error is None


def test_a_missing_object_is_reported(install: Install, tmp_path: Path) -> None:
    install("odd", "x = 1\n")
    (tmp_path / "odd-1.2.dist-info" / "entry_points.txt").write_text("[taskd.tasks]\nmain = odd_tasks:y\n")
    assert isinstance(plugin("odd").error, AttributeError)
