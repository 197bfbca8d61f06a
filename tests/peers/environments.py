"""An environment for each contender, in `.cache/peers`: made when its pinned requirements change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "peers"
STAMP = "requirements-installed"


class Unavailable(Exception):
    """Something that is needed cannot be had here; the message says what and why."""


def prepare(name: str) -> Path:
    """The folder of the contender's programs. Raises Unavailable."""
    if name == "taskd":
        return Path(sys.executable).parent
    return _built() if name == "asynq" else installed(name) / "bin"


def installed(name: str) -> Path:
    """A virtual environment with `requirements/NAME.txt`. Raises Unavailable when pip cannot."""
    wanted = f"{sys.version}\n{(HERE / 'requirements' / f'{name}.txt').read_text()}"
    folder = CACHE / name
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    print(f"setting up {folder}", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], name)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--requirement", str(HERE / "requirements" / f"{name}.txt")], name)
    stamp.write_text(wanted)
    return folder


def _built() -> Path:
    go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    if go is None:
        raise Unavailable("asynq is left out: expected Go 1.25 or newer on PATH, found no `go`")
    folder = CACHE / "asynq"
    # Go looks itself whether there is anything to do.
    _run([go, "build", "-buildvcs=false", "-o", f"{folder}/", "."], "asynq", cwd=HERE / "programs" / "asynq")
    (folder / "noop").replace(folder / "asynq")
    return folder


def _run(command: list[str], name: str, cwd: Path = HERE) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"GOWORK": "off"}, stdout=sys.stderr, check=False
    )
    if done.returncode:
        raise Unavailable(f"{name} cannot be set up: `{' '.join(command)}` failed; what it said is above")
