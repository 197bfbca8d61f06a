"""Health means progress: each part says when it last got on, and a stuck one turns readiness off."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from taskd.clock import Clock
from taskd.daemon.feeding import Feeding
from taskd.dispatch.push import PushDispatch
from taskd.inflight.writer import Inflight
from taskd.upkeep.duties import Duty, Upkeep
from taskd.web.health import PartHealth

STUCK_AFTER_MS = 30_000  # every part gets on at least every few seconds, also when there is nothing to do


class BrokerHealth:
    """What `/readyz` and the gRPC health service ask."""

    def __init__(
        self,
        clock: Clock,
        upkeep: Upkeep,
        feeding: Feeding,
        inflight: Inflight,
        draining: trio.Event,
        push: PushDispatch | None = None,
    ) -> None:
        self._push = push
        self._clock = clock
        self._upkeep = upkeep
        self._feeding = feeding
        self._inflight = inflight
        self._draining = draining

    def parts(self) -> Mapping[str, PartHealth]:
        return {
            "log": self._log(),
            "ingest": self._ingest(),
            "store": self._store(),
            "upkeep": self._duties(),
            "dispatch": self._dispatch(),
        }

    def serving(self) -> bool:
        return not self._draining.is_set()

    def stuck(self) -> str:
        """What a restart may mend, in words: a part that neither gets on nor fails.

        An outage elsewhere is none; so duties that wait for the log do not count, nor does a full disk.
        """
        if self._inflight.trouble:
            return ""
        reader, ingest = self._feeding.reader, self._feeding.ingest
        found = {
            duty.name: self._resting_too_long(duty)
            for duty in self._upkeep.duties
            if not duty.publishes and not duty.failing
        }
        reading = reader is not None and reader.healthy and not self._feeding.ended.is_set()
        if ingest is not None and reading and not ingest.failing:
            found["ingest"] = self._stuck(ingest.last_progress_mono_ms)
        return "; ".join(f"{name}: {trouble}" for name, trouble in found.items() if trouble)

    def _dispatch(self) -> PartHealth:
        if not self.serving():
            return PartHealth(False, "stopping")
        # Workers that do not take pushes are their own trouble: the broker serves the others.
        return PartHealth(True, "; ".join(self._push.troubles() if self._push is not None else ()))

    def _store(self) -> PartHealth:
        trouble = self._inflight.trouble
        return PartHealth(not trouble, f"takes nothing: {trouble}" if trouble else self._inflight.notice)

    def _log(self) -> PartHealth:
        reader = self._feeding.reader
        if reader is None:
            return PartHealth(False, "not connected yet")
        return PartHealth(reader.healthy, "" if reader.healthy else "the log cannot be reached")

    def _ingest(self) -> PartHealth:
        reader, ingest = self._feeding.reader, self._feeding.ingest
        if reader is None or ingest is None:
            return PartHealth(False, "waits for the log")
        trouble = ingest.failing or self._stuck(ingest.last_progress_mono_ms)
        if trouble:
            return PartHealth(False, trouble)
        if not reader.assigned:
            return PartHealth(True, "has no partitions, or not yet")
        return PartHealth(True, "; ".join(f"reading pauses: {why}" for why in ingest.paused.values()))

    def _duties(self) -> PartHealth:
        troubles = [
            f"{duty.name}: {trouble}"
            for duty in self._upkeep.duties
            if (trouble := duty.failing or duty.trouble() or self._resting_too_long(duty))
        ]
        return PartHealth(not troubles, "; ".join(troubles))

    def _resting_too_long(self, duty: Duty) -> str:
        return self._stuck(duty.last_progress_mono_ms, duty.every_s())

    def _stuck(self, last_progress_mono_ms: int, rests_s: float = 0) -> str:
        """In words; "" while it is within the time it may rest and be busy."""
        silent_ms = self._clock.now().mono_ms - last_progress_mono_ms
        allowed_ms = STUCK_AFTER_MS + rests_s * 1000
        return f"no progress for {silent_ms // 1000} s" if silent_ms > allowed_ms else ""
