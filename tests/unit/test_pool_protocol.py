"""What a pool must say for the protocol it speaks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from taskd.config.loader import load_worker_config
from taskd.errors import ConfigError


def load(**pool: object) -> Mapping[str, object]:
    config = load_worker_config(None, {"pools": {"default": pool}}, {})
    return config.pools["default"].model_dump()


def test_the_stream_and_this_machine_are_the_defaults() -> None:
    pool = load()
    assert pool["protocol"] == "stream"
    assert pool["listen"] == {"host": "127.0.0.1", "port": 50053, "tls": None}


@pytest.mark.parametrize(
    ("pool", "sentence"),
    [
        ({"protocol": "grpc"}, "expected 'stream', 'pull' or 'push', found 'grpc'"),
        ({"protocol": "pull", "namespaces": ["mail"]}, "namespaces need application"),
        ({"protocol": "push", "brokers": ["a:1", "b:1"]}, "brokers must be one, found 2"),
        ({"protocol": "push", "tls": {"ca": "ca.pem"}}, "listen.tls must be set too"),
    ],
)
def test_what_does_not_fit_is_a_sentence(pool: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(**pool)


@pytest.mark.parametrize(
    "pool",
    [
        {"protocol": "stream", "namespaces": ["mail"], "brokers": ["a:1", "b:1"]},
        {"protocol": "pull", "namespaces": ["mail"], "application": "", "brokers": ["a:1", "b:1"]},
        {"protocol": "push", "namespaces": ["mail"], "brokers": ["a:1", "a:1"]},
        {"protocol": "push", "tls": {}, "listen": {"tls": {"certificate": "c.pem", "key": "k.pem"}}},
    ],
)
def test_what_fits(pool: dict[str, object]) -> None:
    assert load(**pool)["protocol"] == pool["protocol"]
