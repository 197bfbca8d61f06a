"""Tasks that write down, with fsync, that they began and that they ended: the test's own witness.

A line is `START|END key id attempts`. `key` names the produced activation through all its retries; `id`
is that of this very activation.
"""

from __future__ import annotations

import os
import time

from taskd import LastAction, Retry, RetryTaskError, TaskNamespace, current_task, heartbeat

RECORD = "TASKD_TEST_RECORD"  # the file, in the environment of the worker

recorded = TaskNamespace("recorded", application="kill-tests", processing_deadline_duration=5)


def record(word: str, key: str) -> int:
    """Write the line; returns the attempt number."""
    running = current_task()
    assert running is not None
    line = f"{word} {key} {running.id} {running.attempts}\n".encode()
    file = os.open(os.environ[RECORD], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line)  # one write to O_APPEND: lines of several processes do not mix
        os.fsync(file)
    finally:
        os.close(file)
    return running.attempts


@recorded.register("noop")
def noop(key: str) -> None:
    record("START", key)
    record("END", key)


@recorded.register("nap")
def nap(key: str, seconds: float) -> None:
    record("START", key)
    time.sleep(seconds)
    record("END", key)


@recorded.register("lively", processing_deadline_duration=1)
def lively(key: str, seconds: float) -> None:
    """Says all the while that it lives, for longer than its deadline if that is less."""
    record("START", key)
    begin = time.monotonic()
    while (spent := time.monotonic() - begin) < seconds:
        heartbeat(progress=spent / seconds, message=f"of {seconds:g} s")
        time.sleep(0.001)
    record("END", key)


@recorded.register("retried", retry=Retry(times=3, times_exceeded=LastAction.Deadletter))
def retried(key: str) -> None:
    """Completes in its third run."""
    if record("START", key) < 2:
        raise RetryTaskError("not yet, by design")
    record("END", key)


@recorded.register("fails", retry=Retry(times=2, on=(ValueError,), times_exceeded=LastAction.Deadletter))
def fails(key: str) -> None:
    record("START", key)
    raise ValueError("fails by design")


@recorded.register("fails_once", retry=Retry(times=1, times_exceeded=LastAction.Deadletter))
def fails_once(key: str) -> None:
    """No retry: its dead letter is, byte for byte, what was produced."""
    record("START", key)
    raise ValueError("fails by design")


@recorded.register("once", at_most_once=True)
def once(key: str, seconds: float) -> None:
    record("START", key)
    time.sleep(seconds)
    record("END", key)


@recorded.register("torn")
def torn(key: str, flag: str, seconds: float) -> None:
    """Its first run fails after `seconds`, every later one completes; `flag` is a path that tells which."""
    record("START", key)
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(seconds)
        record("END", key)
    else:
        time.sleep(seconds)
        raise ValueError("the first run fails by design")
