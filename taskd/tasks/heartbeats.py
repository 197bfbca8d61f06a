"""Signs of life of one running task, thinned out on their way to whoever watches it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress

from taskd.clock import monotonic_s

INTERVAL_S = 0.25  # between two that are passed on
MAX_MESSAGE_CHARACTERS = 200

Send = Callable[[float | None, str], None]
Later = Callable[[float, Callable[[], None]], None]


def _in_a_thread(delay_s: float, function: Callable[[], None]) -> None:
    timer = threading.Timer(delay_s, function)
    timer.daemon = True
    with suppress(RuntimeError):  # no thread to be had: then the task's next heartbeat goes, not this one
        timer.start()


class Heartbeats:
    """Passes on the newest one at most four times a second; the last one always goes, though late.

    So a task may give one for each row of a loop. `send(progress, message)` gets progress as 0 to 1, or
    None, and a message cut to size; it is called under a lock, from the task's thread or another one.
    `later(delay_s, function)` has the function called after a while.
    """

    def __init__(self, send: Send, *, later: Later = _in_a_thread) -> None:
        self._send = send
        self._later = later
        self._lock = threading.Lock()
        self._sent_at = -math.inf
        self._held: tuple[float | None, str] | None = None
        self._closed = False

    def beat(self, progress: float | None, message: str) -> None:
        """From any thread. Does nothing once closed."""
        now = monotonic_s()
        with self._lock:
            if self._closed:
                return
            left_s = self._sent_at + INTERVAL_S - now
            if left_s <= 0:
                self._pass_on(now, progress, message)
                return
            is_first = self._held is None
            self._held = (progress, message)
        if is_first:
            self._later(left_s, self._flush)

    def close(self) -> None:
        """The task ended: from now on nothing is sent. Call it before the outcome is told."""
        with self._lock:
            self._closed = True
            self._held = None

    def _flush(self) -> None:
        with self._lock:
            if self._held is not None:
                self._pass_on(monotonic_s(), *self._held)

    def _pass_on(self, now: float, progress: float | None, message: str) -> None:
        self._held = None
        self._sent_at = now
        self._send(progress, message)


def checked(progress: object, message: object) -> tuple[float | None, str]:
    """What a task gave, cut to size. Raises TypeError or ValueError in the words of `heartbeat`."""
    if not isinstance(message, str):
        raise TypeError(f"heartbeat: message: expected a text, found {message!r:.100}")
    message = message[:MAX_MESSAGE_CHARACTERS]
    if not message.isascii():  # half a pair of surrogates could not be sent
        message = message.encode("utf-8", "replace").decode()
    if progress is None:
        return None, message
    if not isinstance(progress, int | float) or isinstance(progress, bool) or math.isnan(progress):
        raise ValueError(f"heartbeat: progress: expected a number from 0 to 1, found {progress!r:.100}")
    return min(max(float(progress), 0.0), 1.0), message
