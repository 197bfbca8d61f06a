"""What each part is told of the configuration, in the part's own terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from taskd.config.schema import BrokerConfig
from taskd.daemon.limiting import limit_rules
from taskd.inflight.base import Policy
from taskd.ingest.backpressure import Limits
from taskd.ingest.raw import RawTask
from taskd.upkeep.table import UpkeepSettings

STORE_FILE = "inflight.sqlite"


def raw_tasks(config: BrokerConfig) -> Mapping[str, RawTask]:
    return {
        name: RawTask(
            namespace=topic.raw.namespace,
            application=topic.raw.application,
            taskname=topic.raw.taskname,
            processing_deadline_s=topic.raw.processing_deadline_s,
            compression_level=topic.raw.compression_level,
        )
        for name, topic in config.log.topics.items()
        if topic.raw is not None
    }


def policy(config: BrokerConfig) -> Policy:
    store, dispatch = config.store, config.dispatch
    return Policy(
        max_processing_attempts=store.max_processing_attempts,
        max_crashes=store.max_crashes,
        max_processing_deadline_ms=milliseconds_or_none(store.max_processing_deadline_s),
        max_delay_ms=milliseconds_or_none(store.max_delay_s),
        enforce_max_attempts=store.enforce_max_attempts,
        grace_ms=milliseconds(dispatch.processing_deadline_grace_s),
        claim_ms=milliseconds(config.push.timeout_s + config.push.claim_margin_s),
        strict_order_namespaces=frozenset(dispatch.strict_order_namespaces),
        limits=limit_rules(dispatch.limits),
    )


def limits(config: BrokerConfig) -> Limits:
    store = config.store
    return Limits(
        max_pending_count=store.max_pending_count,
        max_delay_count=store.max_delay_count,
        max_processing_count=store.max_processing_count,
        max_size_bytes=store.max_size_bytes,
    )


def store_path(config: BrokerConfig) -> Path:
    return config.store.path or config.data_dir / STORE_FILE


def upkeep_settings(config: BrokerConfig) -> UpkeepSettings:
    return UpkeepSettings(
        interval_s=config.upkeep.interval_s,
        startup_quiet_ms=milliseconds(config.upkeep.startup_quiet_s),
        max_rows=config.upkeep.max_rows_per_round,
        lease_ms=milliseconds(config.dispatch.lease_s),
        tombstone_ttl_ms=milliseconds(config.store.tombstone_ttl_s),
        tombstone_max_count=config.store.tombstone_max_count,
        vacuum_interval_s=config.store.vacuum_interval_s,
    )


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def milliseconds_or_none(seconds: float | None) -> int | None:
    return None if seconds is None else milliseconds(seconds)
