"""taskd runs functions later, reliably.

This is what authors of tasks import, from Django or Flask code as well; it opens nothing and loads
neither Trio nor gRPC nor Kafka.
"""

from __future__ import annotations

from taskd.activation.backoff import Backoff, RetryRule
from taskd.activation.retry import (
    LastAction,
    NoRetriesRemainingError,
    ProcessingDeadlineExceeded,
    Retry,
    RetryAfter,
    RetryTaskError,
    TaskCancelled,
)
from taskd.tasks import internal as _internal  # noqa: F401  # registers its tasks
from taskd.tasks import outbox as _outbox
from taskd.tasks.current import CurrentTask, current_task, heartbeat, retry_task
from taskd.tasks.namespace import TaskNamespace, instrumented_task
from taskd.tasks.task import Task

__all__ = [
    "Backoff",
    "CurrentTask",
    "LastAction",
    "NoRetriesRemainingError",
    "ProcessingDeadlineExceeded",
    "Retry",
    "RetryAfter",
    "RetryRule",
    "RetryTaskError",
    "Task",
    "TaskCancelled",
    "TaskNamespace",
    "__version__",
    "configure",
    "current_task",
    "heartbeat",
    "instrumented_task",
    "retry_task",
]

__version__ = "0.1.0"


def configure(
    *,
    log: str | None = None,
    broker: str | None = None,
    kafka: str | None = None,
    topic: str | None = None,
    timeout_s: float | None = None,
    secret: str | None = None,
    tls_ca: str | None = None,
) -> None:
    """Say how `.delay()` reaches the log; what is None comes from the environment (`TASKD_LOG`, ...).

    `log`: "embedded" (append through the broker at `broker`, host:port) or "kafka" (produce to the
    cluster at `kafka`). `topic`: of namespaces that name none. `timeout_s`: the longest wait of one
    `.delay()`. `secret`: shared with the broker, signs the calls. `tls_ca`: file of who signs the
    broker's certificate; turns TLS on. An open connection is flushed and closed. Values are checked
    at the next send, which raises ConfigError, or StartupError for a file.
    """
    settings: dict[str, str | float | None] = {
        "log": log,
        "broker": broker,
        "kafka": kafka,
        "topic": topic,
        "timeout_s": timeout_s,
        "secret": secret,
        "tls_ca": tls_ca,
    }
    _outbox.set_opener(lambda: _open_outbox(settings))


def _open_outbox(settings: dict[str, str | float | None]) -> _outbox.Outbox:
    # The one late import: the producer loads Trio and the clients of gRPC and Kafka, which whoever
    # only registers tasks, or imports them to run them, must not pay for.
    from taskd.producer.outbox import open_outbox

    return open_outbox(settings)


_outbox.set_opener(lambda: _open_outbox({}))
