"""One child process, seen from the worker: start it, feed it, hear from it, end it.

`Spawner` and `Child` are the seam that flow tests put a scripted child behind; `ProcessSpawner` is
the real thing.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import NamedTuple, Protocol

import trio

from taskd.errors import StartupError, TaskdError
from taskd.worker import descendants
from taskd.worker import entry_pipe as pipe

READ_BYTES = 65_536
EXIT_WITHIN_S = 2.0  # for an idle child that was told to go: its atexit handlers run


class ChildGone(TaskdError):
    """The child process ended."""


class Piece(NamedTuple):
    """A piece of work. `start_within_s`: from now, or not at all. The rest as in `entry_pipe.Work`."""

    activation: bytes
    start_within_s: float | None = None
    fence: int = 0
    deadline_s: float = 10.0
    max_deadline_s: float | None = None


class Child(Protocol):
    """One child that said it is ready. Use it from one Trio run; `send` and `receive` from two tasks."""

    pid: int
    ready: pipe.Ready

    async def send(self, work: Sequence[Piece]) -> None:
        """Write pieces of work.

        They are numbered from 1 in the order sent. A child that ended takes them silently: `receive`
        is who tells. A cancelled send leaves the child unusable.
        """
        ...

    async def receive(self) -> list[pipe.Report]:
        """Whatever was reported, at least one.

        Raises ChildGone once the process ended and all it wrote was returned, ProtocolViolation
        when something else than reports was written. Cancelling loses nothing.
        """
        ...

    def take_back(self) -> int:
        """Take back what the child has not begun to look at: that many of the pieces sent last."""
        ...

    def dismiss(self) -> None:
        """No more work will come: the child exits when it has done what it has."""
        ...

    def has_started(self) -> bool:
        """Whether processes live that the child started."""
        ...

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        """Have the child see to the task with this number; without effect when it is at another one."""
        ...

    def terminate(self, number: int) -> None:
        """Have the child leave if it is at this task, and whatever it started end as by SIGTERM.

        For a child that has nothing else to begin: those processes get the signal in any case.
        """
        ...

    def kill(self) -> None:
        """End the child and everything it started in its process group, at once."""
        ...


class Spawner(Protocol):
    def open(self) -> AbstractAsyncContextManager[Child]:
        """A child, ready. Leaving the block ends it.

        Raises StartupError: it could not start, or did not say that it is ready.
        """
        ...


class ProcessSpawner:
    """Starts `python -m PROGRAM`, which is entry.py or does as it does.

    `modules`: imported in the child besides the installed plugins, for tasks that are not packaged.
    `environment`: replaces the worker's own. `shares_step`: the program takes one descriptor more, of
    memory in which it keeps the number of the activation that it is at.
    """

    def __init__(
        self,
        *,
        modules: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        ready_within_s: float = 60.0,
        program: str = "taskd.worker.entry",
        shares_step: bool = False,
    ) -> None:
        self._program = program
        self._shares_step = shares_step
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
            raise StartupError(f"a child process did not start: {error}; its stderr says why") from None
        if not isinstance(reports[0], pipe.Ready):
            raise StartupError(f"a child process began with {reports[0]!r:.100}, expected Ready")
        child.ready = reports[0]

    def _start(self) -> ProcessChild:
        fds: list[int] = []
        try:
            for _ in range(4):
                fds += os.pipe()
            work_read, work_write, token_read, token_write, report_read, report_write = fds[:6]
            order_read, order_write = fds[6:]
            theirs = [work_read, token_read, report_write, order_read]
            if self._shares_step:
                fds.append(os.memfd_create("taskd-step"))
                os.ftruncate(fds[-1], pipe.STEP_BYTES)
                theirs.append(fds[-1])
            command = [sys.executable, "-P", "-m", self._program]
            command += [str(number) for number in (*theirs, os.getpid())]
            for module in self._modules:
                command += ["--tasks", module]
            # Not trio.lowlevel.open_process: it starts processes from a thread that ends when idle, and
            # a child that asked to die with its parent dies with the *thread* that started it (prctl(2)).
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=theirs,
                start_new_session=True,  # a process group of its own, out of reach of the terminal's signals
            )
            pidfd = _pidfd(process)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise StartupError(f"cannot start a child process: {error}") from None
        step = mmap.mmap(fds[-1], pipe.STEP_BYTES) if self._shares_step else None
        for fd in (work_read, report_write, order_read, *fds[8:]):
            os.close(fd)
        return ProcessChild(
            process, pidfd, work_write, token_read, token_write, report_read, order_write, step
        )


class ProcessChild:
    """Implements `Child`. Its spawner closes it."""

    ready = pipe.Ready(())

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        pidfd: int,
        work: int,
        token_read: int,
        token_write: int,
        reports: int,
        orders: int,
        step: mmap.mmap | None = None,
    ) -> None:
        self.pid = process.pid
        self._step = step
        self._process = process
        self._work = trio.lowlevel.FdStream(work)
        self._token_read = token_read
        self._token_write = token_write
        self._dismissed = False
        self._reports = reports
        self._orders = orders
        for fd in (token_read, token_write, reports, orders):
            os.set_blocking(fd, False)
        self._splitter = pipe.Splitter(pipe.MAX_REPORT_BYTES)
        self._pidfd = pidfd
        # One thing to wait for: a report, or the end of the process. The end of file alone would not do,
        # a grandchild may have inherited the pipe.
        self._either = select.epoll()
        self._either.register(reports, select.EPOLLIN)
        self._either.register(self._pidfd, select.EPOLLIN)
        self._ended = False

    async def send(self, work: Sequence[Piece]) -> None:
        frames = b"".join(map(_frame, work))
        # Tokens first: a child that waits for a token would never read a frame that fills the pipe.
        os.write(self._token_write, pipe.TOKEN_RUN * len(work))
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._work.send_all(frames)

    async def receive(self) -> list[pipe.Report]:
        while True:
            await trio.lowlevel.checkpoint()
            try:
                data = os.read(self._reports, READ_BYTES)
            except BlockingIOError:
                if self._ended:
                    raise ChildGone(await self._obituary()) from None
                if not self._has_ended():  # else read once more: it may have written in between
                    await trio.lowlevel.wait_readable(self._either.fileno())
                continue
            if not data:
                raise ChildGone(await self._obituary())
            self._splitter.feed(data)
            if reports := [pipe.decode_report(frame) for frame in self._splitter]:
                return reports

    def take_back(self) -> int:
        try:
            taken = len(os.read(self._token_read, READ_BYTES))
        except BlockingIOError:
            return 0
        if not self._dismissed:
            os.write(self._token_write, pipe.TOKEN_SKIP * taken)
        return taken

    def dismiss(self) -> None:
        if not self._dismissed:
            self._dismissed = True
            os.close(self._token_write)

    def has_started(self) -> bool:
        return bool(descendants.of(self.pid))

    def stepping(self) -> int:
        return 0 if self._step is None else int.from_bytes(self._step[: pipe.STEP_BYTES], sys.byteorder)

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        self._write_order(kind, number)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def terminate(self, number: int) -> None:
        self._write_order(pipe.OrderKind.END, number)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGTERM)

    def _write_order(self, kind: pipe.OrderKind, number: int) -> None:
        # Full: it has read none of some thousands, and will not miss this one. Broken: it closed its end.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._orders, pipe.encode_order(pipe.Order(kind, number)))

    def kill(self) -> None:
        # The process is reaped in aclose only, so its number cannot have been given to another one.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def aclose(self) -> None:
        """End the process, let go of every descriptor, leave no zombie."""
        self.dismiss()
        with trio.move_on_after(EXIT_WITHIN_S):
            await self._wait()
        self.kill()  # also when it went by itself: what it started goes with it
        await self._wait()
        self._process.wait()
        await self._work.aclose()
        self._either.close()
        for fd in (self._pidfd, self._reports, self._token_read, self._orders):
            os.close(fd)
        if self._step is not None:
            self._step.close()  # it has a descriptor of its own

    async def _wait(self) -> None:
        if not self._has_ended():
            await trio.lowlevel.wait_readable(self._pidfd)

    def _has_ended(self) -> bool:
        if not self._ended:
            self._ended = self._exit() is not None
        return self._ended

    def _exit(self) -> os.waitid_result | None:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    async def _obituary(self) -> str:
        """How it ended. A child that closed its pipe and lives on is no use, and is killed."""
        with trio.move_on_after(EXIT_WITHIN_S) as grace:
            await self._wait()
        if grace.cancelled_caught:
            self.kill()
            return f"child {self.pid} closed its pipe to the worker"
        return f"child {self.pid} {self._cause()}"

    def _cause(self) -> str:
        found = self._exit()
        assert found is not None
        if found.si_code == os.CLD_EXITED:
            return f"exited with status {found.si_status}"
        return f"was ended by signal {_signal_name(found.si_status)}"


def _frame(piece: Piece) -> bytes:
    activation, start_within_s, fence, deadline_s, max_deadline_s = piece
    start_by_ns = pipe.start_by_ns(start_within_s)
    return pipe.encode_work(pipe.Work(activation, start_by_ns, fence, deadline_s, max_deadline_s))


def _pidfd(process: subprocess.Popen[bytes]) -> int:
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait()
        raise


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
