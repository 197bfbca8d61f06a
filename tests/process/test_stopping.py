"""How daemons stop: asked early, asked twice, and with work that does not end."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest
import trio
from daemons import Daemon, Daemons, free_port, open_daemons

pytestmark = [pytest.mark.process, pytest.mark.slow]

SEED = int(os.environ.get("TASKD_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
MOMENTS = 30
UP_AFTER_S = 1.5  # about; so the moments lie before and behind the end of a start
SIGTERM_IS_CAUGHT = 1 << (signal.SIGTERM - 1)


def start(daemons: Daemons, name: str, folder: Path) -> Daemon:
    if name == "broker":
        ports = ("--rpc-port", str(free_port()), "--http-port", "0")
        return daemons.start("broker", "--data-dir", str(folder / str(len(daemons.all))), *ports)
    return daemons.start("worker", "--broker", "127.0.0.1:1", "--slots", "1")


async def caught(daemon: Daemon) -> None:
    """Until it has SIGTERM in hand. Before, it is Python that starts, and nothing of ours."""
    with trio.fail_after(30):
        while not _mask(daemon.pid) & SIGTERM_IS_CAUGHT:  # noqa: ASYNC110  # there is no event for it
            await trio.sleep(0.002)


def _mask(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)


@pytest.mark.parametrize("name", ["broker", "worker"])
async def test_a_signal_before_anything_runs_is_a_clean_end(tmp_path: Path, name: str) -> None:
    async with open_daemons(tmp_path) as daemons:
        daemon = start(daemons, name, tmp_path)
        await caught(daemon)
        assert await daemon.stopped(signal.SIGINT) == 0, daemon.tail()
        assert [entry["message"] for entry in daemon.entries()] == ["stopping; a second signal stops now"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["broker", "worker"])
async def test_a_signal_at_any_moment_of_the_start_is_a_clean_end(tmp_path: Path, name: str) -> None:
    print(f"TASKD_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    async with open_daemons(tmp_path) as daemons:
        for number in range(0, MOMENTS, 2):
            pair = [start(daemons, name, tmp_path) for _ in range(2)]
            async with trio.open_nursery() as nursery:
                for offset, daemon in enumerate(pair):
                    after_s = (number + offset + rng.random()) / MOMENTS * UP_AFTER_S
                    nursery.start_soon(_ends_well, daemon, after_s)


async def _ends_well(daemon: Daemon, after_s: float) -> None:
    await caught(daemon)
    await trio.sleep(after_s)  # a random moment, which nobody announces
    code = await daemon.stopped(signal.SIGINT)
    assert code == 0, f"{daemon}, {after_s:.3f} s after its start:\n{daemon.tail()}"
    assert not [line for line in daemon.lines if "Traceback" in line], daemon.tail()


async def test_who_ignores_its_children_can_start_a_worker() -> None:
    """What is ignored is inherited, and then nobody would be told how a child of the worker ended."""
    code = (
        "import os, subprocess, taskd.cli.early as early; early.keep_signals(); "
        "pid = subprocess.Popen(['true']).pid; print(os.waitid(os.P_PID, pid, os.WEXITED).si_pid == pid)"
    )
    ignoring = (
        f"import os, signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv({sys.executable!r}, "
    )
    command = f"{ignoring}{[sys.executable, '-c', code]!r})"
    ended = await trio.run_process([sys.executable, "-c", command], capture_stdout=True)
    assert ended.stdout == b"True\n"
