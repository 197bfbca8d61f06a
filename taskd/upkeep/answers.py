"""What the log answered about rows that leave: each is settled, kept for another try, or set aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from taskd.errors import LogUnavailable
from taskd.inflight.base import Leaving, Settlement
from taskd.inflight.writer import Inflight
from taskd.log.base import Forbidden, Position, Rejected
from taskd.upkeep.forbidden import ForbiddenRows

log = structlog.get_logger("taskd.upkeep")


@dataclass(frozen=True, slots=True)
class Answered:
    """`settled`: by id, what the log has durably. `unavailable`: it did not take everything, raise that."""

    settled: dict[str, Settlement]
    unavailable: LogUnavailable | None


async def settle(
    inflight: Inflight,
    forbidden: ForbiddenRows,
    rows: Sequence[Leaving],
    answers: Sequence[Position | Exception],
    settlement: Callable[[Leaving], Settlement],
) -> Answered:
    """Finish the rows that the log took, each as `settlement` says; stick or set aside what it refused."""
    settled: dict[str, Settlement] = {}
    refused: dict[str, str] = {}
    failure: Exception | None = None
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, Rejected):
            log.error("can never be published; kept in the store", id=row.id, why=str(answer))
            await inflight.stick(row.id, str(answer))
        elif isinstance(answer, Forbidden):
            refused[row.id] = str(answer)
        elif isinstance(answer, Exception):
            failure = answer
        else:
            settled[row.id] = settlement(row)
    await inflight.settle(list(settled.values()))
    forbidden.taken(settled)
    await forbidden.refused(refused)
    if failure is None:
        return Answered(settled, None)
    left = len(rows) - len(settled) - len(refused)
    return Answered(settled, LogUnavailable(f"{left} records could not be published: {failure}"))
