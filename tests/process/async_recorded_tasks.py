"""Async tasks that write down what they do, as those of recorded_tasks.py, whose namespace has none."""

from __future__ import annotations

import trio
from recorded_tasks import record

from taskd import TaskNamespace

waiting = TaskNamespace("waiting", application="kill-tests", processing_deadline_duration=3_600)


@waiting.register("until")
async def until(key: str, flag: str) -> None:
    """Until there is a file `flag`."""
    record("START", key)
    while not await trio.Path(flag).exists():  # noqa: ASYNC110  # files give no event to wait for
        await trio.sleep(0.02)
    record("END", key)
