"""The example events are what `taskd submit webhooks:deliver --file` takes."""

from __future__ import annotations

import json
from pathlib import Path

EVENTS = Path(__file__).parents[1] / "examples" / "events.jsonl"


def test_the_example_events_are_calls_of_deliver() -> None:
    calls = [json.loads(line) for line in EVENTS.read_text(encoding="utf-8").splitlines()]
    assert all(set(call) == {"url", "event"} for call in calls)
    assert len({call["event"]["id"] for call in calls}) == 500
    assert len({call["event"]["type"] for call in calls}) == 10
