"""What is shipped works: wheels are built, installed into a new environment, and used there."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Environment

pytestmark = [pytest.mark.process, pytest.mark.slow]


def test_a_wheel_of_each_project(fresh_environment: Environment) -> None:
    names = {wheel.name.split("-")[0] for wheel in fresh_environment.wheels}
    assert names == {"taskd", "taskd_demo", "taskd_webhooks"}


def test_wheels_hold_the_packages_and_nothing_else(fresh_environment: Environment) -> None:
    for wheel in fresh_environment.wheels:
        package = wheel.name.split("-")[0]
        names = zipfile.ZipFile(wheel).namelist()
        assert {name.split("/")[0] for name in names} == {package, f"{package}-0.1.0.dist-info"}
        assert f"{package}/py.typed" in names


def test_the_store_finds_its_sql(fresh_environment: Environment) -> None:
    (taskd,) = (wheel for wheel in fresh_environment.wheels if wheel.name.startswith("taskd-"))
    root = Path(__file__).parents[2]
    sql = {path.relative_to(root).as_posix() for path in (root / "taskd").rglob("*.sql")}
    assert sql
    assert sql <= set(zipfile.ZipFile(taskd).namelist())


def test_help(fresh_environment: Environment) -> None:
    said = fresh_environment.run("taskd", "--help")
    for command in ("broker", "worker", "dev", "submit", "status", "plugins"):
        assert command in said


def test_plugins_list(fresh_environment: Environment, tmp_path: Path) -> None:
    said = fresh_environment.run("taskd", "plugins", "list", cwd=tmp_path)
    for expected in ("taskd-demo", "taskd-webhooks", "0.1.0"):
        assert expected in said


def test_the_environment_is_its_own(fresh_environment: Environment, tmp_path: Path) -> None:
    where = fresh_environment.run("python", "-c", "import taskd; print(taskd.__file__)", cwd=tmp_path)
    assert where.startswith(os.fspath(fresh_environment.folder))
