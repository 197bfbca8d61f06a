"""What SIGHUP does to the certificates of a broker: files are read again, wrong ones change nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from taskd.config import live
from taskd.config.schema import BrokerConfig, PoolSection
from taskd.daemon.certificates import BROKER, POOL, Certificates, ReadOnce

trustme = pytest.importorskip("trustme")


def config(folder: Path, mode: str = "push") -> BrokerConfig:
    both = folder / "both.pem"
    files = {"certificate": both, "key": both}
    return BrokerConfig.model_validate(
        {
            "rpc": {"tls": files},
            "http": {"tls": files},
            "dispatch": {"mode": mode},
            "push": {"tls": files},
        }
    )


def issue(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    pem = trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    pem.write_to_path(folder / "both.pem")


def test_every_context_is_renewed_also_from_other_paths(tmp_path: Path) -> None:
    issue(tmp_path / "old")
    issue(tmp_path / "new")
    certificates = Certificates(config(tmp_path / "old"), BROKER)
    before = {place: context.latest for place, context in certificates.contexts.items()}
    assert set(before) == {"rpc.tls", "http.tls", "push.tls"}
    with capture_logs() as logs:
        certificates.renew(config(tmp_path / "new"))
    assert logs == []
    assert all(context.latest is not before[place] for place, context in certificates.contexts.items())


def test_a_wrong_file_is_named_and_what_was_holds(tmp_path: Path) -> None:
    issue(tmp_path / "a")
    certificates = Certificates(config(tmp_path / "a"), BROKER)
    before = {place: context.latest for place, context in certificates.contexts.items()}
    (tmp_path / "a" / "both.pem").write_text("torn")
    with capture_logs() as logs:
        certificates.renew(config(tmp_path / "a"))
    assert [(line["event"], line["of"]) for line in logs] == [
        ("the old certificate holds", place) for place in ("rpc.tls", "http.tls", "push.tls")
    ]
    assert "expected a PEM certificate" in logs[0]["problem"]
    assert {place: context.latest for place, context in certificates.contexts.items()} == before


def test_what_is_not_used_is_not_read(tmp_path: Path) -> None:
    issue(tmp_path / "a")
    held = BrokerConfig.model_validate({"push": {"tls": {"ca": tmp_path / "missing.pem"}}})
    assert Certificates(held, BROKER).contexts == {}
    certificates = Certificates(config(tmp_path / "a", mode="pull"), BROKER)
    assert set(certificates.contexts) == {"rpc.tls", "http.tls"}
    shutil.rmtree(tmp_path / "a")
    with capture_logs() as logs:
        certificates.renew(BrokerConfig())  # turning TLS off needs a restart, and is said elsewhere
    assert logs == []


def test_other_files_need_no_restart_but_turning_tls_on_does(tmp_path: Path) -> None:
    changed = {
        c.key: c.live for c in live.changes(config(tmp_path / "a"), config(tmp_path / "b"), live.BROKER)
    }
    assert changed == {
        f"{section}.tls.{name}": True
        for section in ("rpc", "http", "push")
        for name in ("certificate", "key")
    }
    turned_on = live.changes(BrokerConfig(), config(tmp_path / "a", mode="pull"), live.BROKER)
    assert {c.key: c.live for c in turned_on} == {
        "rpc.tls": False,
        "http.tls": False,
        "push.tls.certificate": True,
        "push.tls.key": True,
    }


def test_a_pool_has_its_own(tmp_path: Path) -> None:
    issue(tmp_path / "a")
    both = tmp_path / "a" / "both.pem"
    files = {"certificate": both, "key": both}
    section = {"tls": files, "protocol": "push", "listen": {"tls": files}, "secrets": ["x"]}
    pool = PoolSection.model_validate(section)
    certificates = Certificates(pool, POOL)
    before = {place: context.latest for place, context in certificates.contexts.items()}
    assert set(before) == {"tls", "listen.tls"}
    certificates.renew(pool)
    assert all(context.latest is not before[place] for place, context in certificates.contexts.items())
    assert Certificates(PoolSection(), POOL).contexts == {}


def test_files_that_are_read_once_are_named_when_they_change(tmp_path: Path) -> None:
    ca, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    ca.write_text("one")
    cluster = {
        "address": "h:1",
        "ssl_ca_location": ca,
        "ssl_certificate_location": key,
        "ssl_key_location": key,
    }
    broker = BrokerConfig.model_validate({"log": {"kind": "kafka", "clusters": {"default": cluster}}})
    files = ReadOnce(broker)
    with capture_logs() as logs:
        files.tell()
        assert logs == []
        ca.write_text("another")
        files.tell()
    assert [(line["event"], line["key"]) for line in logs] == [
        ("needs a restart", "log.clusters.default.ssl_ca_location")
    ]
    assert "has changed since the start" in logs[0]["problem"]
