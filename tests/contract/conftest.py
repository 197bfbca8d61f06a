"""Brokers that run as a user runs them, for tests that walk the contract from outside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "process")]  # shared modules; importlib mode adds none

from running_broker import RunningBroker  # noqa: E402  # found by the line above

StartBroker = Callable[..., RunningBroker]


@pytest.fixture(scope="module")
def start_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartBroker]:
    """`start_broker(SECTION__KEY="value", …)`: a broker process that ends with the module, if not before.

    `data_dir`: on the folder of another that ended.
    """
    with ExitStack() as stack:

        def start(data_dir: Path | None = None, **settings: str) -> RunningBroker:
            folder = data_dir or tmp_path_factory.mktemp("broker") / "data"
            return stack.enter_context(RunningBroker(folder, settings))

        yield start
