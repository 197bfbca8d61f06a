"""taskd and its peers on this machine, in turn: how many no-op tasks a second do two processes drain?

    python tests/peers/run.py --rounds 5 --only celery,taskiq

Before every run of a peer there is one of taskd, and only such neighbours are compared: machines drift.
Redis keeps nothing on disk; taskd commits durably. Environments are made in `.cache/peers` at first.
Exit code 1: something is missing or failed, and the message says what. 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import environments
import figures
import race
import redis_server
from contenders import PEERS, TASKD, Contender, Place
from environments import CACHE, Unavailable
from figures import Pair

from taskd.bench import machine


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=_positive, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--count", type=_positive, default=50_000, metavar="N",
        help="tasks for taskd and asynq; the slower peers get a part of it (default: 50000)",
    )  # fmt: skip
    parser.add_argument("--only", metavar="PEER,…", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--folder", type=Path, default=CACHE, metavar="DIR", help="whose disk taskd commits to"
    )
    parser.add_argument("--json", action="store_true", help="every pair of runs, for machines")
    found = parser.parse_args(words)
    wanted = names if found.only is None else found.only.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--only: expected of {', '.join(names)}; found {', '.join(unknown)}")
    found.peers = [peer for peer in PEERS if peer.name in wanted]
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    options = arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    about = machine.describe(options.folder)
    pairs: list[Pair] = []
    code = 0
    try:
        about["redis"] = _session(options, pairs)
    except KeyboardInterrupt:
        say("interrupted; everything is stopped")
        code = 130
    except (Unavailable, race.Failed) as error:
        say(str(error))
        code = 1
    if options.json:
        print(json.dumps({"machine": about, "pairs": figures.as_json(pairs)}, ensure_ascii=False))
    elif pairs:
        how = {contender.name: contender.how for contender in (TASKD, *PEERS)}
        rows = [("", "tasks a second", "taskd is … times as fast", "")]
        rows += [(*row, how[row[0]]) for row in figures.table(pairs)]
        print("\n".join(figures.in_columns(rows)))
        rounds = max(pair.round for pair in pairs)
        print(f"\nleast / median / largest, rounds: {rounds}; {machine.sentence(about)}")
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # everything is being stopped; that takes seconds at most
    raise KeyboardInterrupt


def _session(options: argparse.Namespace, pairs: list[Pair]) -> str:
    """Fill `pairs`, one after the other. Returns the version of Redis. Raises Unavailable, Failed."""
    program = redis_server.find()
    bins = {"taskd": environments.prepare("taskd")}
    for peer in options.peers:
        try:
            bins[peer.name] = environments.prepare(peer.name)
        except Unavailable as error:
            if peer.name != "asynq" or options.only is not None:
                raise
            say(str(error))
    peers = [peer for peer in options.peers if peer.name in bins]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="taskd-redis-")))
        redis = stack.enter_context(redis_server.open_redis(program, folder))
        for number in range(1, options.rounds + 1):
            for peer in peers:
                rates: list[float] = []
                for contender in (TASKD, peer):
                    title = f"round {number} of {options.rounds}, {contender.name}"
                    with place(bins[contender.name], redis.path, options.folder) as where:
                        rates.append(_rate(contender, where, options.count, title))
                    redis.empty()
                pairs.append(Pair(number, peer.name, *rates))
                say(f"round {number} of {options.rounds}: {figures.times(pairs[-1].ratio)} x {peer.name}")
    return redis_server.version(program)


def _rate(contender: Contender, where: Place, most: int, title: str) -> float:
    began_s = time.monotonic()
    count = contender.count(most)
    found = race.run(contender, where, count, lambda what: say(f"{title}: {what} {count:,}"))
    took_s = time.monotonic() - began_s
    say(f"{title}: {figures.rate(found.per_s)}/s for {found.seconds:.1f} s ({took_s:.0f} s in all)")
    return found.per_s


@contextmanager
def place(programs: Path, redis: Path, folder: Path) -> Iterator[Place]:
    """A folder on the disk to be measured, and one in memory for the counters if there is such."""
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        scene = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=folder)))
        shared = memory if memory.is_dir() else None
        counters = stack.enter_context(tempfile.TemporaryDirectory(prefix="taskd-peers-", dir=shared))
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        rpc_port, http_port = (probe.getsockname()[1] for probe in probes)
        for probe in probes:
            probe.close()
        yield Place(programs, scene, Path(counters), redis, rpc_port, http_port)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
