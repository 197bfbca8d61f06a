"""Real `taskd` processes for tests: started in temporary folders on free ports, heard by their log lines,
ended whatever happens. Nothing here polls: a daemon's log is a pipe, and a process that ends is an event.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WITHIN_S = 30.0  # for whatever a daemon should do at once; only a broken one takes so long
LINES_SHOWN = 40


def free_port() -> int:
    """A port nobody listens on, below those that the kernel gives to clients.

    A worker that knocks at a dead broker's port from that range may be given the very same port,
    and then holds it against the broker that comes back.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without anything of taskd's own, logs as JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TASKD_")}
    return kept | {"TASKD_LOG_FORMAT": "json", "NO_PROXY": "127.0.0.1"} | dict(more or {})


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders before what it already names."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def install_plugin(folder: Path, distribution: str, module: str, source: str | None = None) -> None:
    """Make `folder`, once it is on PYTHONPATH, hold a distribution with an entry point in `taskd.tasks`.

    `source`: of the module; without, the module is found elsewhere on the path.
    """
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[taskd.tasks]\n{module} = {module}\n")
    if source is not None:
        (folder / f"{module}.py").write_text(source)


class Daemon:
    """One life of one process. Made by `Daemons.start`, which reads what it says and ends it at last."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], pidfd: int) -> None:
        self.name = name
        self.pid = process.pid
        self.lines: list[str] = []
        self._process = process
        self._pidfd = pidfd
        self._news = trio.Event()
        self._silent = False

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def entries(self, message: str = "") -> list[dict[str, Any]]:
        """What it logged, or only the lines of this message."""
        found = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [entry for entry in found if not message or entry.get("message") == message]

    async def said(self, message: str, count: int = 1) -> dict[str, Any]:
        """The log line of this message, the `count`-th of them, as soon as it is there."""
        with trio.move_on_after(WITHIN_S):
            while len(found := self.entries(message)) < count and not self._silent:
                self._news = trio.Event()
                await self._news.wait()
        if len(found) < count:
            raise AssertionError(f"{self} did not say {message!r}:\n{self.tail()}")
        return found[count - 1]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self, within_s: float = WITHIN_S) -> int:
        """Its exit code, once it and everything that shared its output has ended."""
        with trio.move_on_after(within_s):
            await trio.lowlevel.wait_readable(self._pidfd)
            while not self._silent:
                self._news = trio.Event()
                await self._news.wait()
        code = self._process.poll()
        assert code is not None, f"{self} still runs after {within_s:g} s:\n{self.tail()}"
        assert self._silent, f"{self} left processes behind: its output is still open"
        return code

    async def must_live(self) -> None:
        """Raise as soon as it ends; for a task that is cancelled when it may."""
        await trio.lowlevel.wait_readable(self._pidfd)
        await self.ended()
        raise AssertionError(f"{self} ended by itself:\n{self.tail()}")

    async def stopped(self, number: signal.Signals = signal.SIGTERM, within_s: float = WITHIN_S) -> int:
        """Ask it to stop; its exit code."""
        self.send(number)
        return await self.ended(within_s)

    async def killed(self) -> None:
        """SIGKILL; its children must follow by themselves."""
        children = [pidfd for pid in self.children() if (pidfd := open_pidfd(pid)) is not None]
        try:
            self.send(signal.SIGKILL)
            await self.ended()
            for pidfd in children:
                with trio.fail_after(5):
                    await trio.lowlevel.wait_readable(pidfd)
        finally:
            for pidfd in children:
                os.close(pidfd)

    def children(self) -> list[int]:
        return children_of(self.pid)

    def tail(self) -> str:
        return "\n".join(self.lines[-LINES_SHOWN:])

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid}, exit code {self.exit_code})"

    # ---- for Daemons

    async def listen(self, pipe: trio.lowlevel.FdStream) -> None:
        """Read its output until everybody who holds the other end is gone."""
        rest = b""
        async with pipe:
            async for data in pipe:
                *complete, rest = (rest + data).split(b"\n")
                self.lines += [line.decode("utf-8", "replace") for line in complete]
                self._news.set()
        self._silent = True
        self._news.set()

    def end(self) -> None:
        """Whatever state it is in, stopped by SIGSTOP included."""
        for pid in (*self.children(), self.pid):
            if self.running:
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._pidfd)


class Daemons:
    """Starts processes that end with the test."""

    def __init__(self, nursery: trio.Nursery, environment: Mapping[str, str]) -> None:
        self.all: list[Daemon] = []
        self._nursery = nursery
        self._environment = dict(environment)

    def start(
        self, *arguments: str, more: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Daemon:
        """`taskd` with these arguments; what it writes to stdout and stderr are its `lines`."""
        return self.run([sys.executable, "-m", "taskd", *arguments], arguments[0], more=more, cwd=cwd)

    def run(
        self,
        command: list[str],
        name: str,
        *,
        more: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Daemon:
        read, write = os.pipe()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=self._environment | dict(more or {}),
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=write,
            process_group=0,  # Ctrl-C is for the test, which then ends them
        )
        os.close(write)
        daemon = Daemon(name, process, os.pidfd_open(process.pid))
        self.all.append(daemon)
        self._nursery.start_soon(daemon.listen, trio.lowlevel.FdStream(read))
        return daemon


@asynccontextmanager
async def open_daemons(folder: Path, more: Mapping[str, str] | None = None) -> AsyncIterator[Daemons]:
    """`more`: for the environment of all of them. What they wrote lies in `folder` afterwards."""
    async with trio.open_nursery() as nursery:
        daemons = Daemons(nursery, clean_environment(more))
        try:
            yield daemons
        finally:
            for daemon in daemons.all:
                daemon.end()
            for number, daemon in enumerate(daemons.all, 1):
                (folder / f"{number:02}-{daemon.name}.log").write_text("\n".join(daemon.lines) + "\n")
            nursery.cancel_scope.cancel()


def open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def children_of(parent: int) -> list[int]:
    """Processes it started and that live, in the order of their ids."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, of = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(of) == parent and state not in "ZX":
            found.append(int(stat.parent.name))
    return sorted(found)
