"""taskd's no-op. What is enqueued is durable in the log, and in the store when `enqueue` ends."""

from __future__ import annotations

import os
import re
import sys
import time
import urllib.request

import trio
from counted import count

from taskd import TaskNamespace, aio
from taskd.config.schema import ProducerConfig
from taskd.producer.client import open_producer

AT_ONCE = 1_000
STORED_WITHIN_S = 60.0
peers = TaskNamespace("peers")


@peers.register(name="noop")
def noop() -> None:
    count()


def enqueue(number: int) -> None:
    trio.run(_send, number)
    give_up_s = time.monotonic() + STORED_WITHIN_S
    while (stored := _stored()) < number:
        if time.monotonic() > give_up_s:
            sys.exit(f"expected {number} activations in the store, found {stored}: see the broker's log")
        time.sleep(0.02)


async def _send(number: int) -> None:
    config = ProducerConfig(broker=f"127.0.0.1:{os.environ['PEERS_RPC_PORT']}", timeout_s=60)
    async with aio.open_loop(), open_producer(config) as producer:
        for start in range(0, number, AT_ONCE):
            calls = [noop.to_call() for _ in range(min(AT_ONCE, number - start))]
            for error in await producer.send_many(calls):
                if error is not None:
                    raise error


def _stored() -> int:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{os.environ['PEERS_HTTP_PORT']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r'^taskd_transitions_total\{event="arrived",[^}]*\} (\S+)', text, re.M)
    return round(sum(map(float, found)))
