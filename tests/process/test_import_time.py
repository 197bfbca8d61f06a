"""What `import taskd` must not load; the time it takes follows from that."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

HEAVY = {
    "aiokafka",
    "apsw",
    "asyncio",
    "betterproto2",
    "grpclib",
    "importlib.metadata",
    "multiprocessing",
    "pydantic",
    "structlog",
    "taskd.producer",
    "taskd.wire",
    "trio",
    "typing_extensions",
}


def loaded_by(statements: str) -> set[str]:
    program = f"import sys; {statements}; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_import_taskd_is_light() -> None:
    assert not (loaded_by("import taskd") - loaded_by("pass")) & HEAVY


def test_a_plugin_that_registers_tasks_stays_light() -> None:
    statements = (
        "import taskd; taskd.configure(log='kafka'); n = taskd.TaskNamespace('n'); n.register('t')(print)"
    )
    assert not (loaded_by(statements) - loaded_by("pass")) & HEAVY
