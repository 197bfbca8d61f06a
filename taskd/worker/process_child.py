"""A child process: followed through its pipes, ended with all that it started, and told how it ended."""

from __future__ import annotations

import logging
import mmap
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import trio

from taskd.worker import descendants
from taskd.worker import entry_pipe as pipe
from taskd.worker.child import ChildGone, Piece
from taskd.worker.output import Budget, Stream, Whose, nobody
from taskd.worker.starts import LASTS_S, Starts

READ_BYTES = 65_536
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
EXIT_WITHIN_S = 2.0  # for an idle child that was told to go: its atexit handlers run
LOOK_EVERY_S = 0.05  # whether what got SIGTERM ended


class Ends(NamedTuple):
    """The worker's ends of the pipes."""

    work: int
    token_read: int
    token_write: int
    reports: int
    orders: int
    stdout: int
    stderr: int


class ProcessChild:
    """Implements `Child`. Its spawner closes it. `mark` is that of descendants.py."""

    ready = pipe.Ready(())

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        pidfd: int,
        mark: str,
        ends: Ends,
        shared: mmap.mmap,
        *,
        shares_step: bool = False,
    ) -> None:
        self.pid = process.pid
        self.rss_bytes = 0
        self.whose: Whose = nobody
        self._process = process
        self._pidfd = pidfd
        self._mark = mark
        self._ends = ends
        self._shared = shared
        self._shares_step = shares_step
        self._starts = Starts(None if shares_step else shared)
        self._idle = trio.CancelScope()  # while there is nothing to be read
        for fd in ends:
            os.set_blocking(fd, False)
        self._work = trio.lowlevel.FdStream(ends.work)
        self._unwritten = b""  # of what was given
        self._memory = -1  # the system's file on its memory
        self._dismissed = self._alone = self._terminated = self._killed = self._ended = False
        self._exit_by = float("inf")  # set when it closed its pipe
        self._splitter = pipe.Splitter(pipe.MAX_REPORT_BYTES)
        self._budget = Budget()
        self._outputs = [
            Stream(ends.stdout, "stdout", logging.INFO, self._budget),
            Stream(ends.stderr, "stderr", logging.WARNING, self._budget),
        ]
        # One thing to wait for: a report, output, or the end of the process. The end of file alone would
        # not do, a grandchild may have inherited the pipes.
        self._any = select.epoll()
        for fd in (ends.reports, ends.stdout, ends.stderr, pidfd):
            self._any.register(fd, select.EPOLLIN)

    def give(self, work: Sequence[Piece]) -> bool:
        frames = b"".join(map(_frame, work))
        # What the pipe takes comes before the tokens, so that a child that waits for one finds its frame. The
        # rest comes after them: without a token, it would never read what fills the pipe.
        try:
            written = os.write(self._ends.work, frames)
        except BlockingIOError:
            written = 0
        except BrokenPipeError:
            written = len(frames)
        self._unwritten = frames[written:]
        os.write(self._ends.token_write, pipe.TOKEN_RUN * len(work))
        self._starts.given(len(work), trio.current_time())
        self._idle.deadline = self._starts.look_at
        return not self._unwritten

    async def flush(self) -> None:
        frames, self._unwritten = self._unwritten, b""  # a checkpoint also when there is nothing
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._work.send_all(frames)

    async def receive(self) -> list[pipe.Report]:
        was_woken = False
        while True:
            await trio.lowlevel.checkpoint()
            # Before the pipe is read: what ended before that task began is in there by now.
            started = self._starts.look(trio.current_time(), early=was_woken)
            try:
                data = os.read(self._ends.reports, READ_BYTES)
            except BlockingIOError:
                if started is not None and (was_woken or started.ago_s >= LASTS_S):
                    return [self._starts.tell(started)]  # what is printed is that one's
                if self._ended:
                    self._drain()  # once: somebody else may hold the pipe, and write without end
                    raise ChildGone(await self._obituary()) from None
                # If it ended, read once more: it may have written in between.
                if not self._has_ended() and not self._drain():
                    was_woken = await self._until_news()
                continue
            self._drain()  # what was printed before the report was written is of what ran then
            if not data:
                raise ChildGone(await self._obituary())
            self.look()
            reports = self._splitter.reports(data)
            if len(data) == READ_BYTES:
                started = None  # what ended before it began may be behind this
            if reports := self._starts.heard(reports, started, trio.current_time()):
                return reports

    async def _until_news(self) -> bool:
        """Until there is something to be read, or to be looked for: then False."""
        with trio.CancelScope(deadline=self._starts.look_at) as self._idle:
            await trio.lowlevel.wait_readable(self._any.fileno())
        return not self._idle.cancelled_caught

    def take_back(self) -> int:
        try:
            taken = len(os.read(self._ends.token_read, READ_BYTES))
        except BlockingIOError:
            return 0
        self._starts.taken_back(taken)
        if not self._dismissed:
            os.write(self._ends.token_write, pipe.TOKEN_SKIP * taken)
        return taken

    def dismiss(self, *, alone: bool = False) -> None:
        self._alone |= alone
        if not self._dismissed:
            self._dismissed = True
            os.close(self._ends.token_write)

    def look(self) -> None:
        with suppress(OSError, IndexError):  # it ended
            if self._memory < 0:
                self._memory = os.open(f"/proc/{self.pid}/statm", os.O_RDONLY)
            pages = int(os.pread(self._memory, 256, 0).split()[1])
            self.rss_bytes = pages * PAGE_BYTES or self.rss_bytes

    def has_started(self) -> bool:
        return bool(descendants.of(self.pid))

    def step(self) -> pipe.Step:
        return pipe.read_step(self._shared[: pipe.STEP_BYTES]) if self._shares_step else pipe.Step(0, 0)

    # ---- end

    def order(self, kind: pipe.OrderKind, number: int) -> None:
        self._write_order(kind, number)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def terminate(self, number: int) -> None:
        self._terminated = True
        self._write_order(pipe.OrderKind.END, number)
        with suppress(ProcessLookupError):
            os.kill(self.pid, pipe.WHERE_SIGNAL)
        self._signal_group(signal.SIGTERM)

    def _write_order(self, kind: pipe.OrderKind, number: int) -> None:
        # Full: it has read none of some thousands, and will not miss this one. Broken: it closed its end.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._ends.orders, pipe.encode_order(pipe.Order(kind, number)))

    def kill(self) -> None:
        self._killed |= not self._has_ended()
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        # The process is reaped in aclose only, so its number cannot have been given to another one.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def aclose(self) -> None:
        """End the process and what it started, let go of every descriptor, leave no zombie."""
        was_asked = self._dismissed or not self._has_ended()
        self.dismiss()
        self._forget_reports()
        with trio.move_on_after(EXIT_WITHIN_S):
            await self._wait()
        self.look()
        in_order = was_asked and self._status() == 0 and not self._alone
        await self._end_others(in_order=in_order)
        await self._wait()
        self._drain()
        for output in self._outputs:
            output.finish()
        self._budget.say_dropped(self.whose(0), trio.current_time(), last=True)
        self._process.wait()
        await self._work.aclose()
        self._close_descriptors()

    async def _end_others(self, *, in_order: bool) -> None:
        """A child that left in order leaves what left its group; of any other, nothing may stay."""
        if self._terminated and not self._killed and not in_order:
            others = await trio.to_thread.run_sync(descendants.marked, self._mark)
            with trio.move_on_after(EXIT_WITHIN_S):
                # Nobody tells when they end.
                while others := descendants.living(others, self._mark):  # noqa: ASYNC110
                    await trio.sleep(LOOK_EVERY_S)
        self.kill()
        if not in_order:
            await trio.to_thread.run_sync(descendants.kill, self._mark)

    def _forget_reports(self) -> None:
        """Do not wait for them any more: at the end of the file there always is one to be had."""
        with suppress(FileNotFoundError):
            self._any.unregister(self._ends.reports)

    def _close_descriptors(self) -> None:
        self._any.close()
        ends = self._ends
        for fd in (ends.token_read, ends.reports, ends.orders, ends.stdout, ends.stderr, self._pidfd):
            os.close(fd)
        if self._memory >= 0:
            os.close(self._memory)
        self._shared.close()  # it has a descriptor of its own

    # ---- output

    def _drain(self) -> bool:
        """Log what was printed. Whether there was anything."""
        found, now = False, trio.current_time()
        for output in [output for output in self._outputs if not output.ended]:
            found |= output.drain(self.whose, now)
            if output.ended:
                self._any.unregister(output.fd)
        if not found:
            self._budget.say_dropped(self.whose(0), now)
        return found

    async def _wait(self) -> None:
        """Until the process ended. Meanwhile it may print."""
        while not self._has_ended():
            if not self._drain():
                await trio.lowlevel.wait_readable(self._any.fileno())
            await trio.lowlevel.checkpoint()

    # ---- how it ended

    def _has_ended(self) -> bool:
        if not self._ended:
            self._ended = self._exit() is not None
        return self._ended

    def _exit(self) -> os.waitid_result | None:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def _status(self) -> int | None:
        """The exit status; None for a process that a signal ended."""
        found = self._exit()
        return found.si_status if found is not None and found.si_code == os.CLD_EXITED else None

    async def _obituary(self) -> str:
        """How it ended. A child that closed its pipe and lives on is no use, and is killed."""
        self._forget_reports()
        # Whoever waits for this may stop waiting and come again; the time runs on.
        self._exit_by = min(self._exit_by, trio.current_time() + EXIT_WITHIN_S)
        with trio.move_on_at(self._exit_by) as grace:
            await self._wait()
        if grace.cancelled_caught:
            self.kill()
            return f"child {self.pid} closed its pipe to the worker{self._memory_seen()}"
        return f"child {self.pid} {self._cause()}{self._memory_seen()}"

    def _cause(self) -> str:
        found = self._exit()
        assert found is not None
        if found.si_code == os.CLD_EXITED:
            return f"exited with status {found.si_status}"
        name = _signal_name(found.si_status)
        if found.si_status != signal.SIGKILL or self._killed:
            return f"was ended by signal {name}"
        return f"was ended by signal {name}, not by its worker: perhaps the system was out of memory"

    def _memory_seen(self) -> str:
        return f"; its memory was {self.rss_bytes / 2**20:.0f} MiB when last seen" if self.rss_bytes else ""


def _frame(piece: Piece) -> bytes:
    activation, start_within_s, fence, deadline_s, max_deadline_s = piece
    start_by_ns = pipe.start_by_ns(start_within_s)
    return pipe.encode_work(pipe.Work(activation, start_by_ns, fence, deadline_s, max_deadline_s))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
