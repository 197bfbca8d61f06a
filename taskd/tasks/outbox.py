"""The way out of `.delay()`: where built activations are handed to the log.

The outbox is bound lazily, on the first send, so that importing task modules opens no connection
and reads no configuration. `taskd.configure(...)` names its settings, a test may `bind` a double.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class Call:
    """A task call as the author made it, before it is built into an activation. Durations in seconds.

    Never changed, but not frozen: that would take three times as long to make.
    """

    id: str
    namespace: str
    taskname: str
    application: str
    topic: str  # '': the configured one
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    headers: Mapping[str, str] = field(default_factory=dict)
    processing_deadline_s: int = 10
    expires_s: int | None = None
    delay_s: int | None = None
    attempts: int = 0
    max_attempts: int | None = None  # None: no retry state
    dead_letter: bool = False
    at_most_once: bool = False
    delay_on_retry_s: int | None = None
    compression_type: str = "plaintext"


class Outbox(Protocol):
    """Takes calls; safe to use from any thread."""

    def send(self, call: Call, *, wait: bool) -> None:
        """Hand one call to the log. With `wait`, return once it is durable.

        Raises DeliveryError: it was not scheduled. Without `wait`, failures are logged and counted.
        """
        ...

    def close(self) -> None:
        """Send what waits, then let go of every connection."""
        ...


_bound: Outbox | None = None
_open: Callable[[], Outbox] | None = None
_lock = threading.Lock()


def set_opener(opener: Callable[[], Outbox]) -> None:
    """Name what opens the outbox when the first call is sent; closes the one that is open."""
    global _open
    unbind()
    _open = opener


def bind(outbox: Outbox) -> None:
    """Use this outbox from now on."""
    global _bound
    with _lock:
        _bound = outbox


def unbind() -> None:
    """Close the outbox, if one is open in this process; the next call opens a new one."""
    global _bound
    with _lock:
        outbox, _bound = _bound, None
    if outbox is not None:
        outbox.close()


def current_outbox() -> Outbox:
    """The outbox of this process, opened now if need be. A forked child opens its own.

    Raises ConfigError when what the environment or `taskd.configure()` says is not valid.
    """
    global _bound
    with _lock:
        if _bound is None:
            if _open is None:
                raise RuntimeError("no outbox is bound; call taskd.configure() or taskd.tasks.outbox.bind()")
            _bound = _open()
        return _bound


def _after_fork_in_child() -> None:
    # The parent's outbox keeps its thread and connections in the parent; its lock may have been held
    # by a thread that does not exist here.
    global _bound, _lock
    _bound = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
