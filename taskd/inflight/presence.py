"""When each worker was last heard of: a stream lease lives a while past that."""

from __future__ import annotations

from collections.abc import Iterable

from taskd.clock import Clock


class Presence:
    """Workers by id. One never heard of, as after a restart of the broker, counts from the beginning."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_mono_ms = clock.now().mono_ms
        self._seen_mono_ms: dict[str, int] = {}

    def seen(self, worker_id: str) -> None:
        self._seen_mono_ms[worker_id] = self._clock.now().mono_ms

    def silent(self, holders: Iterable[str], for_ms: int) -> list[str]:
        """Those of `holders` not heard of for so long; what holds nothing any more is forgotten."""
        now_ms = self._clock.now().mono_ms
        held = set(holders)
        self._seen_mono_ms = {
            worker: at for worker, at in self._seen_mono_ms.items() if worker in held or now_ms - at < for_ms
        }
        return [worker for worker in held if self.is_silent(worker, for_ms)]

    def is_silent(self, worker: str, for_ms: int) -> bool:
        last_mono_ms = self._seen_mono_ms.get(worker, self._since_mono_ms)
        return self._clock.now().mono_ms - last_mono_ms >= for_ms
