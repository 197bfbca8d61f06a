"""Four tasks. Importing this module registers them; it opens nothing and reads no configuration."""

from __future__ import annotations

import logging

from taskd import LastAction, Retry, RetryTaskError, TaskNamespace, current_task, instrumented_task

log = logging.getLogger(__name__)
demo = TaskNamespace("demo")


@instrumented_task(name="add", namespace=demo)
def add(a: int, b: int) -> None:
    """Log a sum. Whatever a task returns is thrown away: what it finds out, it has to put somewhere."""
    log.info("%s + %s = %s", a, b, a + b)


@instrumented_task(name="noop", namespace=demo)
def noop() -> None:
    """Do nothing: what is left is the cost of taskd itself."""


@instrumented_task(name="wait", namespace=demo, processing_deadline_duration=60)
async def wait(seconds: float = 1.0) -> None:
    """Wait, as one waits for a service: a worker runs many of these at once, on Trio, in one process."""
    import trio  # here, so that callers and workers that run no async tasks do without it

    await trio.sleep(seconds)


@instrumented_task(
    name="flaky", namespace=demo, retry=Retry(times=4, delay=1, times_exceeded=LastAction.Deadletter)
)
def flaky(failures: int = 1) -> None:
    """Ask for another run so many times, then complete. From 4 on it ends as a dead letter."""
    running = current_task()
    run = running.attempts + 1 if running else 1
    if run <= failures:
        raise RetryTaskError(f"run {run} of {failures} that fail by design")
    log.info("completed in run %s", run)
