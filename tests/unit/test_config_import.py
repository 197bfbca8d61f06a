"""`taskd config import`: the configuration of a taskbroker becomes ours, and nothing is lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from taskd.cli.app import app
from taskd.config.loader import load_broker_config
from taskd.config.taskbroker import import_config
from taskd.config.taskbroker.keys import CARRIED, reason_for_dropping
from taskd.config.yaml_file import read_yaml
from taskd.errors import ConfigError

SAMPLES = Path(__file__).parent / "samples"
STYLES = ("flat", "maps", "smallest")

# Every key that the published broker is known to take, besides the two maps and their keys.
THEIR_KEYS = """
    grpc_addr grpc_port grpc_shared_secret kafka_deadletter_topic kafka_retry_topic create_missing_topics
    default_topic_partitions delivery_mode runtime_config_path max_pending_count max_delay_count
    max_processing_count max_processing_attempts max_processing_deadline processing_deadline_grace max_size
    store.max_pending_count store.max_size max_delayed_task_allowed_sec max_message_size
    grpc_max_message_size kafka_long_topic kafka_send_timeout_ms canary_tasks batch_status_updates
    status_update_batch_size status_update_interval_ms full_vacuum_on_start vacuum_interval_ms
    maintenance_task_interval_ms health_check_killswitched runtime_metrics_interval statsd_addr
    default_metrics_tags sentry_dsn sentry_env traces_sample_rate log_level log_format log_filter
    upkeep_task_interval_ms upkeep_anything fetch.threads push.threads push.timeout raw_anything
