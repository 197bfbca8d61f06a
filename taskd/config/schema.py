"""What can be configured, stage by stage: names, units, defaults and one line on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from taskd.config.selectors import namespace_of, rate_of, task_of


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


def _worker_url(value: str) -> str:
    scheme, separator, rest = value.rstrip("/").partition("://")
    if not separator or scheme not in ("http", "https"):
        raise ValueError("expected http://HOST:PORT (https with TLS), such as http://10.0.0.7:50053")
    host, _, port = rest.rpartition(":")
    if not host or "/" in rest or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("expected http://HOST:PORT, such as http://10.0.0.7:50053")
    return f"{scheme}://{rest}"


WorkerUrl = Annotated[str, AfterValidator(_worker_url)]


class Section(BaseModel):
    """A part of the configuration; a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ListenSection(Section):
    """Where to listen. The default is this machine only."""

    host: str = Field(default="127.0.0.1", description="address to bind")
    port: Port = Field(default=0, description="port to bind; 0 takes a free one")


class ListenTlsSection(Section):
    """TLS of a listener. Files are PEM."""

    certificate: Path = Field(description="the server's certificate, then those that signed it")
    key: Path = Field(description="its private key, without a passphrase")
    client_ca: Path | None = Field(
        default=None, description="callers must show a certificate signed by these (mutual TLS)"
    )


class HttpSection(ListenSection):
    """Where health and metrics are served."""

    port: Port = Field(default=50052, description="port to bind; 0 takes a free one")
    tls: ListenTlsSection | None = Field(default=None, description="certificate and key; null: in the clear")


Secret = Annotated[SecretStr, Field(min_length=1)]


