"""What can be configured, stage by stage: names, units, defaults and one line on each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _not_a_bool(value: object) -> object:
    # YAML reads `yes` and `on` as true, and true would pass for the number 1.
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Port = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0, le=65535)]
PositiveInt = Annotated[int, BeforeValidator(_not_a_bool), Field(gt=0)]
PositiveSeconds = Annotated[float, BeforeValidator(_not_a_bool), Field(gt=0)]
GraceSeconds = Annotated[float, BeforeValidator(_not_a_bool), Field(ge=0)]


def _host_and_port(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("expected HOST:PORT, such as 127.0.0.1:50051")
    return value


Address = Annotated[str, AfterValidator(_host_and_port)]


class Section(BaseModel):
    """A part of the configuration; a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ListenSection(Section):
    """Where to listen. The default is this machine only."""

    host: str = Field(default="127.0.0.1", description="address to bind")
    port: Port = Field(default=0, description="port to bind; 0 takes a free one")


class KafkaSection(Section):
    """The Kafka cluster, when `log.kind` is kafka."""

    address: str = Field(
        default="127.0.0.1:9092", description="bootstrap servers, host:port, comma separated"
    )
    security_protocol: Literal["PLAINTEXT"] = Field(default="PLAINTEXT", description="how to connect")
    session_timeout_ms: PositiveInt = Field(
        default=6_000, description="a member silent this long loses its partitions"
    )
    max_message_bytes: PositiveInt = Field(default=10_000_000, description="largest record to produce")


class EmbeddedLogSection(Section):
    """The embedded log, when `log.kind` is embedded. It lives in `data_dir`."""

    partitions: PositiveInt = Field(default=1, description="partitions of a topic that is created")
    retention_s: PositiveSeconds = Field(
        default=86_400, description="read records are kept this long for re-reading"
    )
    max_record_bytes: PositiveInt = Field(default=10_000_000, description="largest record to take")


class LogSection(Section):
    """Where activations come from."""

    kind: Literal["embedded", "kafka"] = Field(
        default="embedded", description="embedded needs no other service; kafka scales out"
    )
    topic: str = Field(default="taskd", min_length=1, description="topic to consume")
    consumer_group: str = Field(
        default="taskd", min_length=1, description="consumer group of the brokers that share the topic"
    )
    offset_reset: Literal["earliest", "latest"] = Field(
        default="earliest", description="where to begin when nothing is committed"
    )
    retry_topic: str | None = Field(
        default=None, description="where retries are published; default: the consumed topic"
    )
    deadletter_topic: str = Field(
        default="taskd-dlq", min_length=1, description="where dead letters are published"
    )
    create_missing_topics: bool = Field(default=True, description="create topics that do not exist")
    embedded: EmbeddedLogSection = EmbeddedLogSection()
    kafka: KafkaSection = KafkaSection()

    @model_validator(mode="after")
    def _topics_differ(self) -> LogSection:
        if self.deadletter_topic in (self.topic, self.retry_topic):
            raise ValueError(
                "deadletter_topic must differ from topic and retry_topic, or dead letters would run again"
            )
        return self


class StoreSection(Section):
    """Limits of what is in flight."""

    max_pending_count: PositiveInt = Field(
        default=2_048, description="most rows waiting; reading pauses above it"
    )
    max_delay_count: PositiveInt = Field(default=8_192, description="most rows delayed")
    max_processing_count: PositiveInt = Field(default=2_048, description="most rows handed out")
    max_size_bytes: PositiveInt = Field(
        default=3_000_000_000, description="largest database; reading pauses above it"
    )
    max_processing_attempts: PositiveInt = Field(default=5, description="most times one row may start")
    max_processing_deadline_s: PositiveSeconds | None = Field(
        default=None, description="no lease is longer than this"
    )
    max_delay_s: PositiveSeconds | None = Field(
        default=None, description="longer delays are shortened to this"
    )
    tombstone_ttl_s: PositiveSeconds = Field(default=600, description="finished ids are remembered this long")
    tombstone_max_count: PositiveInt = Field(default=2_000_000, description="finished ids remembered at most")


