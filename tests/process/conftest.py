"""Surroundings of tests that start real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # modules that tests here share; importlib mode adds none


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, with nothing in it but what was installed from wheels."""

    folder: Path
    wheels: tuple[Path, ...]

    @property
    def variables(self) -> dict[str, str]:
        """As `source bin/activate` would set them; of taskd's own variables none is inherited."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TASKD_")}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return inherited | {"VIRTUAL_ENV": str(self.folder), "PATH": path, "NO_PROXY": "127.0.0.1"}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a program of the environment and return what it wrote to stdout; it must succeed."""
        program = self.folder / "bin" / command[0]
        done = subprocess.run(
            [program, *command[1:]], cwd=cwd, env=self.variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def fresh_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """taskd and its plugins, built as wheels and installed with all their dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    for project in (ROOT, *sorted((ROOT / "plugins").iterdir())):
        if (project / "pyproject.toml").exists():
            build = [
                sys.executable,
                "-m",
                "build",
                "--wheel",
                "--no-isolation",
                "--outdir",
                folder / "wheels",
            ]
            done = subprocess.run([*build, project], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    venv.create(folder / "venv", with_pip=True)
    environment = Environment(folder / "venv", tuple(sorted((folder / "wheels").glob("*.whl"))))
    environment.run("pip", "install", "--quiet", "--disable-pip-version-check", *map(str, environment.wheels))
    yield environment
    shutil.rmtree(folder)  # 200 MB that pytest would keep for three runs
