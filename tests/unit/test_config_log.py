"""Topics and clusters: what fits together, and what is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from taskd.config.loader import load_broker_config, load_producer_config
from taskd.config.schema import LogSection
from taskd.errors import ConfigError
from taskd.log.kafka import Security

RAW = {"namespace": "n", "application": "a", "taskname": "t", "processing_deadline_s": 10}


def log_of(**keys: Any) -> LogSection:
    return LogSection.model_validate({"kind": "kafka", **keys})


@pytest.mark.parametrize(
    ("keys", "retries_to"),
    [
        ({}, "taskd"),
        ({"topics": {"a": {}}}, "a"),
        ({"topics": {"a": {}, "b": {"produce_only": True}}}, "a"),
        ({"topics": {"a": {"consumer_disabled": True}}}, "a"),
        ({"topics": {"a": {}, "b": {}}, "retry_topic": "b"}, "b"),
        ({"topics": {"a": {}, "b": {"raw": RAW}}}, "a"),
        ({"topics": {"b": {"raw": RAW}, "r": {"produce_only": True}}, "retry_topic": "r"}, "r"),
    ],
)
def test_where_retries_go(keys, retries_to):
    assert log_of(**keys).retries_to == retries_to


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"topics": {"a": {}, "b": {}}}, "retry_topic must name the topic of retries"),
        ({"topics": {"b": {"raw": RAW}}}, "retry_topic must name the topic of retries"),
        ({"retry_topic": "other"}, "retry_topic `other` must be one of topics"),
        ({"topics": {"b": {"raw": RAW}}, "retry_topic": "b"}, "`b` must not be raw"),
        ({"deadletter_topic": "taskd"}, "deadletter_topic `taskd` must not be consumed"),
        (
            {
                "topics": {"a": {}, "d": {"consumer_disabled": True}},
                "retry_topic": "a",
                "deadletter_topic": "d",
            },
            "deadletter_topic `d` must not be consumed",
        ),
        ({"topics": {"a": {"cluster": "x"}}}, "topic `a` is on cluster `x`; there is default"),
        (
            {
                "topics": {"a": {}, "taskd-dlq": {"cluster": "x", "produce_only": True}},
                "clusters": {"default": {}, "x": {}},
            },
            "must be on one cluster, found them on `default` and `x`",
        ),
        (
            {
                "topics": {
                    "a": {"group_instance_id": "1"},
                    "b": {"group_instance_id": "1", "offset_reset": "latest"},
                },
                "retry_topic": "a",
            },
            "static member `1` in group `taskd` must agree",
        ),
        (
            {"kind": "embedded", "topics": {"a": {}, "r": {"produce_only": True}}, "retry_topic": "r"},
            "retry_topic `r` must be consumed",
        ),
        (
            {"clusters": {"default": {"security_protocol": "SASL_SSL"}}},
            "needs sasl_username and sasl_password",
        ),
        ({"clusters": {"default": {"ssl_key_location": "k"}}}, "or none"),
        ({"topics": {}}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(keys, problem):
    with pytest.raises(ValidationError) as caught:
        log_of(**keys)
    assert problem in str(caught.value)


def test_what_is_not_declared_is_where_the_dead_letters_are():
    clusters = {"default": {}, "x": {}}
    topics = {"a": {"cluster": "x"}, "b": {}}
    log = log_of(topics=topics, clusters=clusters, retry_topic="a")
    assert (log.cluster_of("taskd-dlq"), log.cluster_of("elsewhere"), log.cluster_of("b")) == (
        "x",
        "x",
        "default",
    )


def test_what_is_consumed():
    topics = {"a": {}, "b": {"produce_only": True}, "c": {"consumer_disabled": True}, "d": {"raw": RAW}}
    assert list(log_of(topics=topics, retry_topic="a").consumed) == ["a", "d"]


def test_a_password_is_not_shown_and_comes_from_the_environment():
    environ = {
        "TASKD_LOG__KIND": "kafka",
        "TASKD_LOG__CLUSTERS__DEFAULT__SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "TASKD_LOG__CLUSTERS__DEFAULT__SASL_USERNAME": "taskd",
        "TASKD_LOG__CLUSTERS__DEFAULT__SASL_PASSWORD": "hush",
    }
    cluster = load_broker_config(None, {}, environ).log.clusters["default"]
    assert "hush" not in repr(cluster)
    assert cluster.sasl_password is not None
    assert cluster.sasl_password.get_secret_value() == "hush"


def test_producers_log_in_too():
    environ = {
        "TASKD_LOG": "kafka",
        "TASKD_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "TASKD_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "TASKD_KAFKA_SASL_USERNAME": "taskd",
    }
    with pytest.raises(ConfigError, match="SASL_PLAINTEXT needs sasl_username and sasl_password"):
        load_producer_config({}, environ)
    config = load_producer_config({}, environ | {"TASKD_KAFKA_SASL_PASSWORD": "hush"})
    security = Security.of(config.cluster)
    assert (security.mechanism, security.username, security.password) == ("SCRAM-SHA-512", "taskd", "hush")
    assert "hush" not in repr(security) + repr(config)
