"""Where demoted namespaces may go, and with whose credentials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from taskd.config.schema import BrokerConfig
from taskd.daemon.demoting import ENSURE_WITHIN_S, Demoting
from taskd.errors import ConfigError, LogUnavailable
from taskd.inflight.switches import DemotedTo
from taskd.log.base import Outgoing


def demoting(**log: Any) -> Demoting:
    clusters = {
        "default": {"address": "a:9092, b:9092"},
        "other": {
            "address": "c:9092",
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_username": "taskd",
            "sasl_password": "hidden",
        },
    }
    topics = {
        "taskd": {},
        "read-too": {"cluster": "other"},
        "written": {"produce_only": True},
        "resting": {"consumer_disabled": True},
    }
    wanted = {"kind": "kafka", "clusters": clusters, "topics": topics, "retry_topic": "taskd", **log}
    config = BrokerConfig.model_validate({"data_dir": Path("unused"), "log": wanted})
    return Demoting(config, None, {}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("topic", "cluster", "refused"),
    [
        ("taskworker-long", None, False),
        ("written", None, False),
        ("taskd", None, True),
        ("read-too", None, True),
        ("taskd", "B:9092", True),  # one server of the cluster is the cluster
        ("taskd", "c:9092", False),  # a topic of that name, elsewhere
        ("taskd", "elsewhere:9092", False),
        ("read-too", "x:1,c:9092", True),
    ],
)
def test_never_to_a_topic_that_is_read_here(topic: str, cluster: str | None, refused: bool) -> None:
    assert bool(demoting().refusal(DemotedTo(topic, cluster))) is refused


def test_the_embedded_log_is_one_place() -> None:
    there = demoting(kind="embedded", topics={"taskd": {}}, clusters={"default": {}}, retry_topic=None)
    assert "`taskd` is a topic that this broker consumes" in there.refusal(DemotedTo("taskd", None))
    assert there.refusal(DemotedTo("taskworker-long", None)) == ""


def test_credentials_are_shown_to_their_own_cluster_only() -> None:
    assert demoting()._security("c:9092").username == "taskd"
    assert demoting()._security("elsewhere:9092").username is None


def test_credentials_are_not_shown_to_a_server_named_beside_theirs() -> None:
    assert demoting()._security("c:9092,elsewhere:9092").username is None


@pytest.mark.parametrize(
    "cluster", ["host:notaport", "[::1:x", "", " , ", ":9092", "a:9092,b:", "host:99999"]
)
def test_what_is_no_address_is_refused_before_a_client_is_made_of_it(cluster: str) -> None:
    assert "expected host:port" in demoting().refusal(DemotedTo("taskworker-long", cluster))


@pytest.mark.parametrize("cluster", ["host", "host:9092,", "[::1]:9092", "x:1, y:2"])
def test_addresses_as_existing_files_have_them(cluster: str) -> None:
    assert demoting().refusal(DemotedTo("taskworker-long", cluster)) == ""


class Away:
    """A log whose cluster never answers, and an inflight that demotes to it."""

    demoted_to = DemotedTo("taskworker-long", None)

    async def ensure_topics(self, topics: object) -> None:
        await trio.sleep_forever()


async def test_a_cluster_that_is_away_does_not_hold_the_duty_for_ever(autojump_clock: trio.abc.Clock) -> None:
    there = demoting(create_missing_topics=True)
    there._inflight = Away()  # type: ignore[assignment]
    there._own_logs = {"default": Away()}  # type: ignore[dict-item]
    with trio.fail_after(ENSURE_WITHIN_S + 1):
        (answer,) = await there.append([Outgoing("taskworker-long", b"", None)])
    assert isinstance(answer, LogUnavailable)


async def test_tls_files_that_are_gone_do_not_end_the_broker(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = demoting()

    def gone(*_: object, **__: object) -> None:
        raise ConfigError("no such file")

    monkeypatch.setattr("taskd.daemon.demoting.KafkaLog", gone)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(there.run)
        for _ in range(2):  # it may be asked again
            with pytest.raises(LogUnavailable):
                await there._outlet(DemotedTo("taskworker-long", "c:9092"))
            assert there._asked.is_set()
            await trio.testing.wait_all_tasks_blocked()
            assert not there._asked.is_set()
        nursery.cancel_scope.cancel()
