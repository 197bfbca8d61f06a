"""`taskd config check|show|schema`: what is wrong, what holds and where it is from, what can be set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from taskd.cli.app import app
from taskd.config.editor_schema import json_schema
from taskd.config.loader import load_broker_config, load_worker_config, misspelt_names
from taskd.config.redaction import HIDDEN
from taskd.config.schema import BrokerConfig, WorkerConfig
from taskd.config.shape import leaves

CONF = Path(__file__).parents[2] / "conf"
WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def run(*arguments: str, **environ: str):
    return CliRunner().invoke(app, ["config", *arguments], env=WIDE | environ)


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "broker.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


# ---- check


@pytest.mark.parametrize(("name", "daemon"), [("broker.yaml", "broker"), ("worker.yaml", "worker")])
def test_a_valid_file_is_told_by_its_kind(name, daemon):
    result = run("check", str(CONF / name))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{CONF / name}: a valid configuration of `taskd {daemon}`\n"


def test_every_problem_at_once(write):
    file = write("store: {max_pending_cout: 5}\nrpc: {port: x}\nupkeep: {interval_s: 0}\n")
    result = run("check", file, TASKD_STORE__MAX_DELAY_COUNT="many")
    assert result.exit_code == 78
    for said in (
        f"unknown key `store.max_pending_cout`; did you mean `max_pending_count`? ({file}:1)",
        f"`rpc.port`: expected a whole number, found 'x' ({file}:2)",
        f"`upkeep.interval_s`: expected a number greater than 0, found 0 ({file}:3)",
        "`store.max_delay_count`: expected a whole number, found 'many' "
        "(environment variable TASKD_STORE__MAX_DELAY_COUNT)",
    ):
        assert said in result.stderr


def test_a_workers_file_is_a_workers_because_of_its_pools(write):
    file = write("pools: {mail: {slotz: 1}}\n")
    result = run("check", file)
    assert result.exit_code == 78
    assert "unknown key `pools.mail.slotz`; did you mean `slots`?" in result.stderr
    assert "unknown key `pools`" in run("check", file, "--broker").stderr
    assert run("check", write("log_level: debug\n"), "--worker").stdout.endswith("`taskd worker`\n")


def test_no_such_file():
    result = run("check", "/nonexistent.yaml")
    assert result.exit_code == 78
    assert "/nonexistent.yaml: no such file" in result.stderr


def test_files_that_are_named_are_looked_at(tmp_path, write):
    switches = write("drop_task_killswitch: [a.b]\n", "switches.yaml")
    (tmp_path / "key.pem").touch()
    file = write(
        f"rpc: {{tls: {{certificate: /nonexistent.pem, key: {tmp_path}/key.pem}}}}\n"
        f"switches: {{file: {switches}}}\n"
    )
    result = run("check", file)
    assert result.exit_code == 0
    assert "warning: `rpc.tls.certificate`: /nonexistent.pem: cannot be read here" in result.stderr
    assert "demoted_namespaces" in result.stderr
    assert "key.pem: cannot" not in result.stderr


# ---- show


def test_each_value_has_its_origin(write):
    file = write("store:\n  max_pending_count: 5\nrpc: {port: 1}\nlog_level: warning\n")
    environ = {"TASKD_LOG_LEVEL": "debug", "TASKD_UPKEEP__INTERVAL_S": "3"}
    result = run("show", file, "--http-port", "7", **environ)
    assert result.exit_code == 0
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines() if not line.endswith(":"))
    origins = {key.strip(): rest.split("#")[1].strip() for key, rest in lines.items()}
    assert origins["max_pending_count"] == f"{file}:2"
    assert origins["max_delay_count"] == "default"
    assert origins["log_level"] == "environment variable TASKD_LOG_LEVEL"
    assert origins["interval_s"] == "environment variable TASKD_UPKEEP__INTERVAL_S"
    assert "  port: 7" + " " * 35 + "# command line" in result.stdout.replace("  # ", "# ")
    shown = yaml.safe_load(result.stdout)
    assert (shown["store"]["max_pending_count"], shown["log_level"]) == (5, "debug")


def test_what_is_shown_can_be_read_back(tmp_path, write):
    for name, load in (("broker.yaml", load_broker_config), ("worker.yaml", load_worker_config)):
        shown = run("show", str(CONF / name)).stdout
        assert load(Path(write(shown, f"shown-{name}")), {}, {}) == load(CONF / name, {}, {})


def test_only_what_differs_from_the_defaults(write):
    file = write(
        "store: {max_pending_count: 5, max_delay_count: 8192}\n"
        "log: {topics: {a: {}, b: {produce_only: true}}}\n"
    )
    result = run("show", file, "--only-changed")
    shown = yaml.safe_load(result.stdout)
    assert shown["store"] == {"max_pending_count": 5}
    assert shown["log"]["topics"]["b"]["produce_only"] is True
    assert "upkeep" not in shown
    assert yaml.safe_load(run("show", write(""), "--only-changed").stdout) == {}


def test_no_secret_is_shown(write):
    file = write(
        "rpc: {secrets: [hunter2, hunter3]}\n"
        "log: {clusters: {default: {sasl_username: me, sasl_password: hunter4}}}\n"
    )
    result = run("show", file)
    assert result.exit_code == 0
    assert "hunter" not in result.stdout + result.stderr
    assert yaml.safe_load(result.stdout)["rpc"]["secrets"] == [HIDDEN, HIDDEN]


# ---- schema


@pytest.mark.parametrize(("model", "flags"), [(BrokerConfig, ()), (WorkerConfig, ("--worker",))])
def test_the_schema_names_every_key_with_description_and_default(model, flags):
    result = run("schema", *flags)
    schema = json.loads(result.stdout)
    assert schema == json_schema(model)
    sections = {model.__name__: schema, **schema["$defs"]}
    required = {name: set(about.get("required", ())) for name, about in sections.items()}
    for name, about in sections.items():
        if "properties" not in about:
            continue
        assert about["additionalProperties"] is False
        assert about["description"], name
        for key, of in about["properties"].items():
            assert "default" in of or key in required[name] or "$ref" in of, f"{name}.{key}"
            if key.endswith("_s"):
                assert of["description"].endswith("(in seconds)"), f"{name}.{key}"


def test_the_schema_tells_bounds_in_its_own_words():
    sections = json_schema(BrokerConfig)["$defs"]
    port = sections["RpcSection"]["properties"]["port"]
    assert (port["minimum"], port["maximum"]) == (0, 65535)
    assert sections["StoreSection"]["properties"]["max_pending_count"]["exclusiveMinimum"] == 0
    assert sections["StoreSection"]["properties"]["max_delay_s"]["anyOf"][0]["exclusiveMinimum"] == 0


@pytest.mark.parametrize("model", [BrokerConfig, WorkerConfig])
def test_every_key_is_described(model):
    assert [".".join(path) for path, known in leaves(model) if not known.description] == []


# ---- names of environment variables


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("TASKD_DATA_DRI", "TASKD_DATA_DIR"),
        ("TASKD_LOG_LEVLE", "TASKD_LOG_LEVEL"),
        ("TASKD_STORE_MAX_PENDING_COUNT", "TASKD_STORE__MAX_PENDING_COUNT"),
        ("TASKD_BROKR", "TASKD_BROKER"),
    ],
)
def test_a_misspelt_name_is_told_with_the_nearest(name, near):
    assert misspelt_names(BrokerConfig, {name: "x"}) == [
        f"environment variable {name} is not read; did you mean {near}?"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "TASKD_DATA_DIR",
        "TASKD_ADMIN_SECRET",
        "TASKD_LOG",
        "TASKD_TEST_KAFKA",
        "TASKD_POOLS__A__SLOTS",
        "PATH",
    ],
)
def test_other_names_are_not_told(name):
    assert misspelt_names(BrokerConfig, {name: "x"}) == []


def test_check_and_show_warn_of_them(write):
    for command in ("check", "show"):
        result = run(command, write(""), TASKD_DATA_DRI="/var/lib/taskd")
        assert result.exit_code == 0
        assert (
            "warning: environment variable TASKD_DATA_DRI is not read; did you mean TASKD_DATA_DIR?"
            in result.stderr
        )


def test_a_mapping_may_come_by_environment():
    name, text = "TASKD_PUSH__WORKER_MAP", "{shop: 'http://shop:1', mail: 'http://mail:1'}"
    config = load_broker_config(None, {}, {name: text})
    assert config.push.worker_map == {"shop": "http://shop:1", "mail": "http://mail:1"}
    lines = [line.split() for line in run("show", **{name: text}).stdout.splitlines()]
    assert ["shop:", "http://shop:1", "#", "environment", "variable", name] in lines


def test_help_teaches():
    for command in ("check", "show", "schema", "import"):
        assert f"taskd config {command} " in run(command, "--help").stdout
