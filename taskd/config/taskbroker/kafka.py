"""Topics and clusters of an existing configuration: one topic by flat keys, or several by maps."""

from __future__ import annotations

from collections.abc import Iterator

from taskd.config.taskbroker.source import Given, Source
from taskd.errors import ConfigError

THEIR_DEFAULT = "taskbroker's default"
MAPS = ("kafka_clusters", "kafka_topics")
RAW_KEYS = ("namespace", "application", "taskname", "processing_deadline_duration", "compression_level")
FLAT = (
    "kafka_topic",
    "kafka_cluster",
    "kafka_consumer_group",
    "kafka_session_timeout_ms",
    "kafka_auto_commit_interval_ms",
    "kafka_security_protocol",
    "kafka_sasl_*",
    "kafka_ssl_*",
    "raw_*",
)
CLUSTER_KEYS = (
    "security_protocol",
    "sasl_mechanism",
    "sasl_username",
    "sasl_password",
    "ssl_ca_location",
    "ssl_certificate_location",
    "ssl_key_location",
)
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
EVERY_BATCH = "offsets are committed after each batch that is durable"

Path = tuple[str, ...]
Put = tuple[Path, object, str]  # a key of ours, its value, and where the value is from


class Kafka:
    """Yields what it found; `warnings` tell what it could not carry over."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._reset = source.take("kafka_auto_offset_reset")
        self.warnings: list[str] = []

    def puts(self) -> Iterator[Put]:
        """Raises ConfigError when both styles are mixed."""
        flat, maps = self._source.any_of(*FLAT), self._source.any_of(*MAPS)
        if flat and maps:
            raise ConfigError(
                "expected kafka_clusters and kafka_topics, or the flat keys for one topic; found both: "
                f"{', '.join(map(str, flat))} beside {maps[0]}; move the flat ones into the maps"
            )
        yield ("log", "kind"), "kafka", "taskbroker has no other log"
        yield from self._maps() if maps else self._flat()

    # ---- flat: one topic on one cluster

    def _flat(self) -> Iterator[Put]:
        source = self._source
        name = self._text(source.take("kafka_topic")) or "taskworker"
        cluster: Path = ("log", "clusters", "default")
        topic: Path = ("log", "topics", name)
        yield from self._or_default((*cluster, "address"), source.take("kafka_cluster"), "127.0.0.1:9092")
        for key in CLUSTER_KEYS:
            yield from self._cluster_key(cluster, key, source.take(f"kafka_{key}"))
        yield from self._topic_of(
            topic,
            group=source.take("kafka_consumer_group"),
            reset=None,
            session=source.take("kafka_session_timeout_ms"),
        )
        switch = source.take("raw_mode") or source.take("raw_enabled")
        if switch is None or source.flag(switch):
            yield from self._raw(topic, {key: source.take(f"raw_{key}") for key in RAW_KEYS})
        else:
            for key in RAW_KEYS:
                source.take(f"raw_{key}")

    # ---- maps: any number of both

    def _maps(self) -> Iterator[Put]:
        source = self._source
        clusters, topics = source.names("kafka_clusters"), source.names("kafka_topics")
        for name in clusters:
            at: Path = ("log", "clusters", name)
            address = source.take("kafka_clusters", name, "address")
            yield from self._or_default((*at, "address"), address, "127.0.0.1:9092")
            for key in CLUSTER_KEYS:
                yield from self._cluster_key(at, key, source.take("kafka_clusters", name, key))
        if not topics:
            topics = ["taskworker"]
            self.warnings.append("no topic is named; taskbroker's default is taken: `taskworker`")
        for name in topics:
            yield from self._mapped_topic(name, clusters)

    def _mapped_topic(self, name: str, clusters: list[str]) -> Iterator[Put]:
        source = self._source

        def take(key: str) -> Given | None:
            return source.take("kafka_topics", name, key)

        at: Path = ("log", "topics", name)
        cluster = take("cluster")
        if cluster is not None:
            yield (*at, "cluster"), self._text(cluster), cluster.origin
        elif len(clusters) == 1 and clusters != ["default"]:
            yield (*at, "cluster"), clusters[0], "the only cluster"
        for key in ("produce_only", "consumer_disabled"):
            if (given := take(key)) is not None:
                yield (*at, key), source.flag(given), given.origin
        yield from self._topic_of(
            at,
            group=take("consumer_group"),
            reset=take("auto_offset_reset"),
            session=take("session_timeout_ms"),
        )
        if (commit := take("auto_commit_interval_ms")) is not None:
            self.warnings.append(f"{commit} is dropped: {EVERY_BATCH}")
        raw = {key: source.take("kafka_topics", name, "raw", key) for key in RAW_KEYS}
        source.take("kafka_topics", name, "raw")  # null: not raw
        yield from self._raw(at, raw)

    # ---- both

    def _topic_of(
        self, at: Path, *, group: Given | None, reset: Given | None, session: Given | None
    ) -> Iterator[Put]:
        yield from self._or_default((*at, "consumer_group"), group, "taskworker")
        reset = reset or self._reset
        if reset is None:
            yield (*at, "offset_reset"), "latest", THEIR_DEFAULT
        else:
            words = {"smallest": "earliest", "beginning": "earliest", "largest": "latest", "end": "latest"}
            text = str(reset.value).lower()
            known = Given(reset.key, words.get(text, text), reset.origin)
            yield (*at, "offset_reset"), self._source.one_of(known, "earliest", "latest"), reset.origin
        if session is not None:
            yield (*at, "session_timeout_ms"), self._source.milliseconds(session), session.origin

    def _raw(self, at: Path, given: dict[str, Given | None]) -> Iterator[Put]:
        source = self._source
        if all(value is None for value in given.values()):
            return
        for key in RAW_KEYS:
            value = given[key]
            if value is None:
                continue
            if key == "processing_deadline_duration":
                yield (*at, "raw", "processing_deadline_s"), source.whole_seconds(value), value.origin
            elif key == "compression_level":
                yield (*at, "raw", key), source.number(value), value.origin
            else:
                yield (*at, "raw", key), self._text(value), value.origin

    def _cluster_key(self, at: Path, key: str, given: Given | None) -> Iterator[Put]:
        text = self._text(given)
        if given is None or text is None:
            return
        if key in ("security_protocol", "sasl_mechanism"):
            text = text.upper()
        if key == "sasl_mechanism" and text not in MECHANISMS:
            self.warnings.append(f"{given} is dropped: taskd knows {', '.join(MECHANISMS)}, found {text}")
            return
        yield (*at, key), text, given.origin

    def _or_default(self, at: Path, given: Given | None, default: str) -> Iterator[Put]:
        if given is not None:
            yield at, self._text(given), given.origin
        else:
            yield at, default, THEIR_DEFAULT

    def _text(self, given: Given | None) -> str | None:
        return None if given is None else self._source.text(given)
