"""taskd/wire/generated is what `make proto` makes of proto/ today."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "taskd" / "wire" / "generated"


def python_files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}


@pytest.mark.slow
def test_generated_messages_match_their_schemas(tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent  # the compiler's plugin needs ruff on PATH, its neighbour here
    if not (bin_folder / "protoc-gen-python_betterproto2").exists():
        pytest.skip("the compiler is not installed; `make setup` installs it")
    source = ROOT / "proto"
    schemas = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.proto"))
    subprocess.run(
        [
            sys.executable,
            *("-m", "grpc_tools.protoc", "-I", "."),
            f"--python_betterproto2_out={tmp_path}",
            "--python_betterproto2_opt=client_generation=none,server_generation=none",
            *schemas,
        ],
        cwd=source,
        env=os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )
    fresh, kept = python_files(tmp_path), python_files(GENERATED)
    assert fresh.keys() == kept.keys(), "files differ; run `make proto` and commit the result"
    stale = [path for path in fresh if fresh[path] != kept[path]]
    assert not stale, f"{stale} differ from their schemas; run `make proto` and commit the result"
