"""Follows the file of switches: what it says holds within a second of its change.

The file is read in every round and compared by its content: neither a time stamp too coarse for two
changes nor a file swapped underneath (as containers' volumes do) goes unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import structlog
import trio

from taskd.activation.switches import SwitchSource
from taskd.config.switch_file import MAX_BYTES, SwitchFile, parse_switch_file
from taskd.errors import ConfigError, StoreError
from taskd.inflight.switches import DemotedTo
from taskd.inflight.writer import Inflight
from taskd.telemetry import audit, metrics

log = structlog.get_logger("taskd.switches")


class FollowSwitchFile:
    """Brings the file's switches to the store. `path` None: there is no file, and nothing of one holds.

    A file that is not valid, or not there, leaves in force what it said last, also over a restart;
    every problem is logged, once for each state of the file. `may_demote_to` says why nothing may be
    forwarded to a topic, or nothing when it may.
    """

    def __init__(
        self,
        inflight: Inflight,
        path: Path | None,
        *,
        poll_s: float,
        may_demote_to: Callable[[DemotedTo], str] = lambda target: "",
    ) -> None:
        self._inflight = inflight
        self._path = path
        self._poll_s = poll_s
        self._may_demote_to = may_demote_to
        self._seen: bytes | None = None  # digest of what was read last, or of why it could not be
        self._asked = trio.Event()

    def reload(self) -> None:
        """Read the file now, and say what is wrong with it even if that was said before."""
        self._seen = None
        self._asked.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            self._asked = trio.Event()
            try:
                await self.look()
            except StoreError as error:
                self._seen = None
                log.error("switches not stored, trying again", error=str(error))
            with trio.move_on_after(self._poll_s if self._path is not None else float("inf")):
                await self._asked.wait()

    async def look(self) -> None:
        """Read the file, and apply it if it is not what was read last. Raises StoreError."""
        if self._path is None:
            await self._apply(SwitchFile())
            return
        found: bytes | ConfigError
        try:
            found = await trio.to_thread.run_sync(_content, self._path)
            digest = hashlib.sha256(found).digest()
        except ConfigError as error:
            found, digest = error, str(error).encode()
        if digest == self._seen:
            return
        try:
            if isinstance(found, ConfigError):
                raise found
            parsed = parse_switch_file(found, self._path)
        except ConfigError as error:
            self._report(error)
        else:
            await self._apply(parsed)
            metrics.switch_file_valid.set(1)
        self._seen = digest

    async def _apply(self, parsed: SwitchFile) -> None:
        target = DemotedTo(parsed.demoted_topic, parsed.demoted_topic_cluster)
        demotions = parsed.demotions
        for warning in parsed.warnings:
            log.warning("in the file of switches", problem=f"{self._path}: {warning}")
        why_not = self._may_demote_to(target) if demotions else ""
        if why_not:
            log.error("nothing is demoted", problem=f"{self._path}: {why_not}")
            demotions = ()
        replaced = await self._inflight.replace_switches(
            SwitchSource.FILE, [*parsed.kills, *demotions], target if self._path is not None else None
        )
        for switch in replaced.added:
            audit.switch_set(switch)
        for switch in replaced.removed:
            audit.switch_taken_back(switch, by="file", reason="not in it any more")

    def _report(self, error: ConfigError) -> None:
        metrics.switch_file_valid.set(0)
        metrics.switch_file_errors.inc()
        problems = str(error).splitlines()
        for problem in problems:
            log.error("file of switches is not valid", problem=problem)
        log.error("the switches that it set before hold", problems=len(problems))


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