class RpcSection(ListenSection):
    """Where workers and producers connect, and what they must show."""

    port: Port = Field(default=50051, description="port to bind; 0 takes a free one")
    secrets: tuple[Secret, ...] = Field(
        default=(), description="calls must be signed with one of these; empty: anybody may call"
    )
    tls: ListenTlsSection | None = Field(default=None, description="certificate and key; null: in the clear")
    max_connections: PositiveInt = Field(default=4_096, description="connections at once; more are closed")
    keepalive_s: PositiveSeconds = Field(
        default=60, description="a connection is asked so often whether its peer still lives"
    )


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
    compression_level: Annotated[int, BeforeValidator(_not_a_bool), Field(ge=-1, le=22)] = Field(
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


class StoreSection(Section):
    """The file of what is in flight, and its limits."""

    path: Path | None = Field(default=None, description="the file; null: inflight.sqlite in data_dir")
    integrity_check: Literal["quick", "full", "off"] = Field(
        default="quick", description="look for damage at the start; a damaged file is set aside"
    )
    integrity_check_within_s: GraceSeconds = Field(
        default=1.0, description="longest that this holds up the start; then it goes on beside the work"
    )
    vacuum_interval_s: PositiveSeconds = Field(
        default=10, description="time between two looks for free room to give back to the disk"
    )
    max_pending_count: PositiveInt = Field(
        default=2_048, description="most rows waiting; reading pauses above it"
    )
    max_delay_count: PositiveInt = Field(default=8_192, description="most rows delayed")
    max_processing_count: PositiveInt = Field(default=2_048, description="most rows handed out")
    max_size_bytes: PositiveInt = Field(
        default=3_000_000_000, description="largest database; reading pauses above it"
    )
    max_processing_attempts: PositiveInt = Field(default=5, description="most times one row may start")
    max_crashes: PositiveInt = Field(
        default=3, description="most processes one row may crash: then it fails, with the reason poison"
    )
    enforce_max_attempts: bool = Field(
        default=False, description="dead-letter what is retried more than 3 times beyond its max_attempts"
    )
    max_processing_deadline_s: PositiveSeconds | None = Field(
        default=None, description="no run is longer than this, however many heartbeats its task gives"
    )
    max_delay_s: PositiveSeconds | None = Field(
        default=None, description="longer delays are shortened to this"
    )
    tombstone_ttl_s: PositiveSeconds = Field(default=600, description="finished ids are remembered this long")
    tombstone_max_count: PositiveInt = Field(default=2_000_000, description="finished ids remembered at most")


class IngestSection(Section):
    """How batches are read."""

    batch_max_records: PositiveInt = Field(
        default=1_024, description="records in one transaction at most (16 MB end a batch too)"
    )
    max_application_share: Annotated[float, BeforeValidator(_not_a_bool), Field(gt=0, le=1)] = Field(
        default=1, description="largest part of max_pending_count that one application may fill; 1: no share"
    )
    overflow_topic: str | None = Field(
        default=None, description="takes what is beyond a share; null: reading waits instead"
    )


def _rate(value: str) -> str:
    rate_of(value)
    return value


class ConcurrencySection(Section):
    """A limit of what is handed out at once."""

    concurrency: PositiveInt = Field(description="most activations that workers hold at once")


class TaskLimitSection(Section):
    """Limits of one task."""

    concurrency: PositiveInt | None = Field(
        default=None, description="most activations that workers hold at once; null: any number"
    )
    rate: Annotated[str, AfterValidator(_rate)] | None = Field(
        default=None, description="most activations handed out in a time, 100/s, 30/m or 5/h; null: any"
    )


class LimitsSection(Section):
    """Limits of what is handed out, over all workers of this broker."""

    namespaces: dict[str, ConcurrencySection] = Field(
        default_factory=dict, description="by namespace, or application:namespace"
    )
    tasks: dict[str, TaskLimitSection] = Field(
        default_factory=dict, description="by namespace:task, or application:namespace:task"
    )
    pools: dict[str, ConcurrencySection] = Field(
        default_factory=dict, description="by name of the pool that workers on the stream belong to"
    )

    @model_validator(mode="after")
    def _can_be_read(self) -> LimitsSection:
        if problems := [*self._of(self.namespaces, namespace_of), *self._of(self.tasks, task_of)]:
            raise ValueError("; ".join(problems))
        empty = [name for name, limit in self.tasks.items() if limit == TaskLimitSection()]
        if empty:
            raise ValueError(f"task {empty[0]!r} needs concurrency or rate, found neither")
        return self

    def _of(self, keys: Iterable[str], read: Callable[[str], object]) -> Iterator[str]:
        for key in keys:
            try:
                read(key)
            except ValueError as error:
                yield str(error)


class DispatchSection(Section):
    """How work is handed out."""

    mode: Literal["pull", "push"] = Field(
        default="pull", description="pull: workers fetch; push: to the workers of push.worker_map"
    )
    processing_deadline_grace_s: GraceSeconds = Field(
        default=3, description="added to every deadline before the broker acts"
    )
    lease_s: PositiveSeconds = Field(
        default=30, description="a stream lease ends this long after its worker's last frame"
    )
    max_assignments_per_frame: PositiveInt = Field(
        default=256, description="activations in one frame to a worker"
    )
    unknown_tasks: Literal["park", "fail"] = Field(
        default="park", description="what no connected worker knows; park: waits for one; fail: is handed out"
    )
    strict_order_namespaces: tuple[str, ...] = Field(
        default=(), description="namespaces that run one activation at a time, in order"
    )
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _limits_fit_strict_order(self) -> DispatchSection:
        for name, limit in self.limits.tasks.items():
            _, namespace, _ = task_of(name)
            if namespace in self.strict_order_namespaces and limit.concurrency is not None:
                raise ValueError(
                    f"limits.tasks {name!r} must not have a concurrency: {namespace!r} is one of "
                    "strict_order_namespaces, which run one activation at a time; a rate is possible"
                )
        return self


class PushTlsSection(Section):
    """TLS of the way to workers whose URL begins with https. Files are PEM."""

    ca: Path | None = Field(
        default=None, description="who signs the workers' certificates; null: whom the machine trusts"
    )
    certificate: Path | None = Field(
        default=None, description="our certificate, for workers that ask for one"
    )
    key: Path | None = Field(default=None, description="its private key, without a passphrase")


class PushSection(Section):
    """Delivery to workers that wait to be called, when `dispatch.mode` is push; `rpc.secrets` sign."""

    worker_map: dict[str, WorkerUrl] = Field(
        default_factory=dict, description="URL of the workers of each application, http://HOST:PORT"
    )
    timeout_s: PositiveSeconds = Field(default=30, description="longest wait for a worker to take one")
    claim_margin_s: PositiveSeconds = Field(
        default=10, description="added to timeout_s: then a claim is over and the activation waits again"
    )
    max_in_flight_per_worker: PositiveInt = Field(
        default=16, le=100, description="calls under way to one URL; HTTP/2 workers take 100 at most"
    )
    tls: PushTlsSection = PushTlsSection()


class UpkeepSection(Section):
    """The small duties."""

    interval_s: PositiveSeconds = Field(default=1.0, description="time between two rounds")
    startup_quiet_s: GraceSeconds = Field(
        default=60, description="no lease is judged so soon after a start: workers may still report"
    )
    max_rows_per_round: PositiveInt = Field(default=2_000, description="rows one duty handles in one go")


class SwitchesSection(Section):
    """The file of switches: tasks that are killed, namespaces that are sent elsewhere."""

    file: Path | None = Field(default=None, description="YAML file of switches; null: there is none")
    poll_s: PositiveSeconds = Field(
        default=0.5, description="how often it is looked at; a change holds within twice that at most"
    )


class AdminSection(Section):
    """Where operators' orders are taken, such as `taskd pause`."""

    socket: Path | None = Field(
        default=None, description="Unix socket, for the broker's user only; null: admin.sock in data_dir"
    )
    secrets: tuple[Secret, ...] = Field(
        default=(), description="orders signed with one of these are taken at `rpc` too; empty: none are"
    )


class BrokerConfig(Section):
    """Configuration of `taskd broker`."""

    data_dir: Path = Field(
        default=Path("taskd-data"), description="folder of the store and the embedded log; one broker each"
    )
    rpc: RpcSection = RpcSection()
    http: HttpSection = HttpSection()
    log: LogSection = LogSection()
    store: StoreSection = StoreSection()
    ingest: IngestSection = IngestSection()
    dispatch: DispatchSection = DispatchSection()
    push: PushSection = PushSection()
    upkeep: UpkeepSection = UpkeepSection()
    switches: SwitchesSection = SwitchesSection()
    admin: AdminSection = AdminSection()
    drain_grace_s: GraceSeconds = Field(
        default=8, description="how long to wait for running work when stopping; closing takes a second more"
    )
    max_request_bytes: PositiveInt = Field(default=10 * 1024 * 1024, description="largest RPC request")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log line"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else json"
    )

    @field_validator("admin")
    @classmethod
    def _orders_have_secrets_of_their_own(cls, admin: AdminSection, info: ValidationInfo) -> AdminSection:
        rpc = info.data.get("rpc")  # None: it is wrong itself
        if rpc is not None and set(admin.secrets) & set(rpc.secrets):
            raise ValueError(
                "secrets must have none of rpc.secrets: whoever may work or produce could also give orders"
            )
        return admin


