"""Where activations come from, and where retries and dead letters go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from taskd.config.schema.base import PositiveInt, PositiveSeconds, Section, not_a_bool


class EmbeddedLogSection(Section):
    """The embedded log, when `log.kind` is embedded. It lives in `data_dir`."""

    retention_s: PositiveSeconds = Field(
        default=86_400, description="read records are kept this long for re-reading"
    )


SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


class ClusterSection(Section):
    """A Kafka cluster, when `log.kind` is kafka."""

    address: str = Field(
        default="127.0.0.1:9092", min_length=1, description="bootstrap servers, host:port, comma separated"
    )
    security_protocol: SecurityProtocol = Field(default="PLAINTEXT", description="how to connect")
    sasl_mechanism: SaslMechanism = Field(
        default="PLAIN", description="how to log in, with a security protocol that begins with SASL"
    )
    sasl_username: str | None = Field(default=None, description="user to log in as")
    sasl_password: SecretStr | None = Field(default=None, description="the user's password")
    ssl_ca_location: Path | None = Field(
        default=None, description="PEM file of who signs the cluster's certificates; default: the system's"
    )
    ssl_certificate_location: Path | None = Field(
        default=None, description="PEM file of our certificate, when the cluster asks for one"
    )
    ssl_key_location: Path | None = Field(default=None, description="PEM file of that certificate's key")
    fetch_max_wait_ms: PositiveInt = Field(
        default=500,
        description="how long the cluster may wait for records before it answers that there are none; "
        "lower where it does not answer as soon as one comes",
    )

    @model_validator(mode="after")
    def _complete(self) -> ClusterSection:
        if self.incomplete:
            raise ValueError(self.incomplete)
        return self

    @property
    def incomplete(self) -> str:
        """What is missing, in words; empty when nothing is."""
        if self.security_protocol.startswith("SASL") and not (self.sasl_username and self.sasl_password):
            return f"{self.security_protocol} needs sasl_username and sasl_password"
        if bool(self.ssl_certificate_location) != bool(self.ssl_key_location):
            return "give both ssl_certificate_location and ssl_key_location, or none"
        return ""


class RawSection(Section):
    """What a foreign topic's records become: activations of this task, the record as its argument."""

    namespace: str = Field(description="namespace of the task")
    application: str = Field(description="application of the task")
    taskname: str = Field(min_length=1, description="name of the task")
    processing_deadline_s: PositiveInt = Field(description="processing deadline of the task")
    compression_level: Annotated[int, BeforeValidator(not_a_bool), Field(ge=-1, le=22)] = Field(
        default=3, description="zstd level of the parameters; -1 does not compress"
    )


class TopicSection(Section):
    """A topic: where it is, and how it is consumed."""

    cluster: str = Field(default="default", description="name of its cluster in `log.clusters`")
    consumer_group: str = Field(
        default="taskd", min_length=1, description="consumer group of the brokers that share the topic"
    )
    offset_reset: Literal["earliest", "latest"] = Field(
        default="earliest", description="where to begin when nothing is committed"
    )
    produce_only: bool = Field(default=False, description="never consume; written to by retries and the like")
    consumer_disabled: bool = Field(default=False, description="do not consume for now")
    session_timeout_ms: PositiveInt = Field(
        default=6_000, description="a broker silent this long loses its partitions"
    )
    group_instance_id: str | None = Field(
        default=None,
        min_length=1,
        description="makes the broker a static member, which keeps its partitions over a restart; "
        "unique for each broker",
    )
    partitions: PositiveInt | None = Field(
        default=None, description="partitions when it is created; default: log.default_partitions"
    )
    raw: RawSection | None = Field(default=None, description="the task that foreign records are for")

    @property
    def consumed(self) -> bool:
        return not (self.produce_only or self.consumer_disabled)


