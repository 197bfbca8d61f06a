"""What a benchmark found, for people and for machines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from taskd.errors import TaskdError


class BenchFailed(TaskdError):
    """A benchmark could not be carried out; the message says what stood in its way."""


class Step(Protocol):
    """Is told how much of a benchmark is done, of 100."""

    def __call__(self, done: int, note: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should be: at least or at most `value`."""

    value: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {_short(self.value)}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that was measured, in `unit`. `detail`: what it is made of, such as its spread."""

    name: str
    value: float
    unit: str
    target: Target | None = None
    detail: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.is_met(self.value)

    def as_json(self) -> dict[str, Any]:
        known = {"name": self.name, "value": self.value, "unit": self.unit, "detail": self.detail}
        if self.target is None:
            return known
        limit = {"at_least" if self.target.at_least else "at_most": self.target.value}
        return known | {"target": limit, "met": self.met}


@dataclass(slots=True)
class Report:
    """Everything one benchmark found."""

    name: str
    machine: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)

    def add(
        self, name: str, value: float, unit: str, *, target: Target | None = None, detail: str = ""
    ) -> None:
        self.figures.append(Figure(name, value, unit, target, detail))

    @property
    def all_met(self) -> bool:
        return all(figure.met is not False for figure in self.figures)

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "machine": self.machine,
            "figures": [figure.as_json() for figure in self.figures],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Name, figure, target, whether it is met, detail."""
        words = {True: "met", False: "MISSED", None: ""}
        return [
            (
                figure.name,
                f"{_short(figure.value)} {figure.unit}",
                "" if figure.target is None else str(figure.target),
                words[figure.met],
                figure.detail,
            )
            for figure in self.figures
        ]


def at_least(value: float) -> Target:
    return Target(value, at_least=True)


def at_most(value: float) -> Target:
    return Target(value, at_least=False)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that so many percent are not above."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def spread(values: Sequence[float], show: Callable[[float], str] | None = None) -> str:
    """Least, median and largest of several rounds."""
    shown = show or _short
    parts = (min(values), statistics.median(values), max(values))
    return " / ".join(map(shown, parts)) + f" in {len(values)} rounds"


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
