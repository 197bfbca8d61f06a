"""Shows how far something is, on stderr: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from taskd.cli.exits import stderr_console

LINE_EVERY_S = 5.0


class Step(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def meter(title: str, total: int) -> Iterator[Step]:
    """Give a function to tell how many are done; runs inside Trio."""
    console = stderr_console()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total, note="")

            def draw(done: int, note: str = "") -> None:
                bar.update(task, completed=done, note=note)

            yield draw
        return
    next_line_s = trio.current_time() + LINE_EVERY_S

    def line(done: int, note: str = "") -> None:
        nonlocal next_line_s
        if trio.current_time() >= next_line_s:
            next_line_s = trio.current_time() + LINE_EVERY_S
            text = f"{title}: {done} of {total}" + (f", {note}" if note else "")
            console.print(text, markup=False, soft_wrap=True)

    yield line
