"""Who can run what: the tasks that connected workers named, and callers that name none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from taskd.clock import Clock
from taskd.inflight.known import KnownTasks, known_tasks
from taskd.wire.frames import CreditKind

CALLER_REMEMBERED_MS = 60_000  # a unary worker that asked so recently may ask again


def by_kind(
    tasks: Iterable[tuple[str, str, str]], async_tasks: Iterable[tuple[str, str, str]]
) -> Mapping[CreditKind, KnownTasks]:
    """What a worker takes while it has room for one kind of task only."""
    of_loop = frozenset(async_tasks)
    plain = frozenset(tasks) - of_loop
    return {CreditKind.ASYNC: known_tasks(of_loop), CreditKind.PLAIN: known_tasks(plain)}


class Roster:
    """Changes when a worker connects or leaves; whoever asked by unary calls counts for a minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._workers: dict[str, tuple[frozenset[tuple[str, str, str]], str | None]] = {}
        self._callers: dict[str | None, int] = {}  # by application, None: any; until (monotonic, ms)
        self._anyone = KnownTasks()
        self._good_until_mono_ms: int | None = None  # None: as long as nobody comes or goes

    def join(
        self, worker_id: str, tasks: Iterable[tuple[str, str, str]], application: str | None
    ) -> KnownTasks | None:
        """A worker connected. What it knows; None: it names no tasks, and may know any of its application."""
        named = frozenset(tasks)
        self._workers[worker_id] = (named, application)
        self._renew()
        return known_tasks(named) if named else None

    def leave(self, worker_id: str) -> None:
        self._workers.pop(worker_id, None)
        self._renew()

    def asked(self, application: str | None) -> None:
        """A caller that names no tasks asked for work of this application, None: of any."""
        is_new = application not in self._callers
        self._callers[application] = self._clock.now().mono_ms + CALLER_REMEMBERED_MS
        if is_new:
            self._renew()

    def anyone(self) -> KnownTasks:
        """What at least one of them may know. The same object as long as nothing changed."""
        if self._good_until_mono_ms is not None and self._clock.now().mono_ms >= self._good_until_mono_ms:
            self._renew()
        return self._anyone

    def _renew(self) -> None:
        now_ms = self._clock.now().mono_ms
        self._callers = {who: until for who, until in self._callers.items() if until > now_ms}
        self._good_until_mono_ms = min(self._callers.values(), default=None)
        silent = [application for named, application in self._workers.values() if not named]
        silent += self._callers
        self._anyone = known_tasks(
            (task for named, _ in self._workers.values() for task in named),
            {application for application in silent if application is not None},
            everything=None in silent,
        )
