"""Where rows of demoted namespaces go: the dead letters' cluster, or one that the file of switches names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import structlog
import trio

from taskd.config.schema import BrokerConfig
from taskd.daemon import logs
from taskd.errors import ConfigError, LogUnavailable
from taskd.inflight.switches import DemotedTo
from taskd.inflight.writer import Inflight
from taskd.log.base import Log, Outgoing, Position, Publish
from taskd.log.kafka import KafkaLog, Security

ENSURE_WITHIN_S = 15.0  # to create the topic; then the target is looked at again, it may be another by now

log = structlog.get_logger("taskd.broker")


class Demoting:
    """`append`: the outlet. `own`: the broker's own, for topics on its own clusters."""

    def __init__(
        self, config: BrokerConfig, inflight: Inflight, own_logs: Mapping[str, Log], own: Publish
    ) -> None:
        self._config = config
        self._inflight = inflight
        self._own_logs = own_logs
        self._own = own
        self._wanted = ""  # bootstrap servers of the other cluster to connect to; empty: none
        self._asked = trio.Event()
        self._connection = trio.CancelScope()
        self._other: tuple[str, Log, Publish] | None = None
        self._ensured: set[DemotedTo] = set()

    def refusal(self, target: DemotedTo) -> str:
        """Why nothing may be forwarded there, or nothing: what this broker reads itself would go round."""
        servers = None if target.cluster is None else _servers(target.cluster)
        if servers is not None and not (servers and all(map(_is_server, servers))):
            return f"demoted_topic_cluster: expected host:port, comma separated, found `{target.cluster}`"
        topic = self._config.log.topics.get(target.topic)
        if topic is None or not topic.consumed:
            return ""
        if self._config.log.kind == "kafka" and target.cluster is not None:
            own = _servers(self._config.log.clusters[topic.cluster].address)
            if not own & _servers(target.cluster):
                return ""
        return f"demoted_topic `{target.topic}` is a topic that this broker consumes; name another"

    async def append(self, records: Sequence[Outgoing]) -> list[Position | Exception]:
        target = self._inflight.demoted_to
        why_not = self.refusal(target)
        if why_not:
            return [LogUnavailable(why_not) for _ in records]
        try:
            publish = await self._outlet(target)
        except LogUnavailable as error:
            return [error for _ in records]
        return await publish(records)

    async def run(self) -> None:
        """Stay connected to the other cluster, while one is wanted, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            wanted, self._connection = self._wanted, trio.CancelScope()
            with self._connection:
                try:
                    other = KafkaLog(
                        wanted,
                        security=self._security(wanted),
                        max_message_bytes=self._config.log.max_record_bytes,
                    )
                except ConfigError as error:  # a file of its TLS is gone; the rest of the broker goes on
                    log.error("cannot connect to where demoted rows go", cluster=wanted, error=str(error))
                    self._wanted = ""  # the next record asks again
                    continue
                async with other.open_writer() as writer:
                    log.info("demoted namespaces go to another cluster", cluster=wanted)
                    self._other = (wanted, other, writer.append)
                    await trio.sleep_forever()
            self._other = None

    async def _outlet(self, target: DemotedTo) -> Publish:
        """Raises LogUnavailable while there is none."""
        if target.cluster is None:
            there, publish = self._own_logs[logs.place_of(self._config)(target.topic)], self._own
        elif self._other is not None and self._other[0] == target.cluster:
            _, there, publish = self._other
        else:
            self._ask_for(target.cluster)
            raise LogUnavailable(f"not connected to {target.cluster} yet")
        if self._config.log.create_missing_topics and target not in self._ensured:
            # Kafka's waits while its cluster is away, which a mistyped address is for ever.
            with trio.move_on_after(ENSURE_WITHIN_S):
                await there.ensure_topics({target.topic: self._config.log.default_partitions})
                self._ensured.add(target)
            if target not in self._ensured:
                raise LogUnavailable(
                    f"topic {target.topic} on {target.cluster or 'the cluster of the dead letters'} "
                    f"could not be looked up within {ENSURE_WITHIN_S:g} s"
                )
        return publish

    def _ask_for(self, cluster: str) -> None:
        if cluster != self._wanted:
            self._wanted = cluster
            self._connection.cancel()
            self._asked.set()

    def _security(self, cluster: str) -> Security:
        """Of the declared cluster that has all these servers; credentials are shown to no other."""
        for declared in self._config.log.clusters.values():
            if _servers(cluster) <= _servers(declared.address):
                return logs.security_of(declared)
        return Security()


def _servers(address: str) -> set[str]:
    return {server.strip().lower() for server in address.split(",")} - {""}


def _is_server(address: str) -> bool:
    host, colon, port = address.rpartition(":")
    if not colon:
        return True  # Kafka's own port is meant
    return bool(host) and port.isdecimal() and 0 < int(port) < 65_536
