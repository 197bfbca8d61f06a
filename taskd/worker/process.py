"""Starting children: clean processes of our own interpreter, with pipes to and from them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import trio

from taskd.errors import StartupError
from taskd.worker import descendants, entry_note
from taskd.worker import entry_pipe as pipe
from taskd.worker.child import ChildGone
from taskd.worker.process_child import Ends, ProcessChild


class ProcessSpawner:
    """Starts `python -m PROGRAM`, which is entry.py or does as it does.

    `modules`: imported in the child besides the installed plugins, for tasks that are not packaged.
    `environment`: replaces the worker's own. `shares_step`: the memory that it shares is for steps of a
    loop (entry_async_step.py), not for a note of what began (entry_note.py). `memory_limit_bytes`: of data,
    for the child and for each process it starts, which then get MemoryError; 0: no limit.
    """

    def __init__(
        self,
        *,
        modules: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        ready_within_s: float = 60.0,
        program: str = "taskd.worker.entry",
        shares_step: bool = False,
        memory_limit_bytes: int = 0,
    ) -> None:
        self._program = program
        self._shares_step = shares_step
        self._memory_limit_bytes = memory_limit_bytes
        self._modules = tuple(modules)
        self._environment = environment
        self._ready_within_s = ready_within_s

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ProcessChild]:
        child = self._start()
        try:
            try:
                await self._await_ready(child)
            except BaseException:
                child.kill()
                raise
            yield child
        finally:
            with trio.CancelScope(shield=True):
                await child.aclose()

    async def _await_ready(self, child: ProcessChild) -> None:
        try:
            with trio.fail_after(self._ready_within_s):
                reports = await child.receive()
        except trio.TooSlowError:
            raise StartupError(
                f"a child process was not ready within {self._ready_within_s:g} s; "
                "does a plugin wait for something while it is imported?"
            ) from None
        except (ChildGone, pipe.ProtocolViolation) as error:
            raise StartupError(
                f"a child process did not start: {error}; what it printed is in the log"
            ) from None
        if not isinstance(reports[0], pipe.Ready):
            raise StartupError(f"a child process began with {reports[0]!r:.100}, expected Ready")
        child.ready = reports[0]

    def _start(self) -> ProcessChild:
        fds: list[int] = []
        try:
            for _ in range(6):
                fds += os.pipe()
            work_read, work_write, token_read, token_write, report_read, report_write = fds[:6]
            order_read, order_write, out_read, out_write, error_read, error_write = fds[6:]
            shared_bytes = pipe.STEP_BYTES if self._shares_step else entry_note.NOTE_BYTES
            fds.append(os.memfd_create("taskd-child"))
            os.ftruncate(fds[-1], shared_bytes)
            theirs = [work_read, token_read, report_write, order_read, fds[-1]]
            mark = uuid.uuid4().hex
            inherited = os.environ if self._environment is None else self._environment
            # Not trio.lowlevel.open_process: it starts processes from a thread that ends when idle, and
            # a child that asked to die with its parent dies with the *thread* that started it (prctl(2)).
            process = subprocess.Popen(
                self._command(theirs),
                stdin=subprocess.DEVNULL,
                stdout=out_write,
                stderr=error_write,
                env={**inherited, descendants.MARK: mark},
                pass_fds=theirs,
                start_new_session=True,  # a process group of its own, out of reach of the terminal's signals
            )
            pidfd = _pidfd(process)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise StartupError(f"cannot start a child process: {error}") from None
        shared = mmap.mmap(fds[-1], shared_bytes)
        for fd in (work_read, report_write, order_read, out_write, error_write, *fds[12:]):
            os.close(fd)
        ends = Ends(work_write, token_read, token_write, report_read, order_write, out_read, error_read)
        return ProcessChild(process, pidfd, mark, ends, shared, shares_step=self._shares_step)

    def _command(self, descriptors: Sequence[int]) -> list[str]:
        command = [sys.executable, "-P", "-m", self._program]
        command += [str(number) for number in (*descriptors, os.getpid())]
        if self._memory_limit_bytes:
            command += ["--memory-limit", str(self._memory_limit_bytes)]
        for module in self._modules:
            command += ["--tasks", module]
        return command


def _pidfd(process: subprocess.Popen[bytes]) -> int:
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait()
        raise
