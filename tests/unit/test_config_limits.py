"""`dispatch.limits`: what it may say, what it means to the store, and what is told of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskd.config.loader import load_broker_config
from taskd.config.schema import BrokerConfig, LimitsSection
from taskd.daemon import settings
from taskd.daemon.limiting import limit_rules
from taskd.errors import ConfigError
from taskd.inflight.limits import LimitKind, LimitRule
from taskd.inflight.rates import Rate


def load(tmp_path: Path, text: str) -> BrokerConfig:
    path = tmp_path / "broker.yaml"
    path.write_text(text)
    return load_broker_config(path, {}, {})


def test_every_kind_of_limit_reaches_the_store(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
dispatch:
  limits:
    namespaces:
      mail: {concurrency: 5}
      "shop:orders": {concurrency: 6}
      ":plain": {concurrency: 7}
    tasks:
      mail:send: {concurrency: 2, rate: 100/s}
      shop:orders:pay.card: {rate: 30/m}
      nightly:report: {rate: 5/h}
    pools:
      small: {concurrency: 4}
""",
    )
    namespace, task, pool = LimitKind.NAMESPACE, LimitKind.TASK, LimitKind.POOL
    assert settings.policy(config).limits == (
        LimitRule(namespace, "mail", None, "mail", concurrency=5),
        LimitRule(namespace, "shop:orders", "shop", "orders", concurrency=6),
        LimitRule(namespace, ":plain", "", "plain", concurrency=7),
        LimitRule(task, "mail:send", None, "mail", "send", 2, Rate(100, 1_000)),
        LimitRule(task, "shop:orders:pay.card", "shop", "orders", "pay.card", None, Rate(30, 60_000)),
        LimitRule(task, "nightly:report", None, "nightly", "report", None, Rate(5, 3_600_000)),
        LimitRule(pool, "small", concurrency=4),
    )


def test_no_limits_are_the_default() -> None:
    assert limit_rules(LimitsSection()) == ()


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ("tasks: {send: {rate: 1/s}}", "expected NAMESPACE:TASK or APPLICATION:NAMESPACE:TASK, found 'send'"),
        ("tasks: {'a:b:c:d': {rate: 1/s}}", "found 'a:b:c:d'"),
        ("tasks: {'mail:': {rate: 1/s}}", "found 'mail:'"),
        ("tasks: {'mail:send': {}}", "'mail:send' needs concurrency or rate, found neither"),
        ("tasks: {'mail:send': {rate: fast}}", "expected a rate such as 100/s, 30/m or 5/h"),
        ("tasks: {'mail:send': {rate: 0/s}}", "expected a rate such as 100/s"),
        ("tasks: {'mail:send': {rate: 0.5/s}}", "a whole number for each s, m or h"),
        ("tasks: {'mail:send': {rate: 10}}", "expected text"),
        ("tasks: {'mail:send': {rat: 10/s}}", "did you mean `rate`?"),
        ("tasks: {'mail:send': {concurrency: 0}}", "expected a number greater than 0, found 0"),
        ("namespaces: {'a:b:c': {concurrency: 1}}", "expected NAMESPACE or APPLICATION:NAMESPACE"),
        ("namespaces: {'shop:': {concurrency: 1}}", "found 'shop:'"),
        ("namespaces: {mail: {rate: 1/s}}", "unknown key `dispatch.limits.namespaces.mail.rate`"),
        ("namespaces: {mail: {}}", "`dispatch.limits.namespaces.mail.concurrency`: expected a value"),
        ("pools: {small: 3}", "expected a section with keys such as concurrency, found 3"),
        ("pool: {small: {concurrency: 3}}", "did you mean `pools`?"),
    ],
)
def test_mistakes_are_told_in_words(tmp_path: Path, limits: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, f"dispatch: {{limits: {{{limits}}}}}")
    assert told in str(error.value)


def test_in_strict_order_a_task_may_have_a_rate_and_no_concurrency(tmp_path: Path) -> None:
    strict = "strict_order_namespaces: [ledger]"
    load(tmp_path, f"dispatch: {{{strict}, limits: {{tasks: {{'ledger:book': {{rate: 1/s}}}}}}}}")
    with pytest.raises(ConfigError, match="'ledger:book' must not have a concurrency"):
        load(tmp_path, f"dispatch: {{{strict}, limits: {{tasks: {{'ledger:book': {{concurrency: 2}}}}}}}}")
