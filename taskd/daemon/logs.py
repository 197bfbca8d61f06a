"""The logs of a broker: the embedded one, or each Kafka cluster of the configuration."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from taskd.clock import Clock
from taskd.config.schema import BrokerConfig
from taskd.log.base import Log, Reader
from taskd.log.embedded import open_embedded
from taskd.log.kafka import KafkaLog, Security

EMBEDDED = "embedded"  # where every topic is, when the log is


@dataclass(frozen=True, slots=True)
class Source:
    """Topics that one reader reads. `place`: the cluster, or EMBEDDED."""

    place: str
    topics: tuple[str, ...]
    group: str
    offset_reset: str
    session_timeout_ms: int
    group_instance_id: str | None

    def __str__(self) -> str:
        return f"{', '.join(self.topics)} on {self.place}"

    def open(self, log: Log) -> AbstractAsyncContextManager[Reader]:
        if isinstance(log, KafkaLog):
            return log.open_reader(
                self.topics,
                self.group,
                offset_reset=self.offset_reset,
                session_timeout_ms=self.session_timeout_ms,
                group_instance_id=self.group_instance_id,
            )
        return log.open_reader(self.topics, self.group, offset_reset=self.offset_reset)


def place_of(config: BrokerConfig) -> Callable[[str], str]:
    """Where a topic is: a name of `open_logs`."""
    if config.log.kind == "embedded":
        return lambda topic: EMBEDDED
    return config.log.cluster_of


def sources(config: BrokerConfig) -> list[Source]:
    """What is read, by as few readers as the topics' terms allow."""
    place = place_of(config)
    found: dict[tuple[str, str, str, int, str | None], list[str]] = {}
    for name, topic in config.log.consumed.items():
        terms = (
            place(name),
            topic.consumer_group,
            topic.offset_reset,
            topic.session_timeout_ms,
            topic.group_instance_id,
        )
        found.setdefault(terms, []).append(name)
    return [
        Source(where, tuple(topics), group, reset, timeout_ms, instance)
        for (where, group, reset, timeout_ms, instance), topics in found.items()
    ]


def wanted_topics(config: BrokerConfig) -> Mapping[str, Mapping[str, int]]:
    """Every topic there should be with its partitions, by place."""
    log = config.log
    place = place_of(config)
    names = {name: topic.partitions or log.default_partitions for name, topic in log.topics.items()}
    names.setdefault(log.deadletter_topic, log.default_partitions)
    if config.ingest.overflow_topic is not None:
        names.setdefault(config.ingest.overflow_topic, log.default_partitions)
    by_place: dict[str, dict[str, int]] = {}
    for name, partitions in names.items():
        by_place.setdefault(place(name), {})[name] = partitions
    return by_place


@asynccontextmanager
async def open_logs(config: BrokerConfig, clock: Clock) -> AsyncIterator[Mapping[str, Log]]:
    """The logs by place. Nothing is connected yet that is not in this process."""
    log = config.log
    if log.kind == "embedded":
        async with open_embedded(
            config.data_dir,
            partitions=log.default_partitions,
            retention_s=log.embedded.retention_s,
            max_record_bytes=log.max_record_bytes,
            clock=clock,
            lock=False,  # the broker holds it for its store already
        ) as embedded:
            yield {EMBEDDED: embedded}
    else:
        used = {*(topic.cluster for topic in log.topics.values()), log.cluster_of(log.deadletter_topic)}
        yield {
            name: KafkaLog(
                log.clusters[name].address,
                security=Security.of(log.clusters[name]),
                max_message_bytes=log.max_record_bytes,
                fetch_max_wait_ms=log.clusters[name].fetch_max_wait_ms,
            )
            for name in sorted(used)
        }


security_of = Security.of
