"""The main job, end to end: 500 events go through taskd to a receiver that fails now and then.

    python demo.py --log embedded     broker and worker are `taskd dev`, nothing else is needed
    python demo.py --log kafka        `taskd broker` and `taskd worker` over Kafka

An application hands events to the log; the broker takes them from there and hands them to the worker, whose
child processes post them. What is not taken is tried again, what never is becomes a dead letter. In the
end the books are balanced against what the receiver saw; the exit code is 0 only when nothing was lost
and everything stopped as it should.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio
from demo_daemons import DemoFailed, taskd_running
from moody_receiver import Receipts, mood_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from taskd_webhooks.tasks import deliver
from taskd_webhooks.testing import open_receiver

import taskd
from taskd import aio
from taskd.admin.wait import Final, wait_for
from taskd.errors import TaskdError
from taskd.rpc.client import connect
from taskd.signals import stop_on_signals
from taskd.tasks import outbox
from taskd.testing.kafka import open_local_kafka

EVENTS = Path(__file__).with_name("events.jsonl")
FINISH_WITHIN_S = 60.0


def run(console: Console, kafka: str | None, folder: Path) -> Balance:
    receipts = Receipts(secret=secrets.token_hex(32))
    with (
        open_receiver(receipts.answer) as receiver,
        taskd_running(kafka, folder, receipts.secret) as running,
    ):
        taskd.configure(**running.producer)
        calls = read_calls(receiver.url)
        began_s = time.monotonic()
        with progress(console, "submitted", len(calls)) as step:
            ids, handed_in_s = submit(calls, step)
        with progress(console, "finished", len(calls)) as step:
            ends = trio.run(wait_for_the_end, running.address, ids, step)
        seconds = time.monotonic() - began_s
        outbox.unbind()  # lets go of the log before it is stopped
        if not ends:
            raise KeyboardInterrupt
    return balance(list(handed_in_s), ends, receipts, handed_in_s, seconds)


# ---- the application --------------------------------------------------------------------------------


def read_calls(receiver_url: str) -> list[dict[str, Any]]:
    """The arguments of `deliver` for each example event, sent to our receiver instead."""
    calls = [json.loads(line) for line in EVENTS.read_text(encoding="utf-8").splitlines()]
    return [call | {"url": receiver_url + urlsplit(call["url"]).path} for call in calls]


def submit(calls: list[dict[str, Any]], step: Callable[[int], None]) -> tuple[list[str], dict[str, float]]:
    """What an application does: `deliver.delay(...)` for each event.

    Returns the activations' ids, and by event id the moment it was handed in.
    """
    ids, handed_in_s = [], {}
    for count, call in enumerate(calls, 1):
        handed_in_s[call["event"]["id"]] = time.monotonic()
        ids.append(deliver.delay(**call))
        step(count)
    return ids, handed_in_s


async def wait_for_the_end(address: str, ids: list[str], step: Callable[[int], None]) -> list[Final]:
    """How each activation ended, its retries included; in the order of `ids`. Empty: a signal came first."""
    ends: list[Final] = []
    async with (
        stop_on_signals() as stop,
        aio.open_loop(),
        connect(address) as client,
        trio.open_nursery() as nursery,
    ):

        async def give_up_on_signal() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up_on_signal)
        ends = await wait_for(client, ids, on_progress=lambda now: step(now.done), timeout_s=FINISH_WITHIN_S)
        nursery.cancel_scope.cancel()
    return ends


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far something is: a bar on a terminal, elsewhere a line at every fifth of the way."""
    if console.is_terminal:
        columns = [TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn()]
        with ProgressBar(*columns, console=console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    shown = 0

    def line(done: int) -> None:
        nonlocal shown
        if done * 5 // total > shown * 5 // total:
            shown = done
            console.print(f"{title}: {done} of {total}")

    yield line


# ---- the balance ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Balance:
    """What became of the events, and what is wrong with it."""

    figures: dict[str, str]
    problems: list[str]


def balance(
    events: list[str], ends: list[Final], receipts: Receipts, handed_in_s: dict[str, float], seconds: float
) -> Balance:
    """Compare how each event ended in taskd with what the receiver saw and with what its mood demands."""
    problems = [
        problem
        for event_id, end in zip(events, ends, strict=True)
        if (problem := judge(event_id, end, receipts.taken[event_id]))
    ]
    lost = len(problems)
    if receipts.forged:
        problems.append(f"{receipts.forged} requests had no valid signature")
    p50_ms, p99_ms = percentiles(
        [(taken_s - handed_in_s[event]) * 1000 for event, taken_s in receipts.taken_at_s.items()]
    )
    figures = {
        "events": f"{len(events)}",
        "delivered": f"{len(receipts.taken)}",
        "delivered more than once": f"{sum(times > 1 for times in receipts.taken.values())}",
        "retried": f"{sum(end.retries > 0 for end in ends)}",
        "failed": f"{sum(end.outcome == 'failed' for end in ends)}",
        "dead-lettered": f"{sum(end.dead_lettered for end in ends)}",
        "lost": f"{lost}",
        "seconds": f"{seconds:.1f}",
        "latency p50": f"{p50_ms:.0f} ms",
        "latency p99": f"{p99_ms:.0f} ms",
    }
    return Balance(figures, problems)


def judge(event_id: str, end: Final, times_taken: int) -> str | None:
    """What is wrong with the way an event ended, or None."""
    said = f"taskd says {end.outcome}" + (f" ({end.error.strip().splitlines()[-1]})" if end.error else "")
    if mood_of(event_id).times is None:
        if end.outcome != "failed" or not end.dead_lettered:
            return f"{event_id} should have become a dead letter, {said}"
        return None
    if not times_taken:
        return f"{event_id} never reached the receiver, {said}"
    if end.outcome != "complete":
        return f"{event_id} reached the receiver, but {said}"
    return None


def percentiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (sum(values), sum(values))
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[98]


def show(console: Console, result: Balance) -> None:
    table = Table(show_header=False, title="what became of the events", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, value in result.figures.items():
        table.add_row(name, value)
    console.print(table)
    for problem in result.problems[:20]:
        console.print(problem, style="red", highlight=False)
    if len(result.problems) > 20:
        console.print(f"… and {len(result.problems) - 20} more", style="red")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", choices=["embedded", "kafka"], default="embedded", help="which log to use")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # every block is left, as after Ctrl-C
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="taskd-demo-"))
    try:
        with ExitStack() as stack:
            kafka = stack.enter_context(open_local_kafka()) if arguments.log == "kafka" else None
            result = run(console, kafka, folder)
    except (DemoFailed, TaskdError) as error:
        console.print(f"the demo failed: {error}", style="red", markup=False, highlight=False)
        console.print(f"data and logs are kept in {folder}")
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        console.print("interrupted; everything is stopped")
        return 130
    show(console, result)
    if result.problems:
        console.print(f"data and logs are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