class IngestSection(Section):
    """How batches are read."""

    batch_max_records: PositiveInt = Field(default=1_024, description="records in one transaction at most")
    batch_max_bytes: PositiveInt = Field(default=16_000_000, description="bytes in one transaction at most")


class DispatchSection(Section):
    """How work is handed out."""

    processing_deadline_grace_s: GraceSeconds = Field(
        default=3, description="added to every deadline before the broker acts"
    )
    lease_s: PositiveSeconds = Field(
        default=30, description="a stream lease ends this long after its worker's last frame"
    )
    max_assignments_per_frame: PositiveInt = Field(
        default=256, description="activations in one frame to a worker"
    )
    strict_order_namespaces: tuple[str, ...] = Field(
        default=(), description="namespaces that run one activation at a time, in order"
    )


class UpkeepSection(Section):
    """The small duties."""

    interval_s: PositiveSeconds = Field(default=1.0, description="time between two rounds")
    startup_quiet_s: GraceSeconds = Field(
        default=60, description="no lease is judged so soon after a start: workers may still report"
    )
    max_rows_per_round: PositiveInt = Field(default=2_000, description="rows one duty handles in one go")


class BrokerConfig(Section):
    """Configuration of `taskd broker`."""

    data_dir: Path = Field(
        default=Path("taskd-data"), description="folder of the store and the embedded log; one broker each"
    )
    rpc: ListenSection = ListenSection(port=50051)
    http: ListenSection = ListenSection(port=50052)
    log: LogSection = LogSection()
    store: StoreSection = StoreSection()
    ingest: IngestSection = IngestSection()
    dispatch: DispatchSection = DispatchSection()
    upkeep: UpkeepSection = UpkeepSection()
    drain_grace_s: GraceSeconds = Field(
        default=10, description="how long to wait for running work when stopping"
    )
    max_request_bytes: PositiveInt = Field(default=10 * 1024 * 1024, description="largest RPC request")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log line"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else json"
    )


class PoolSection(Section):
    """One processing pool of a worker."""

    brokers: tuple[Address, ...] = Field(
        default=("127.0.0.1:50051",), min_length=1, description="host:port of each broker"
    )
    application: str | None = Field(
        default=None, description="only activations of this application; default: any"
    )
    namespaces: tuple[str, ...] = Field(
        default=(), description="only activations of these namespaces; default: any"
    )
    slots: PositiveInt = Field(default=2, description="child processes, each runs one task at a time")
    max_tasks_per_child: PositiveInt = Field(
        default=10_000, description="a child is replaced after so many tasks"
    )
    max_prefetch: Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0)] = Field(
        default=256, description="most activations waiting in the worker for a slot"
    )
    drain_grace_s: GraceSeconds | None = Field(
        default=None,
        description="how long running tasks may finish when stopping; default: their longest deadline",
    )


class WorkerConfig(Section):
    """Configuration of `taskd worker`."""

    pools: dict[str, PoolSection] = Field(default_factory=lambda: {"default": PoolSection()}, min_length=1)
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log line"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else json"
    )


class ProducerConfig(Section):
    """How `.delay()` and `taskd submit` reach the log. Environment: TASKD_LOG, TASKD_BROKER, …"""

    log: Literal["embedded", "kafka"] = Field(
        default="embedded", description="embedded: append through the broker; kafka: produce to the cluster"
    )
    broker: Address = Field(
        default="127.0.0.1:50051", description="host:port of the broker that owns the embedded log"
    )
    kafka: str = Field(default="127.0.0.1:9092", description="bootstrap servers of the Kafka cluster")
    topic: str = Field(default="taskd", min_length=1, description="topic of namespaces that name none")
    timeout_s: PositiveSeconds = Field(default=10, description="longest wait for an append to be durable")
