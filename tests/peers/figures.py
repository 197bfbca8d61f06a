"""Rates and ratios of a session. A ratio compares two runs that followed each other, never two of an hour."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pair:
    """What taskd did a second, and right after it a peer."""

    round: int
    peer: str
    taskd_per_s: float
    peer_per_s: float

    @property
    def ratio(self) -> float:
        return self.taskd_per_s / self.peer_per_s


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Least, median, largest."""
    return " / ".join(show(value) for value in (min(values), statistics.median(values), max(values)))


def rate(value: float) -> str:
    """Three digits are more than such a figure is good for."""
    digits = len(str(int(value)))
    return f"{round(value, 3 - digits if digits > 3 else 0):,.0f}"


def times(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def table(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """Name, tasks a second, and how many times as fast taskd was; the slowest first, taskd last."""
    if not pairs:
        return []
    peers = {pair.peer: [other for other in pairs if other.peer == pair.peer] for pair in pairs}
    slowest_first = sorted(peers, key=lambda name: statistics.median(pair.peer_per_s for pair in peers[name]))
    rows = [
        (
            name,
            spread([pair.peer_per_s for pair in peers[name]], rate),
            spread([pair.ratio for pair in peers[name]], times),
        )
        for name in slowest_first
    ]
    return [*rows, ("taskd", spread([pair.taskd_per_s for pair in pairs], rate), "")]


def as_json(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [{**vars(pair), "ratio": pair.ratio} for pair in pairs]


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Figures to the right, the first column and the words of the last to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in (1, 2) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
