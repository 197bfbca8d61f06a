"""One activation on the loop of an async child: its scope, its deadline, its verdict."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import CoroutineType
from typing import Any, Protocol

import outcome
import trio

import taskd.worker.entry_pipe as pipe
from taskd.tasks.current import running
from taskd.tasks.heartbeats import Heartbeats
from taskd.worker import entry_run
from taskd.worker.entry_run import Run

_FILES = (trio.__file__, outcome.__file__)
_NOT_THEIRS = (__file__, *(str(Path(file).parent) for file in _FILES if file))


class Host(Protocol):
    """Who takes what an activation has to say. Called in the loop."""

    def done(self, report: pipe.Done) -> None: ...
    def heartbeat(self, report: pipe.Heartbeat) -> None: ...


def lone(error: BaseException) -> BaseException:
    """The one error in a group of one: nurseries make groups, policies are about what was raised in them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _place(error: BaseException) -> str:
    """Where a task was when its scope ended, without what is Trio's and ours."""
    if not isinstance(error, trio.Cancelled):
        return entry_run.describe(error) + "\n"
    frames = traceback.extract_tb(error.__traceback__)
    return "".join(traceback.format_list([it for it in frames if not it.filename.startswith(_NOT_THEIRS)]))


class Activity:
    """Run it once, with `run`. Implements `taskd.tasks.current.Supervisor`.

    Its scope ends at the deadline, which the task's own heartbeats move, or by `cancel`. What it does then
    is the task's affair: the worker kills the child of one that shields itself for longer than its grace.
    """

    def __init__(self, host: Host, number: int, work: pipe.Work, run: Run) -> None:
        self.number = number
        self._host = host
        self._run = run
        self._context = entry_run.context(run, work.fence, self)
        self._deadline_s = work.deadline_s
        self._scope = trio.CancelScope(deadline=trio.current_time() + work.deadline_s)
        begin = time.monotonic()
        self._end = begin + work.deadline_s
        self._last_end = float("inf") if work.max_deadline_s is None else begin + work.max_deadline_s
        self._beats: Heartbeats | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._cancelled = False
        self._was_at = ""  # the traceback of what the end of the scope broke off

    def __str__(self) -> str:
        return f"{self._run.task} {self._run.body.id}"

    # ---- what its task asks, from any thread

    def heartbeat(self, progress: float | None, message: str) -> None:
        if self._beats is None:
            self._beats = Heartbeats(self._send, later=self._later)
        self._beats.beat(progress, message)

    def is_cancelled(self) -> bool:
        return self._cancelled

    def remaining_s(self) -> float:
        return self._end - time.monotonic()

    def _send(self, progress: float | None, message: str) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._heard, progress, message)

    def _later(self, delay_s: float, function: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(delay_s)
            function()

        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(lambda: trio.lowlevel.spawn_system_task(wait))

    def _heard(self, progress: float | None, message: str) -> None:
        if self._beats is None:
            return  # it ended meanwhile
        end = min(time.monotonic() + self._deadline_s, max(self._last_end, self._end))
        self._scope.deadline += end - self._end
        self._end = end
        self._host.heartbeat(pipe.Heartbeat(self.number, progress, message))

    # ---- its life

    def cancel(self) -> None:
        """End it: an operator wants so, or its lease is lost."""
        self._cancelled = True
        self._scope.cancel()

    async def run(self) -> None:
        """Nothing a task raises gets out of here."""
        begin_ns = time.perf_counter_ns()
        verdict, quiet = await self._call()
        if self._beats is not None:
            self._beats.close()
            self._beats = None
        entry_run.flush_prints()  # a line without an end would be anybody's
        duration_us = (time.perf_counter_ns() - begin_ns) // 1000
        self._host.done(pipe.Done(self.number, verdict, duration_us, quiet))

    async def _call(self) -> tuple[pipe.Verdict, bool]:
        """The verdict, and whether the author wants it kept quiet."""
        arguments = entry_run.arguments(self._run)
        if isinstance(arguments, pipe.Verdict):
            return arguments, False
        try:
            with running(self._context), self._scope:
                return self._returned(await self._await(arguments))
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: they end the task only
            if not self._scope.cancel_called:
                return entry_run.raised(self._run, lone(error))
            if not self._cancelled:
                return entry_run.timed_out(self._run, lone(error))
            self._was_at = entry_run.describe(error)
        return self._broken_off()

    def _returned(self, value: object) -> tuple[pipe.Verdict, bool]:
        if isinstance(value, CoroutineType):
            value.close()
            text = f"{self._run.task} returned a coroutine, which nobody runs; is an `await` missing?"
            return entry_run.failure("error", text), False
        return pipe.COMPLETE, False

    async def _await(self, arguments: tuple[list[Any], dict[str, Any]]) -> object:
        coroutine: Any = self._run.task.run(*arguments, self._run.body.headers)
        try:
            return await coroutine
        except BaseException as error:
            if self._scope.cancel_called:
                self._was_at = _place(error)
            raise

    def _broken_off(self) -> tuple[pipe.Verdict, bool]:
        if self._cancelled:
            return entry_run.failure("cancelled", self._was_at), False
        text = f"{self._was_at}ended at its processing deadline of {self._deadline_s:g} s"
        verdict = self._run.on_timeout._replace(reason="timeout", error=pipe.cut(text))
        return verdict, not self._run.task.report_timeout_errors
