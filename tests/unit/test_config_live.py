"""What a new configuration changes while a daemon runs, and what waits for a restart."""

from __future__ import annotations

import pytest
import trio
from pydantic import SecretStr
from structlog.testing import capture_logs

from taskd.config import live
from taskd.config.redaction import HIDDEN, redacted
from taskd.config.schema import BrokerConfig, Section, WorkerConfig
from taskd.config.shape import keys_of
from taskd.daemon.reload import Reloads, follow, reloaded
from taskd.errors import ConfigError


def config(**values) -> BrokerConfig:
    return BrokerConfig.model_validate(values)


@pytest.mark.parametrize(("model", "live_keys"), [(BrokerConfig, live.BROKER), (WorkerConfig, live.WORKER)])
def test_live_keys_exist(model, live_keys):
    for key in live_keys:
        *section, name = key.split(".")
        assert name in keys_of(model, tuple(section)), key


def test_live_keys_are_taken_and_the_others_are_named():
    running = config()
    wanted = config(
        store={"max_pending_count": 7}, rpc={"port": 1}, upkeep={"interval_s": 3, "max_rows_per_round": 5}
    )
    with capture_logs() as logs:
        held = reloaded(lambda: wanted, running, live.BROKER)
    assert held == config(store={"max_pending_count": 7}, upkeep={"interval_s": 3})
    assert [(line["event"], line["key"]) for line in logs] == [
        ("needs a restart", "rpc.port"),
        ("configuration changed", "store.max_pending_count"),
        ("configuration changed", "upkeep.interval_s"),
        ("needs a restart", "upkeep.max_rows_per_round"),
    ]
    assert {"running": 50051, "wanted": 1}.items() <= logs[0].items()
    assert {"was": 2048, "now": 7}.items() <= logs[1].items()


def test_what_waits_for_a_restart_is_named_each_time():
    wanted = config(rpc={"port": 1})
    running = reloaded(lambda: wanted, config(), live.BROKER)
    with capture_logs() as logs:
        reloaded(lambda: wanted, running, live.BROKER)
    assert [line["event"] for line in logs] == ["needs a restart"]


def test_an_invalid_file_changes_nothing_and_every_problem_is_logged():
    def load() -> BrokerConfig:
        raise ConfigError("first\nsecond")

    with capture_logs() as logs:
        assert reloaded(load, config(), live.BROKER) is None
    assert [line["problem"] for line in logs[:2]] == ["first", "second"]
    assert logs[2]["event"] == "the old configuration holds"


async def test_a_reload_that_fails_ends_nothing():
    asked, hear = trio.open_memory_channel[int](2)
    for number in range(2):
        asked.send_nowait(number)
    asked.close()
    applied = []

    def apply(wanted: BrokerConfig) -> None:
        applied.append(wanted)
        if len(applied) == 1:
            raise RuntimeError("cannot be")

    with capture_logs() as logs:
        await follow(Reloads(hear, config), config, apply, live.BROKER)
    assert len(applied) == 2
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [
        "configuration not wholly applied; restart when it suits"
    ]
    assert logs[-1]["event"] == "configuration reloaded"


def test_a_pool_that_came_or_went():
    pools = {"default": {}, "mail": {"slots": 3}}
    found = live.changes(WorkerConfig(), WorkerConfig.model_validate({"pools": pools}), live.WORKER)
    assert [(change.key, change.live) for change in found] == [("pools.mail", False)]


class Secretive(Section):
    password: SecretStr = SecretStr("old")
    url: str = ""


def test_changes_show_no_secrets():
    new = Secretive(password=SecretStr("new"), url="http://me:hunter2@host:1/")
    found = live.changes(Secretive(), new, ())
    assert [change.now for change in found] == [HIDDEN, f"http://{HIDDEN}@host:1/"]
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        (("rpc", "secrets"), ("a", "b"), [HIDDEN, HIDDEN]),
        (("grpc_shared_secret",), ["a"], [HIDDEN]),
        (("sasl_password",), None, None),
        (("sasl_password",), SecretStr(""), ""),
        (("rpc", "tls", "key"), "/etc/taskd/key.pem", "/etc/taskd/key.pem"),
        (("store", "max_pending_count"), 5, 5),
        (("worker_map",), {"app": "http://u:p@h"}, {"app": f"http://{HIDDEN}@h"}),
    ],
)
def test_redaction(path, value, shown):
    assert redacted(path, value) == shown