""".split()  # noqa: SIM905


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "theirs.yaml"
        path.write_text(text)
        return path

    return write


def carried(path: Path | None, environ=None, tmp=None):
    found = import_config(path, environ or {})
    assert found.problems == []
    return yaml.safe_load(found.yaml), "\n".join(found.warnings)


def loaded(tmp_path: Path, text: str):
    ours = tmp_path / "ours.yaml"
    ours.write_text(text)
    return load_broker_config(ours, {}, {})


@pytest.mark.parametrize("style", STYLES)
def test_the_result_is_ours(style, tmp_path):
    found = import_config(SAMPLES / f"{style}.yaml", {})
    assert found.problems == []
    loaded(tmp_path, found.yaml)


@pytest.mark.parametrize("style", STYLES)
def test_every_key_of_a_file_is_carried_over_or_named(style):
    path = SAMPLES / f"{style}.yaml"
    found = import_config(path, {})
    told = found.yaml + "\n".join(found.warnings)
    tree = read_yaml(path)
    for keys, line in tree.lines.items():
        value = tree.tree
        for key in keys:
            value = value[key]
        if isinstance(value, (dict, list)) or value is None or isinstance(keys[-1], int):
            continue
        if keys[-1] in ("shop", "billing"):  # entries of worker_map, which are one line of ours
            continue
        assert f"{path}:{line}" in told, ".".join(map(str, keys))


@pytest.mark.parametrize("key", THEIR_KEYS)
def test_every_known_key_is_carried_over_or_has_a_reason(key):
    assert any(key in carried.names for carried in CARRIED) or reason_for_dropping(key), key


def test_flat(tmp_path):
    found = import_config(SAMPLES / "flat.yaml", {})
    config = loaded(tmp_path, found.yaml)
    topic, cluster = config.log.topics["jobs"], config.log.clusters["default"]
    assert list(config.log.topics) == ["jobs"]
    assert (topic.consumer_group, topic.offset_reset, topic.session_timeout_ms) == (
        "jobs-brokers",
        "earliest",
        9000,
    )
    assert cluster.address == "kafka-1.internal:9092,kafka-2.internal:9092"
    assert (cluster.security_protocol, cluster.sasl_mechanism) == ("SASL_SSL", "SCRAM-SHA-256")
    assert cluster.sasl_password.get_secret_value() == "hunter2"
    assert config.log.deadletter_topic == "jobs-dlq"
    assert (config.log.create_missing_topics, config.log.default_partitions) == (True, 4)
    store = config.store
    assert (store.max_pending_count, store.max_delay_count, store.max_processing_count) == (4096, 100, 512)
    assert (store.max_size_bytes, store.max_processing_attempts, store.max_delay_s) == (10**9, 3, 7200)
    assert (config.rpc.host, config.rpc.port, config.http.port) == ("10.0.0.7", 50052, 50053)
    assert [secret.get_secret_value() for secret in config.rpc.secrets] == ["new-secret", "old-secret"]
    assert config.max_request_bytes == 8388608
    assert config.data_dir == Path("/var/lib/taskbroker")
    assert config.store.path == Path("/var/lib/taskbroker/jobs.sqlite")
    assert config.store.vacuum_interval_s == 30
    assert config.switches.file == Path("/etc/taskbroker/runtime.yaml")
    assert (config.upkeep.interval_s, config.dispatch.processing_deadline_grace_s) == (0.5, 5)
    assert (config.log_level, config.log_format) == ("info", "json")
    said = "\n".join(found.warnings)
    for part in ("`db_name`", "`statsd_addr`", "StatsD metrics are not portable", "keep it private"):
        assert part in said
    assert "hunter2" not in said
    assert "-secret" not in said


def test_maps(tmp_path):
    found = import_config(SAMPLES / "maps.yaml", {})
    config = loaded(tmp_path, found.yaml)
    assert list(config.log.topics) == ["jobs", "mail", "clicks", "jobs-retry", "jobs-dlq"]
    assert {name: topic.cluster for name, topic in config.log.topics.items()}["clicks"] == "lake"
    assert config.log.topics["jobs"].offset_reset == "earliest"
    assert config.log.topics["mail"].offset_reset == "latest"
    assert config.log.topics["mail"].consumer_group == "taskworker"
    assert config.log.topics["mail"].consumer_disabled
    raw = config.log.topics["clicks"].raw
    assert raw.model_dump() == {
        "namespace": "analytics",
        "application": "shop",
        "taskname": "analytics.count_click",
        "processing_deadline_s": 30,
        "compression_level": -1,
    }
    assert (config.log.retry_topic, config.log.deadletter_topic) == ("jobs-retry", "jobs-dlq")
    assert config.store.max_processing_deadline_s == 600
    assert config.dispatch.mode == "push"
    assert config.push.worker_map["shop"] == "http://worker-shop:50061"
    assert config.push.timeout_s == 20
    said = "\n".join(found.warnings)
    assert "`store.adapter`" in said
    assert "hunter2" not in said


def test_defaults_of_theirs_are_written_out():
    ours, said = carried(SAMPLES / "smallest.yaml")
    assert ours == {
        "rpc": {"host": "0.0.0.0"},
        "log": {
            "kind": "kafka",
            "topics": {"taskworker": {"consumer_group": "taskworker", "offset_reset": "latest"}},
            "clusters": {"default": {"address": "127.0.0.1:9092"}},
            "deadletter_topic": "taskworker-dlq",
            "create_missing_topics": True,
        },
        "store": {"max_delay_s": 3600},
    }
    assert said == ""


@pytest.mark.parametrize(
    "text",
    [
        "kafka_topic: jobs\nkafka_topics: {jobs: {cluster: main}}\n",
        "kafka_consumer_group: g\nkafka_clusters: {main: {address: 'a:1'}}\n",
        "raw_taskname: t\nkafka_topics: {jobs: {cluster: main}}\n",
    ],
)
def test_the_styles_do_not_mix(write, text):
    with pytest.raises(
        ConfigError, match=r"kafka_topics, or the flat keys for one topic; found both: `\w+` \("
    ):
        import_config(write(text), {})


def test_the_global_default_of_offsets_goes_with_either():
    path = SAMPLES / "maps.yaml"
    assert carried(path)[0]["log"]["topics"]["jobs-retry"]["offset_reset"] == "latest"


def test_an_unknown_key_is_a_warning(write):
    ours, said = carried(write("max_pending_cuont: 3\nstore: {db_name: x}\nnew_thing: {deep: 1}\n"))
    assert "max_pending_count" not in str(ours)
    assert "`max_pending_cuont` (" in said
    assert "did you mean `max_pending_count`?" in said
    assert "`store.db_name`" in said
    assert "`new_thing.deep`" in said


def test_wrong_values_are_errors_all_at_once_and_tell_no_secret(write):
    text = "max_pending_count: lots\nmax_processing_deadline: soon\ngrpc_shared_secret: {a: hunter2}\n"
    with pytest.raises(ConfigError) as raised:
        import_config(write(text), {})
    assert "`max_pending_count`: expected a whole number, found 'lots'" in str(raised.value)
    assert "`max_processing_deadline`: expected a duration such as 500ms or 5s, found 'soon'" in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("5s", 5), ("90", 90), ("2m", 120), ("1.5h", 5400), ("250 ms", 0.25)],
)
def test_durations(write, text, seconds):
    ours, _ = carried(write(f"processing_deadline_grace: {text}\nupkeep_task_interval_ms: 250\n"))
    assert ours["dispatch"]["processing_deadline_grace_s"] == seconds
    assert ours["upkeep"]["interval_s"] == 0.25


def test_the_environment_wins_over_the_file_on_request(write):
    environ = {
        "TASKBROKER_KAFKA_TOPIC": "from-environment",
        "TASKBROKER_STORE__MAX_PENDING_COUNT": "7",
        "TASKBROKER_WORKER_MAP": '{shop = "http://shop:1"}',
        "TASKBROKER_GRPC_SHARED_SECRET": "hunter1, hunter2",
        "TASKBROKER_DB_NAME": "x",
        "OTHER": "1",
    }
    ours, said = carried(write("kafka_topic: from-file\nmax_pending_count: 3\n"), environ)
    assert list(ours["log"]["topics"]) == ["from-environment"]
    assert ours["store"]["max_pending_count"] == 7
    assert ours["push"]["worker_map"] == {"shop": "http://shop:1"}
    assert ours["rpc"]["secrets"] == ["hunter1", "hunter2"]
    assert "`db_name` (environment variable TASKBROKER_DB_NAME)" in said
    maps = {
        "TASKBROKER_KAFKA_CLUSTERS__MAIN__ADDRESS": "kafka:1",
        "TASKBROKER_KAFKA_TOPICS__jobs__CLUSTER": "main",
    }
    ours, _ = carried(None, maps)
    assert ours["log"]["clusters"] == {"main": {"address": "kafka:1"}}
    assert ours["log"]["topics"]["jobs"]["cluster"] == "main"


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info", "info"),
        ("TRACE", "debug"),
        ("librdkafka=off,warn", "warning"),
        ("h2=off", "info"),
        ("off", "error"),
    ],
)
def test_log_levels(write, text, level):
    assert carried(write(f"log_level: {text!r}\n"))[0]["log_level"] == level


def test_no_server_is_one_for_this_machine(write):
    ours, said = carried(write("grpc_port: 0\n"))
    assert ours["rpc"] == {"host": "127.0.0.1", "port": 0}
    assert "`grpc_port: 0`" in said


def test_retries_to_a_topic_of_other_brokers(write):
    ours, said = carried(write("kafka_topic: jobs\nkafka_retry_topic: later\n"))
    assert ours["log"]["topics"]["later"] == {"produce_only": True}
    assert "set its produce_only to false unless another broker does" in said


def test_a_raw_topic_in_the_flat_style(write):
    ours, _ = carried(
        write(
            "kafka_topic: clicks\nkafka_retry_topic: later\nraw_namespace: n\nraw_application: a\n"
            "raw_taskname: t\nraw_processing_deadline_duration: 1500ms\n"
        )
    )
    assert ours["log"]["topics"]["clicks"]["raw"] == {
        "namespace": "n",
        "application": "a",
        "taskname": "t",
        "processing_deadline_s": 2,
    }


def test_dead_letters_are_not_consumed(write):
    ours, _ = carried(
        write(
            "kafka_clusters: {main: {address: 'a:1'}}\n"
            "kafka_topics: {jobs: {cluster: main}, dead: {cluster: main}}\nkafka_deadletter_topic: dead\n"
        )
    )
    assert ours["log"]["topics"]["dead"]["produce_only"] is True


# ---- the command


def run(*arguments: str, **environ: str):
    return CliRunner().invoke(
        app, ["config", "import", *arguments], env={"COLUMNS": "300", "TERM": "dumb", **environ}
    )


def test_the_result_goes_to_stdout_and_warnings_to_stderr():
    result = run(str(SAMPLES / "flat.yaml"), TASKBROKER_KAFKA_TOPIC="not-asked-for")
    assert result.exit_code == 0
    assert list(yaml.safe_load(result.stdout)["log"]["topics"]) == ["jobs"]
    assert "warning: `db_name`" in result.stderr
    assert "warning" not in result.stdout


def test_what_would_be_refused_is_printed_and_told(write):
    text = "kafka_clusters: {main: {address: 'a:1'}}\nkafka_topics: {one: {}, two: {}}\n"
    result = run(str(write(text)))
    assert result.exit_code == 78
    assert "one:" in result.stdout
    assert "taskd would refuse the result" in result.stderr
    assert "retry_topic must name the topic of retries" in result.stderr


def test_a_file_or_the_environment_is_wanted():
    assert run().exit_code == 2
    assert run("--environment", TASKBROKER_KAFKA_TOPIC="jobs").exit_code == 0
