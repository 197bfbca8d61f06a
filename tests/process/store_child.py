"""Run by test_store_kill.py: works on a store and says what it was told is durable, until killed."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import trio

from taskd.clock import SystemClock
from taskd.inflight.base import Arrival, ClaimRequest, LeaseKind, Policy, Report, ReportStatus
from taskd.inflight.writer import Inflight, open_inflight


def arrival(id_: str) -> Arrival:
    return Arrival(
        id_, "ns", "task", "app", None, 10, None, None, 0, True, False, "topic", 0, 0, None, id_.encode()
    )


def say(word: str, ids: list[str]) -> None:
    sys.stdout.write("".join(f"{word} {id_}\n" for id_ in ids))
    sys.stdout.flush()


async def fill(store: Inflight, life: str) -> None:
    for number in itertools.count():
        ids = [f"{life}-{number}-{n}" for n in range(20)]
        await store.insert([arrival(id_) for id_ in ids])
        say("stored", ids)


async def drain(store: Inflight) -> None:
    while True:
        leases = await store.claim(ClaimRequest(15, LeaseKind.STREAM, holder="w"))
        await store.report([Report(x.id, x.fence, ReportStatus.COMPLETE) for x in leases])
        say("finished", [lease.id for lease in leases])


async def main(path: Path, life: str) -> None:
    async with open_inflight(path, SystemClock(), Policy()) as store, trio.open_nursery() as nursery:
        nursery.start_soon(fill, store, life)
        nursery.start_soon(drain, store)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
