"""What the daemon tells about its parts; `/readyz` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol


class PartHealth(NamedTuple):
    """One part of the daemon. `ok`: it makes progress. `reason`: one sentence, also when all is well."""

    ok: bool
    reason: str = ""


class HealthSource(Protocol):
    def parts(self) -> Mapping[str, PartHealth]:
        """The state of each part now, by name. Cheap: it is asked at every probe."""
        ...
