"""`taskd plugins list`, with distributions made up for the test."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from taskd.cli.app import app
from taskd.tasks import registry


@pytest.fixture
def install(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_tasks", {})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])

    def install(name: str, source: str) -> None:
        (tmp_path / f"{name}_tasks.py").write_text(source)
        metadata = tmp_path / f"{name}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[taskd.tasks]\nmain = {name}_tasks\n")

    yield install
    for module in [module for module in sys.modules if module.endswith("_tasks") and "." not in module]:
        del sys.modules[module]


GOOD = """
from taskd import TaskNamespace, instrumented_task
mail = TaskNamespace("mail", application="shop")
@instrumented_task(name="send", namespace=mail)
def send(): ...
"""


def run(*arguments: str):
    return CliRunner().invoke(app, ["plugins", "list", *arguments], env={"COLUMNS": "200"})


def words(said: str) -> list[list[str]]:
    return [line.split() for line in said.splitlines()]


def test_tasks_of_each_plugin(install):
    install("good", GOOD)
    install("empty", "")
    result = run()
    assert result.exit_code == 0
    assert ["good", "1.2", "main", "shop", "mail", "send"] in words(result.stdout)
    assert ["empty", "1.2", "main", "registers", "no", "task"] in words(result.stdout)


def test_one_that_fails_is_named_and_the_others_are_listed(install):
    install("good", GOOD)
    install("broken", "import missing_thing")
    result = run()
    assert result.exit_code == 1
    assert ["good", "1.2", "main", "shop", "mail", "send"] in words(result.stdout)
    assert (
        "taskd: broken 1.2 (entry point main = broken_tasks) failed to load: "
        "ModuleNotFoundError: No module named 'missing_thing'"
    ) in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("--traceback").stderr


def test_none_installed(install):
    result = run()
    assert (result.exit_code, "no plugin is installed" in result.stdout) == (0, True)
