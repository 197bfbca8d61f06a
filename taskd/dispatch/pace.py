"""How fast one address is pushed to: at full width while it takes, else one call at a time after a pause."""

from __future__ import annotations

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
LONGEST_BUSY_PAUSE_S = 1.0  # a busy worker has slots again soon, and has made its caller wait already


class Pace:
    """Times in seconds, of any clock that never goes back."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._pause_s = 0.0
        self._until_s = float("-inf")

    @property
    def failing(self) -> bool:
        return self._pause_s > 0

    def room(self, in_flight: int) -> int:
        """How many more calls may begin. While failing, a single one finds out whether that is over."""
        return max((1 if self.failing else self.width) - in_flight, 0)

    def pause_s(self, now_s: float) -> float:
        """How long to wait before the next call."""
        return max(self._until_s - now_s, 0.0)

    def failed(self, now_s: float, longest_s: float = LONGEST_PAUSE_S) -> None:
        """A call failed; those that fail together make one longer pause, not many."""
        if now_s >= self._until_s:
            self._pause_s = min(max(self._pause_s * 2, FIRST_PAUSE_S), longest_s)
            self._until_s = now_s + self._pause_s

    def succeeded(self) -> None:
        self._pause_s, self._until_s = 0.0, float("-inf")