class ClientTlsSection(Section):
    """TLS of a client. Files are PEM."""

    ca: Path | None = Field(
        default=None, description="who signs the brokers' certificates; null: authorities the machine trusts"
    )
    certificate: Path | None = Field(
        default=None, description="our certificate, for brokers that ask for one"
    )
    key: Path | None = Field(default=None, description="its private key, without a passphrase")


class PoolListenSection(ListenSection):
    """Where a pool with `protocol: push` is called by its broker; the pool's secrets sign those calls."""

    port: Port = Field(default=50053, description="port to bind; 0 takes a free one")
    tls: ListenTlsSection | None = Field(default=None, description="certificate and key; null: in the clear")


class PoolSection(Section):
    """One processing pool of a worker."""

    protocol: Literal["stream", "pull", "push"] = Field(
        default="stream",
        description="stream: brokers of taskd; pull: any broker of the taskbroker protocol, which is asked "
        "for work; push: such a broker that calls this worker",
    )
    brokers: tuple[Address, ...] = Field(
        default=("127.0.0.1:50051",), min_length=1, description="host:port of each broker"
    )
    secrets: tuple[Secret, ...] = Field(
        default=(), description="shared with the brokers; the first signs; empty: calls are not signed"
    )
    tls: ClientTlsSection | None = Field(
        default=None, description="how brokers prove who they are; null: not"
    )
    application: str | None = Field(
        default=None, description="only activations of this application; default: any"
    )
    namespaces: tuple[str, ...] = Field(
        default=(), description="only activations of these namespaces; default: any"
    )
    listen: PoolListenSection = PoolListenSection()
    slots: PositiveInt = Field(default=2, description="child processes, each runs one task at a time")
    async_slots: Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0)] = Field(
        default=100, description="async activations that run at once; 0: this pool runs no async tasks"
    )
    async_children: PositiveInt = Field(
        default=1, description="child processes that share them; more use more cores"
    )
    async_stall_s: Annotated[float, BeforeValidator(_not_a_bool), Field(ge=2)] = Field(
        default=5.0, description="an async task that keeps its child's loop from the others so long is ended"
    )
    max_tasks_per_child: PositiveInt = Field(
        default=10_000, description="a child is replaced after so many tasks"
    )
    max_child_rss_mb: PositiveInt | None = Field(
        default=None, description="a child is replaced after a task that left it with more memory; null: not"
    )
    child_memory_limit_mb: PositiveInt | None = Field(
        default=None,
        description="most data memory (MiB) of each child; beyond it a task gets MemoryError; null: no limit. "
        "A child above four fifths of it is replaced after its task",
    )
    spare_children: Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0)] = Field(
        default=1, description="children kept ready, so that replacing one does not cost its start-up"
    )
    max_prefetch: Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0)] = Field(
        default=256, description="most activations waiting in the worker for a slot"
    )
    drain_grace_s: GraceSeconds | None = Field(
        default=None,
        description="how long running tasks may finish when stopping; default: their longest deadline",
    )
    exception_grace_s: GraceSeconds = Field(
        default=1.0,
        description="for a task at its deadline, or cancelled, to end by the exception raised in it; then "
        "its processes get SIGTERM. With terminate_grace_s below the brokers' processing_deadline_grace_s",
    )
    terminate_grace_s: GraceSeconds = Field(
        default=1.0, description="for its processes to end by SIGTERM; then they get SIGKILL"
    )

    @model_validator(mode="after")
    def _fits_its_protocol(self) -> PoolSection:
        if self.protocol == "pull" and self.namespaces and self.application is None:
            raise ValueError("with protocol pull, namespaces need application: brokers find nothing without")
        if self.protocol == "push" and len(set(self.brokers)) > 1:
            raise ValueError(
                f"with protocol push, brokers must be one, found {len(set(self.brokers))}: nothing "
                "says which of them pushed a task, and a result given to the wrong one is lost; "
                "run a pool for each"
            )
        if self.protocol == "push" and self.tls is not None and self.listen.tls is None:
            raise ValueError(
                "with protocol push and tls, listen.tls must be set too: tasks come that way; "
                "{certificate: FILE, key: FILE}"
            )
        return self


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
    secret: Secret | None = Field(
        default=None, description="shared with the broker: signs our calls; default: they are not signed"
    )
    tls: bool = Field(default=False, description="the broker speaks TLS, signed by whom the machine trusts")
    tls_ca: Path | None = Field(
        default=None, description="PEM file of who signs the broker's certificate; turns TLS on"
    )
    tls_certificate: Path | None = Field(
        default=None, description="PEM file of our certificate, for a broker that asks for one"
    )
    tls_key: Path | None = Field(default=None, description="PEM file of its private key")
    kafka: str = Field(default="127.0.0.1:9092", description="bootstrap servers of the Kafka cluster")
    kafka_security_protocol: SecurityProtocol = Field(
        default="PLAINTEXT", description="how to connect to Kafka"
    )
    kafka_sasl_mechanism: SaslMechanism = Field(default="PLAIN", description="how to log in to Kafka")
    kafka_sasl_username: str | None = Field(default=None, description="user to log in to Kafka as")
    kafka_sasl_password: SecretStr | None = Field(default=None, description="that user's password")
    kafka_ssl_ca_location: Path | None = Field(
        default=None, description="PEM file of who signs Kafka's certificates; default: the system's"
    )
    kafka_ssl_certificate_location: Path | None = Field(
        default=None, description="PEM file of our certificate, when Kafka asks for one"
    )
    kafka_ssl_key_location: Path | None = Field(
        default=None, description="PEM file of that certificate's key"
    )
    topic: str = Field(default="taskd", min_length=1, description="topic of namespaces that name none")
    timeout_s: PositiveSeconds = Field(default=10, description="longest wait for an append to be durable")

    @property
    def cluster(self) -> ClusterSection:
        """The Kafka cluster in the broker's terms."""
        return ClusterSection.model_construct(
            address=self.kafka,
            security_protocol=self.kafka_security_protocol,
            sasl_mechanism=self.kafka_sasl_mechanism,
            sasl_username=self.kafka_sasl_username,
            sasl_password=self.kafka_sasl_password,
            ssl_ca_location=self.kafka_ssl_ca_location,
            ssl_certificate_location=self.kafka_ssl_certificate_location,
            ssl_key_location=self.kafka_ssl_key_location,
        )

    @model_validator(mode="after")
    def _cluster_is_complete(self) -> ProducerConfig:
        if self.cluster.incomplete:
            raise ValueError(f"for Kafka: {self.cluster.incomplete} (TASKD_KAFKA_SASL_USERNAME and the like)")
        return self
