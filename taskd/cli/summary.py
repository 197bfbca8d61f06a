"""What `taskd submit` tells in the end, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskd.admin.wait import Final

EXIT_OK, EXIT_NOT_ALL, EXIT_TASKS_FAILED = 0, 1, 3
IDS_SHOWN = 10


@dataclass(slots=True)
class Summary:
    """`finals` is None when nobody waited."""

    task: str
    total: int
    ids: list[str] = field(default_factory=list)  # of what was sent
    errors: list[str] = field(default_factory=list)  # why the rest was not
    finals: Sequence[Final] | None = None
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        if len(self.ids) < self.total:
            return EXIT_NOT_ALL
        finals = self.finals or ()
        if not all(final.accounted for final in finals):
            return EXIT_NOT_ALL
        return EXIT_OK if all(final.outcome == "complete" for final in finals) else EXIT_TASKS_FAILED

    def figures(self) -> dict[str, int | float | None]:
        figures: dict[str, int | float | None] = {
            "sent": len(self.ids),
            "not_sent": self.total - len(self.ids),
        }
        if self.finals is not None:
            outcomes = Counter(final.outcome for final in self.finals)
            p50_ms, p99_ms = percentiles(self.finals)
            figures |= {
                "complete": outcomes["complete"],
                "retried": sum(final.retries > 0 for final in self.finals),
                "failed": outcomes["failed"],
                "dead_lettered": sum(final.dead_lettered for final in self.finals),
                "expired": outcomes["expired"],
                "dropped": outcomes["dropped"],
                "unfinished": outcomes["unfinished"],
                "forgotten": outcomes["forgotten"],
                "p50_ms": p50_ms,
                "p99_ms": p99_ms,
            }
        figures["seconds"] = round(self.seconds, 3)
        return figures

    def as_json(self) -> dict[str, object]:
        return {"task": self.task, **self.figures(), "errors": self.errors, "ids": self.ids}

    def lines(self) -> list[str]:
        """For people; rare outcomes only where they happened."""
        figures = self.figures()
        rare = ("not_sent", "expired", "dropped", "unfinished", "forgotten", "p50_ms", "p99_ms")
        lines = [
            f"{_title(name):<14}{_shown(name, value)}"
            for name, value in figures.items()
            if value or name not in rare
        ]
        if self.finals is None or len(self.ids) == 1:
            lines += [f"{'id':<14}{id_}" for id_ in self.ids[:IDS_SHOWN]]
            if len(self.ids) > IDS_SHOWN:
                lines.append(f"{'':<14}and {len(self.ids) - IDS_SHOWN} more; --json prints them all")
        return lines + self._troubles()

    def _troubles(self) -> list[str]:
        bad = [final for final in self.finals or () if final.outcome != "complete"]
        lines = [f"{final.outcome:<14}{final.last_id} {_why(final)}".rstrip() for final in bad[:IDS_SHOWN]]
        if len(bad) > IDS_SHOWN:
            lines.append(f"{'':<14}and {len(bad) - IDS_SHOWN} more")
        return lines


def percentiles(finals: Sequence[Final]) -> tuple[int | None, int | None]:
    """The latencies in milliseconds that 50 and 99 of 100 did not exceed; None when none is known."""
    known = sorted(final.latency_ms for final in finals if final.latency_ms is not None)
    if not known:
        return None, None
    return known[_rank(len(known), 50)], known[_rank(len(known), 99)]


def _rank(count: int, percent: int) -> int:
    return -(-count * percent // 100) - 1  # nearest rank


def _title(name: str) -> str:
    return {"dead_lettered": "dead-lettered", "not_sent": "not sent", "p50_ms": "p50", "p99_ms": "p99"}.get(
        name, name
    )


def _shown(name: str, value: float | None) -> str:
    return f"{value} ms" if name.endswith("_ms") else str(value)


def _why(final: Final) -> str:
    if final.outcome == "unfinished":
        return "not known to the broker yet" if final.state == "unknown" else final.state
    return ": ".join(filter(None, (final.reason, final.error)))
