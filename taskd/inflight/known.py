"""Which tasks workers say they can run, lane by lane. Immutable: claims carry it into the store's thread."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from taskd.tasks.registry import INTERNAL

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class KnownTasks:
    """`names`: by application and namespace. `applications`: whose workers do not tell names, so any may
    be known; `everything`: such workers serve every application."""

    names: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))
    applications: frozenset[str] = _NONE
    everything: bool = False

    def in_lane(self, application: str, namespace: str) -> frozenset[str] | None:
        """The names known in one lane; None: any may be."""
        if self.everything or application in self.applications:
            return None
        owner = "" if namespace == INTERNAL else application  # taskd's own tasks belong to every application
        return self.names.get((owner, namespace), _NONE)

    def may_serve(self, application: str, namespace: str, anyones: KnownTasks | None) -> bool:
        """Whether a claim of one who knows these should look into a lane: for its rows, or to park some."""
        if self.in_lane(application, namespace) != _NONE:
            return True
        return anyones is not None and anyones.in_lane(application, namespace) == _NONE


def known_tasks(
    tasks: Iterable[tuple[str, str, str]],
    applications: Collection[str] = (),
    *,
    everything: bool = False,
) -> KnownTasks:
    """From (application, namespace, task name) triples."""
    names: dict[tuple[str, str], set[str]] = {}
    for application, namespace, taskname in tasks:
        names.setdefault((application, namespace), set()).add(taskname)
    frozen = {lane: frozenset(of_lane) for lane, of_lane in names.items()}
    return KnownTasks(MappingProxyType(frozen), frozenset(applications), everything)