class LogSection(Section):
    """Where activations come from."""

    kind: Literal["embedded", "kafka"] = Field(
        default="embedded", description="embedded needs no other service; kafka scales out"
    )
    topics: dict[str, TopicSection] = Field(
        default_factory=lambda: {"taskd": TopicSection()}, min_length=1, description="topics by name"
    )
    clusters: dict[str, ClusterSection] = Field(
        default_factory=lambda: {"default": ClusterSection()},
        min_length=1,
        description="Kafka clusters by name",
    )
    retry_topic: str | None = Field(
        default=None,
        min_length=1,
        description="where retries are published; default: the only topic of activations",
    )
    deadletter_topic: str = Field(
        default="taskd-dlq", min_length=1, description="where dead letters are published"
    )
    create_missing_topics: bool = Field(default=True, description="create topics that do not exist")
    default_partitions: PositiveInt = Field(default=1, description="partitions of a topic that is created")
    max_record_bytes: PositiveInt = Field(default=10_000_000, description="largest record to append")
    embedded: EmbeddedLogSection = EmbeddedLogSection()

    @property
    def consumed(self) -> dict[str, TopicSection]:
        return {name: topic for name, topic in self.topics.items() if topic.consumed}

    @property
    def retries_to(self) -> str | None:
        """The topic of retries, named or the only one of activations; None when there is no telling."""
        if self.retry_topic is not None:
            return self.retry_topic
        own = [name for name, topic in self.topics.items() if topic.raw is None and not topic.produce_only]
        return own[0] if len(own) == 1 else None

    def cluster_of(self, topic: str) -> str:
        """Name of the topic's cluster. One that is not declared is where the dead letters are."""
        declared = self.topics.get(topic) or self.topics.get(self.deadletter_topic)
        if declared is None:
            declared = self.topics.get(self.retries_to or "") or next(iter(self.topics.values()))
        return declared.cluster

    @model_validator(mode="after")
    def _topics_fit_together(self) -> LogSection:
        problems = [*self._of_retries(), *self._of_dead_letters(), *self._of_clusters()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _of_retries(self) -> Iterator[str]:
        if self.retries_to is None:
            yield (
                "retry_topic must name the topic of retries: by itself it is the one topic of activations "
                "that is neither raw nor produce_only, and there is not exactly one"
            )
            return
        declared = self.topics.get(self.retries_to)
        if declared is None:
            yield (
                f"retry_topic `{self.retries_to}` must be one of topics, "
                "with produce_only when other brokers consume it"
            )
        elif declared.raw is not None:
            yield f"retry_topic `{self.retries_to}` must not be raw: retries are activations"
        elif self.kind == "embedded" and not declared.consumed:
            yield f"retry_topic `{self.retries_to}` must be consumed: nobody else reads an embedded log"

    def _of_dead_letters(self) -> Iterator[str]:
        declared = self.topics.get(self.deadletter_topic)
        if self.deadletter_topic == self.retries_to or (declared is not None and not declared.produce_only):
            yield (
                f"deadletter_topic `{self.deadletter_topic}` must not be consumed, "
                "or dead letters would run again: name another, or set its produce_only"
            )

    def _of_clusters(self) -> Iterator[str]:
        if self.kind == "embedded":
            return
        for name, topic in self.topics.items():
            if topic.cluster not in self.clusters:
                yield f"topic `{name}` is on cluster `{topic.cluster}`; there is {', '.join(self.clusters)}"
        if self.retries_to and self.cluster_of(self.retries_to) != self.cluster_of(self.deadletter_topic):
            yield (
                "retry topic and deadletter_topic must be on one cluster, found them on "
                f"`{self.cluster_of(self.retries_to)}` and `{self.cluster_of(self.deadletter_topic)}`"
            )
        members: dict[tuple[str, str, str], tuple[str, int]] = {}
        for topic in self.consumed.values():
            if topic.group_instance_id is None:
                continue
            as_what = (topic.offset_reset, topic.session_timeout_ms)
            key = (topic.cluster, topic.consumer_group, topic.group_instance_id)
            if members.setdefault(key, as_what) != as_what:
                yield (
                    f"topics of the static member `{topic.group_instance_id}` in group "
                    f"`{topic.consumer_group}` must agree on offset_reset and session_timeout_ms"
                )
