"""Async tasks that do to their loop what tasks of the world do; imported by children in tests."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import trio

from taskd import CurrentTask, Retry, TaskNamespace, current_task, retry_task
from taskd.activation.retry import ProcessingDeadlineExceeded

tests = TaskNamespace("tests", application="app")


@tests.register("sync_noop")
def sync_noop() -> None:
    pass


@tests.register("noop")
async def noop() -> None:
    await trio.lowlevel.checkpoint()


@tests.register("sleeps", retry=Retry(times=3, on=(ProcessingDeadlineExceeded,), delay=7))
async def sleeps(seconds: float) -> None:
    await trio.sleep(seconds)


class Meeting:
    def __init__(self) -> None:
        self.here = 0
        self.complete = trio.Event()


_meeting = Meeting()


@tests.register("meets")
async def meets(count: int) -> None:
    """Ends when so many of them are there at once."""
    _meeting.here += 1
    if _meeting.here == count:
        _meeting.complete.set()
    await _meeting.complete.wait()


@tests.register("shields")
async def shields() -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(60)


@tests.register("cleans_up")
async def cleans_up(path: str) -> None:
    try:
        await trio.sleep(60)
    finally:
        Path(path).write_text("clean")  # noqa: ASYNC240 - short, and must not wait in a cancelled task


@tests.register("blocks")
async def blocks() -> None:
    time.sleep(60)  # noqa: ASYNC251 - the mistake that this is about


@tests.register("blocks_in_c")
async def blocks_in_c() -> None:
    sum(range(10**12))  # holds the interpreter's lock for hours: no Python code can interrupt it


@tests.register("segfaults")
async def segfaults() -> None:
    ctypes.string_at(0)


@tests.register("raises_in_nursery", retry=Retry(times=3, on=(ValueError,)))
async def raises_in_nursery(message: str) -> None:
    async def fails() -> None:
        raise ValueError(message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails)
        nursery.start_soon(trio.sleep_forever)


@tests.register("asks", retry=Retry(times=2))
async def asks() -> None:
    retry_task(delay=11)


@tests.register("interrupted")
async def interrupted() -> None:
    raise KeyboardInterrupt


@tests.register("forks")
async def forks(path: str) -> None:
    if os.fork() == 0:
        await trio.lowlevel.checkpoint()
        Path(path).write_text("the copy went on with the loop")  # noqa: ASYNC240


@tests.register("writes_its_name")
async def writes_its_name(folder: str) -> None:
    """As seen by itself, by a task of its nursery and by a thread."""

    async def look() -> None:
        found.append(_name(current_task()))

    found: list[str] = []
    await trio.sleep(0.01)  # so that others come in between
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
    found += [_name(current_task()), _name(await trio.to_thread.run_sync(current_task))]
    task = current_task()
    assert task is not None
    (Path(folder) / task.id).write_text(",".join(found))


def _name(task: CurrentTask | None) -> str:
    return f"{task.id} {task.fence}" if task else "nobody"


@tests.register("beats")
async def beats(times: int) -> None:
    """Each heartbeat moves the deadline a little further."""
    task = current_task()
    assert task is not None
    for number in range(times):
        await trio.sleep(0.3)
        task.heartbeat(progress=(number + 1) / times, message=f"{number + 1} of {times}")


@tests.register("writes")
async def writes(text: str) -> None:
    sys.stdout.write(text)
    await trio.lowlevel.checkpoint()
