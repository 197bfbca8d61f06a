"""Where demoted namespaces may go, and with whose credentials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from taskd.config.schema import BrokerConfig
from taskd.daemon.demoting import Demoting
from taskd.inflight.switches import DemotedTo


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
