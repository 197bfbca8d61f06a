"""What needs a real Kafka: skipped without one, run by `make test-kafka`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "process")]  # shared modules; importlib mode adds none

from real_kafka import Listeners  # noqa: E402  # found by the line above

MISSING = "needs Apache Kafka: run `make test-kafka`"


@pytest.fixture(scope="session")
def listeners() -> Listeners:
    """Those of the cluster that `real_kafka.py` started, with credentials."""
    described = os.environ.get("TASKD_TEST_KAFKA_SECURE")
    if not described:
        pytest.skip(MISSING)
    return Listeners(**json.loads(Path(described).read_text()))
