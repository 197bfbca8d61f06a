"""Health means progress; what makes the watchdog restart a broker is less: only being stuck."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from taskd.clock import Now
from taskd.daemon.health import BrokerHealth
from taskd.upkeep.duties import Duty

NOW_MS = 1_000_000


async def nothing() -> int:
    return 0


def duty(name: str, silent_s: float, **more: Any) -> Duty:
    every_s = more.pop("every_s", 1.0)
    made = Duty(name, nothing, 10, lambda: every_s, **more)
    made.last_progress_mono_ms = NOW_MS - round(silent_s * 1000)
    return made


def health(*duties: Duty, ingest_silent_s: float = 0, **more: Any) -> BrokerHealth:
    """`healthy`, `ended`, `failing`: of what reads the log; `trouble`: of the store."""
    ended = trio.Event()
    if more.get("ended"):
        ended.set()
    feeding = SimpleNamespace(
        reader=SimpleNamespace(healthy=more.get("healthy", True), assigned={1}),
        ingest=SimpleNamespace(
            failing=more.get("failing", ""),
            last_progress_mono_ms=NOW_MS - round(ingest_silent_s * 1000),
            paused={},
        ),
        ended=ended,
    )
    clock = SimpleNamespace(now=lambda: Now(wall_ms=NOW_MS, mono_ms=NOW_MS))
    inflight = SimpleNamespace(trouble=more.get("trouble", ""), notice="")
    parts: Any = (clock, SimpleNamespace(duties=duties), feeding, inflight, trio.Event())
    return BrokerHealth(*parts)


def test_what_gets_on_is_not_stuck() -> None:
    fine = health(duty("expire", 29), duty("publish", 2, publishes=True), ingest_silent_s=29)
    assert fine.stuck() == ""
    assert fine.parts()["upkeep"].ok


def test_what_neither_gets_on_nor_fails_is_stuck() -> None:
    stuck = health(duty("expire", 40), ingest_silent_s=50)
    assert stuck.stuck() == "expire: no progress for 40 s; ingest: no progress for 50 s"
    assert not stuck.parts()["upkeep"].ok


@pytest.mark.parametrize(
    "outage",
    [
        health(duty("publish", 600, publishes=True)),
        health(duty("expire", 600, failing="StoreError: disk")),
        health(duty("expire", 600), trouble="no space left"),
        health(ingest_silent_s=600, healthy=False),
        health(ingest_silent_s=600, failing="the store took no rows"),
        health(ingest_silent_s=600, ended=True),
    ],
    ids=["log away", "duty fails", "disk full", "Kafka away", "store fails", "draining"],
)
def test_an_outage_is_no_reason_to_restart(outage: BrokerHealth) -> None:
    assert outage.stuck() == ""


def test_a_duty_may_rest_as_long_as_it_is_told() -> None:
    resting = health(duty("vacuum", 3_600, every_s=3_600.0))
    assert resting.stuck() == ""
    assert resting.parts()["upkeep"].ok
    assert health(duty("vacuum", 3_700, every_s=3_600.0)).stuck()
