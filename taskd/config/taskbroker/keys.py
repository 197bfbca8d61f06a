"""Keys of an existing configuration outside Kafka: what each becomes, or why it is dropped.

A key that differs between versions of theirs has several names. `store.` stands before a name in newer
files and is left out in older ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from taskd.config.taskbroker.source import Given, Source

Read = Callable[[Source, Given], Any]


@dataclass(frozen=True, slots=True)
class Carried:
    """`names` of theirs, the dotted key of ours, and how the value is read. `default`: theirs, where it
    differs from ours."""

    names: tuple[str, ...]
    ours: str
    read: Read
    default: object = None


def _store(*names: str) -> tuple[str, ...]:
    return (*(f"store.{name}" for name in names), *names)


def _level(source: Source, given: Given) -> str | None:
    """A filter such as `info,librdkafka=warn` says among others what counts for everything."""
    general = [part.strip().lower() for part in str(given.value).split(",") if "=" not in part]
    level = general[0] if general else "info"
    level = {"trace": "debug", "warn": "warning", "fatal": "error", "critical": "error", "off": "error"}.get(
        level, level
    )
    return source.one_of(Given(given.key, level, given.origin), "debug", "info", "warning", "error")


def _format(source: Source, given: Given) -> str:
    return {"json": "json", "text": "console", "simplified": "console", "console": "console"}.get(
        str(given.value).lower(), "auto"
    )


def _mode(source: Source, given: Given) -> str | None:
    return source.one_of(given, "pull", "push")


CARRIED = (
    Carried(("grpc_addr",), "rpc.host", Source.text, default="0.0.0.0"),  # noqa: S104 - theirs, and said so
    Carried(("grpc_port",), "rpc.port", Source.number),
    Carried(("grpc_shared_secret",), "rpc.secrets", Source.texts),
    Carried(("grpc_max_message_size",), "max_request_bytes", Source.number),
    Carried(("kafka_deadletter_topic",), "log.deadletter_topic", Source.text, default="taskworker-dlq"),
    Carried(("kafka_retry_topic",), "log.retry_topic", Source.text),
    Carried(("create_missing_topics",), "log.create_missing_topics", Source.flag, default=False),
    Carried(("default_topic_partitions",), "log.default_partitions", Source.number),
    Carried(("max_message_size",), "log.max_record_bytes", Source.number),
    Carried(_store("max_pending_count"), "store.max_pending_count", Source.number),
    Carried(_store("max_delay_count"), "store.max_delay_count", Source.number),
    Carried(_store("max_processing_count"), "store.max_processing_count", Source.number),
    Carried(_store("max_processing_attempts"), "store.max_processing_attempts", Source.number),
    Carried(_store("max_size", "db_max_size", "max_db_size"), "store.max_size_bytes", Source.number),
    Carried(
        _store("max_processing_deadline", "max_processing_deadline_sec"),
        "store.max_processing_deadline_s",
        Source.seconds,
    ),
    Carried(
        _store("max_delayed_task_allowed_sec", "max_delay"), "store.max_delay_s", Source.seconds, default=3600
    ),
    Carried(_store("enforce_max_attempts"), "store.enforce_max_attempts", Source.flag),
    Carried(_store("vacuum_interval_ms", "vacuum_interval"), "store.vacuum_interval_s", Source.seconds),
    Carried(
        _store("insert_batch_max_len", "db_insert_batch_max_len"), "ingest.batch_max_records", Source.number
    ),
    Carried(("delivery_mode",), "dispatch.mode", _mode),
    Carried(
        _store("processing_deadline_grace", "processing_deadline_grace_sec"),
        "dispatch.processing_deadline_grace_s",
        Source.seconds,
    ),
    Carried(
        ("push.timeout", "push.timeout_ms", "push_timeout", "push_timeout_ms"),
        "push.timeout_s",
        Source.seconds,
    ),
    Carried(("runtime_config_path",), "switches.file", Source.text),
    Carried(
        ("upkeep_task_interval_ms", "upkeep_interval_ms", "upkeep_interval"),
        "upkeep.interval_s",
        Source.seconds,
    ),
    Carried(
        (
            "upkeep_deadline_reset_skip_after_startup_sec",
            "upkeep_startup_quiet_sec",
            "upkeep_startup_quiet",
        ),
        "upkeep.startup_quiet_s",
        Source.seconds,
    ),
    Carried(("log_level",), "log_level", _level),
    Carried(("log_format",), "log_format", _format),
)

_VACUUM = "taskd vacuums in small steps that hold up nobody"
_GATHERED = "taskd gathers the results of many callers in one transaction by itself"
_POSTGRES = "PostgreSQL is not portable: taskd keeps what is in flight in SQLite"
_STATSD = "StatsD metrics are not portable: Prometheus reads /metrics of `http`, under other names"
_SENTRY = "taskd sends no errors or traces to Sentry; errors are in the log"

# The first pattern that fits a key gives the reason; `store.` is left out here.
DROPPED = {
    "pg_*": _POSTGRES,
    "postgres*": _POSTGRES,
    "statsd_*": _STATSD,
    "default_metrics_tags*": _STATSD,
    "runtime_metrics_interval*": _STATSD,
    "sentry_*": _SENTRY,
    "traces_sample_rate": _SENTRY,
    "kafka_long_topic": "write it into the switches file as `demoted_topic`",
    "kafka_send_timeout_ms": "what must be published is tried again until the log took it",
    "kafka_auto_commit_interval_ms": "offsets are committed after each batch that is durable",
    "kafka_deadletter_*": "dead letters go to the cluster of the topic, with its credentials",
    "canary_tasks": "a worker's health is known from its connection and its results",
    "batch_status_updates": _GATHERED,
    "status_update_*": _GATHERED,
    "full_vacuum_*": _VACUUM,
    "vacuum_*": _VACUUM,
    "maintenance_task_interval_ms": "each duty of upkeep has a pace of its own",
    "health_check_killswitched": "health tells whether each part gets on (/readyz), whatever is switched off",
    "upkeep_*": "taskd's upkeep has no such setting; those it has are under `upkeep`",
    "fetch.*": "work is fetched when a worker has room; there are no threads to set",
    "fetch_*": "work is fetched when a worker has room; there are no threads to set",
    "push.*": "taskd's push delivery has no such setting; those it has are under `push`",
    "push_*": "taskd's push delivery has no such setting; those it has are under `push`",
    "claim_*": "the time of a claim follows from the settings under `push`",
    "insert_batch_*": "a batch closes as soon as nothing more is ready, or at 16 MB",
    "db_insert_batch_*": "a batch closes as soon as nothing more is ready, or at 16 MB",
    "log_*": "only log_level and log_format can be set",
    "raw_*": "the raw topic is described under `raw` of its topic, and this is no part of it",
}


def reason_for_dropping(key: str) -> str | None:
    """Why a known key is not carried over; None when the key is not known."""
    bare = key.removeprefix("store.")
    return next((reason for pattern, reason in DROPPED.items() if fnmatchcase(bare, pattern)), None)


def known_names() -> list[str]:
    """For the nearest name to an unknown key."""
    plain = [name for name in DROPPED if "*" not in name]
    return [name for carried in CARRIED for name in carried.names] + plain
