"""Audit lines: who ordered what, why and until when; a line for each order and each end of a switch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import structlog

from taskd.activation.switches import Switch

log = structlog.get_logger("taskd.audit")


def switch_set(switch: Switch) -> None:
    _line("switch set", switch, by=switch.author)


def switch_taken_back(switch: Switch, *, by: str, reason: str) -> None:
    _line("switch taken back", switch, by=by, because=reason)


def switch_ended(switch: Switch) -> None:
    """Its time was over."""
    _line("switch ended", switch, by="time")


def cancelled(effects: Mapping[str, Sequence[str]], *, by: str, reason: str) -> None:
    """A part of an order to cancel. `effects`: ids by what was done with them."""
    log.warning("cancel ordered", by=by, reason=reason, **effects)


def _line(event: str, switch: Switch, **who: str) -> None:
    log.warning(
        event,
        number=switch.number,
        kind=switch.kind.value,
        subject=switch.words,
        reason=switch.reason,
        author=switch.author,
        source=switch.source.value,
        until=_time(switch.until_ms),
        **who,
    )


def _time(wall_ms: int | None) -> str:
    if wall_ms is None:
        return "taken back"
    try:
        return datetime.fromtimestamp(wall_ms / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # a year that the calendar does not have
        return f"{wall_ms} ms"
