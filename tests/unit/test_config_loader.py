"""Every problem at once, with the key, what was expected, what was found and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskd.config.loader import load_broker_config, load_producer_config, load_worker_config, pool_of
from taskd.errors import ConfigError


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "broker.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(path: Path | None, environ: dict[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_broker_config(path, overrides, environ or {})
    assert caught.value.exit_code == 78
    return str(caught.value)


def test_without_anything_the_defaults_hold():
    config = load_broker_config(None, {}, {})
    assert (config.rpc.host, config.rpc.port, config.log.kind) == ("127.0.0.1", 50051, "embedded")


def test_file_below_environment_below_flags(written):
    path = written("store: {max_pending_count: 1, max_delay_count: 1, max_processing_count: 1}\n")
    environ = {"TASKD_STORE__MAX_DELAY_COUNT": "2", "TASKD_STORE__MAX_PROCESSING_COUNT": "2"}
    store = load_broker_config(path, {"store.max_processing_count": 3}, environ).store
    assert (store.max_pending_count, store.max_delay_count, store.max_processing_count) == (1, 2, 3)


def test_a_flag_that_is_not_given_changes_nothing(written):
    path = written("rpc: {port: 7}\n")
    assert load_broker_config(path, {"rpc.port": None}, {}).rpc.port == 7


def test_environment_of_producers_and_of_workers_is_passed_over():
    environ = {
        "TASKD_LOG": "embedded",
        "TASKD_TEST_KAFKA": "h:1",
        "TASKD_POOLS__DEFAULT__SLOTS": "9",
        "TASKD_DATA_DIR": "/srv/taskd",
        "TASKD_LOG__MAX_RECORD_BYTES": "7",
        "TASKD_LOG_LEVEL": "",
    }
    config = load_broker_config(None, {}, environ)
    assert (config.data_dir, config.log.max_record_bytes, config.log_level) == (Path("/srv/taskd"), 7, "info")


def test_lists_in_the_environment():
    environ = {"TASKD_DISPATCH__STRICT_ORDER_NAMESPACES": "a, b", "TASKD_POOLS__X__BROKERS": "[h:1, 'i:2']"}
    assert load_broker_config(None, {}, environ).dispatch.strict_order_namespaces == ("a", "b")
    assert load_worker_config(None, {}, environ).pools["x"].brokers == ("h:1", "i:2")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "store:\n  max_pending_cout: 5\n",
            "unknown key `store.max_pending_cout`; did you mean `max_pending_count`? ({path}:2)",
        ),
        ("stroe: {}\n", "unknown key `stroe`; did you mean `store`? ({path}:1)"),
        ("http: {zzz: 1}\n", "unknown key `http.zzz`; known here: host, port, tls ({path}:1)"),
        (
            "store: {max_pending_count: many}\n",
            "`store.max_pending_count`: expected a whole number, found 'many' ({path}:1)",
        ),
        (
            "store: {max_pending_count: 0}\n",
            "`store.max_pending_count`: expected a number greater than 0, found 0 ({path}:1)",
        ),
        (
            "store: {max_pending_count: yes}\n",
            "`store.max_pending_count`: expected a number, found True ({path}:1)",
        ),
        (
            "store: {tombstone_ttl_s: .inf}\n",
            "`store.tombstone_ttl_s`: expected a finite number, found inf ({path}:1)",
        ),
        (
            "http: {port: 70000}\n",
            "`http.port`: expected a number less than or equal to 65535, found 70000 ({path}:1)",
        ),
        ("log:\n  kind: kafak\n", "`log.kind`: expected 'embedded' or 'kafka', found 'kafak' ({path}:2)"),
        (
            "log: {retry_topic: 7}\n",
            "`log.retry_topic`: expected text (put a number in quotes), found 7 ({path}:1)",
        ),
        (
            "log: {topics: {a: {}}, deadletter_topic: a}\n",
            "`log`: deadletter_topic `a` must not be consumed, or dead letters would run again:"
            " name another, or set its produce_only ({path}:1)",
        ),
        ("http: 7\n", "`http`: expected a section with keys such as host, port, tls, found 7 ({path}:1)"),
        (
            "log:\n  deadletter_topic: a\n  deadletter_topic: b\n",
            "`log.deadletter_topic`: given twice, on line 2 and on line 3; keep one ({path}:3)",
        ),
        ("1: x\n", "{path}:1: expected a word as key, found 1; quote it"),
        ("- a\n", "{path}: expected a mapping of keys to values at the top, found a list"),
        ("text\n", "{path}: expected a mapping of keys to values at the top, found a single value"),
        (
            "log:\n  topics: [a\n",
            "{path}:3: not valid YAML: expected ',' or ']', but got '<stream end>'"
            " (while parsing a flow sequence)",
        ),
        ("a: &a {b: *a}\n", "{path}: nested too deeply, or a part that contains itself"),
        ("a: " + "[" * 5000, "{path}: nested too deeply, or a part that contains itself"),
        ("a: 2024-13-45\n", "{path}: a value cannot be read: month must be in 1..12"),
        (b"a: \xff\n", "{path}: expected UTF-8 text, found other bytes at position 3"),
    ],
)
def test_one_problem_one_sentence(written, text, sentence):
    path = written(text)
    assert refused(path) == sentence.replace("{path}", str(path))


def test_problems_come_all_at_once_also_behind_an_unknown_key(written):
    path = written("log: {topcs: a, topics: {b: {}}, deadletter_topic: b}\nrpc: {port: -1}\n")
    message = refused(path, {"TASKD_STORE__MAX_SIZE_BYTES": "big"}, drain_grace_s=-1)
    assert len(message.splitlines()) == 5
    assert "did you mean `topics`?" in message
    assert "`log`: deadletter_topic `b` must not be consumed" in message
    assert "(environment variable TASKD_STORE__MAX_SIZE_BYTES)" in message
    assert "found -1 (command line)" in message


def test_misspelt_sections_in_the_environment():
    assert refused(None, {"TASKD_STOR__MAX_SIZE_BYTES": "1"}) == (
        "unknown section `stor`; did you mean `TASKD_STORE__MAX_SIZE_BYTES`?"
        " (environment variable TASKD_STOR__MAX_SIZE_BYTES)"
    )
    assert "did you mean `max_size_bytes`?" in refused(None, {"TASKD_STORE__MAX_SIZE": "1"})


def test_a_section_with_every_line_commented_out_is_empty(written):
    for text in ("store:\n  # max_size_bytes: 1\nlog:\n", "# nothing\n"):
        assert load_broker_config(written(text), {}, {}).log.retries_to == "taskd"


def test_anchors_and_merge_keys_are_not_repetitions(written):
    path = written("rpc: &a {host: 0.0.0.0, port: 1}\nhttp:\n  <<: *a\n  port: 2\n")
    config = load_broker_config(path, {}, {})
    assert (config.http.host, config.http.port) == ("0.0.0.0", 2)


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file" in refused(tmp_path / "none.yaml")
    assert "found a folder" in refused(tmp_path)


def test_pools(written):
    path = written("pools: {mail: {slots: 1}, web.app: {brokers: ['h:1']}}\n")
    config = load_worker_config(path, {"pools": {"web.app": {"slots": 5, "brokers": None}}}, {})
    assert (pool_of(config, "web.app").slots, pool_of(config, "web.app").brokers) == (5, ("h:1",))
    with pytest.raises(ConfigError, match=r"`mial` .* it has mail, web\.app; did you mean `mail`\?"):
        pool_of(config, "mial")
    with pytest.raises(ConfigError) as caught:
        load_worker_config(None, {"pools": {"x": {"brokers": ["nowhere"]}}}, {})
    assert str(caught.value) == (
        "`pools.x.brokers.0`: expected HOST:PORT, such as 127.0.0.1:50051, found 'nowhere' (command line)"
    )
    with pytest.raises(ConfigError, match="`pools`: expected a mapping, found None"):
        load_worker_config(written("pools:\n"), {}, {})


def test_producers_read_plain_names():
    config = load_producer_config({"broker": "h:1"}, {"TASKD_LOG": "kafka", "TASKD_STORE__X": "1"})
    assert (config.log, config.broker) == ("kafka", "h:1")
    with pytest.raises(ConfigError, match=r"`log`: expected 'embedded' or 'kafka', found 'x' \(environment"):
        load_producer_config({}, {"TASKD_LOG": "x"})


def test_a_secret_in_a_wrong_place_is_not_told(written):
    for text in (
        "rpc: {secrets: hunter2}\n",
        "rpc: {secrets: [[hunter2]]}\n",
        "rpc: {secrets: {a: hunter2}}\n",
    ):
        assert "rpc.secrets" in (told := refused(written(text)))
        assert "hunter2" not in told


def test_who_may_work_may_not_give_orders(written):
    told = refused(written("rpc: {secrets: [old, shared]}\nadmin: {secrets: [shared]}\n"))
    assert told.startswith("`admin`: secrets must have none of rpc.secrets: ")
    assert "shared" not in told
    assert "`admin`" in refused(written("rpc: {secrets: [a]}\n"), {"TASKD_ADMIN__SECRETS": "a"})
    config = load_broker_config(written("rpc: {secrets: [a]}\nadmin: {secrets: [b]}\n"), {}, {})
    assert config.admin.secrets != config.rpc.secrets


def test_a_section_in_part_keeps_the_default_port(written):
    config = load_broker_config(written("rpc: {host: 0.0.0.0}\nhttp: {host: 0.0.0.0}\n"), {}, {})
    assert (config.rpc.port, config.http.port) == (50051, 50052)
