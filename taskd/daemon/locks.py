"""What a broker holds alone while it runs, and so do the commands that need it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from taskd.config.schema import BrokerConfig
from taskd.daemon.settings import store_path
from taskd.database import hold_lock

LOCK_FILE = "broker.lock"  # in the data folder; the embedded log takes it too when it is used by itself


@contextmanager
def hold_data(config: BrokerConfig) -> Iterator[None]:
    """Hold the data folder, and the store when it lies elsewhere, while the block lasts.

    Raises StartupError: exit 75 when another process holds one, 73 when a folder cannot be written.
    """
    store = store_path(config)
    with ExitStack() as stack:
        stack.enter_context(hold_lock(config.data_dir / LOCK_FILE))
        if store.parent.resolve() != config.data_dir.resolve():
            stack.enter_context(hold_lock(Path(f"{store}.lock")))
        yield
