"""TLS, mutual TLS and every way to log in, against Apache Kafka."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio
from real_kafka import Listeners

from taskd import aio  # isort: skip  # before aiokafka: it replaces functions of asyncio

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest

from taskd.errors import ConfigError, LogUnavailable
from taskd.log.base import Forbidden, Outgoing, Position
from taskd.log.kafka import KafkaLog, Security

WITHIN_S = 30

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


def login(protocol: str, mechanism: str, of: Listeners, password: str | None = None) -> Security:
    ca = Path(of.ca) if protocol == "SASL_SSL" else None
    return Security(protocol, mechanism, of.username, password or of.password, ca)


def mutual(of: Listeners) -> Security:
    return Security("SSL", ca=Path(of.ca), certificate=Path(of.certificate), key=Path(of.key))


async def there_and_back(address: str, security: Security) -> bytes:
    """Create a topic, append, read, commit."""
    topic = f"t-{uuid4().hex}"
    with trio.fail_after(WITHIN_S):
        async with aio.open_loop():
            log = KafkaLog(address, security=security)
            await log.ensure_topics({topic: 1})
            async with log.open_writer() as writer, log.open_reader([topic], topic) as reader:
                (answer,) = await writer.append([Outgoing(topic, b"hello")])
                assert isinstance(answer, Position)
                while not (records := await reader.read_batch(1, 5)):
                    pass
                await reader.commit({answer.partition: answer.offset + 1})
                assert await reader.committed(answer.partition) == 1
                return records[0].value


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
async def test_logging_in(listeners: Listeners, protocol: str, mechanism: str) -> None:
    address = listeners.sasl_ssl if protocol == "SASL_SSL" else listeners.sasl_plaintext
    assert await there_and_back(address, login(protocol, mechanism, listeners)) == b"hello"


async def test_mutual_tls(listeners: Listeners) -> None:
    assert await there_and_back(listeners.ssl, mutual(listeners)) == b"hello"


@pytest.mark.parametrize("fault", ["password", "authority", "no certificate"])
async def test_wrong_credentials_are_an_outage_and_no_end(
    listeners: Listeners, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.log.kafka.writer.APPEND_WITHIN_S", 1.0)
    address, security = {
        "password": (
            listeners.sasl_plaintext,
            login("SASL_PLAINTEXT", "SCRAM-SHA-256", listeners, password="wrong"),
        ),
        "authority": (
            listeners.sasl_ssl,
            Security("SASL_SSL", "PLAIN", listeners.username, listeners.password),
        ),
        "no certificate": (listeners.ssl, Security("SSL", ca=Path(listeners.ca))),
    }[fault]
    async with aio.open_loop(), KafkaLog(address, security=security).open_writer() as writer:
        (answer,) = await writer.append([Outgoing("t", b"x")])
    assert isinstance(answer, LogUnavailable)


async def test_what_is_forbidden_is_told_from_what_is_hopeless_and_may_be_allowed(
    listeners: Listeners,
) -> None:
    topic = f"t-{uuid4().hex}"
    async with aio.open_loop():
        log = KafkaLog(listeners.sasl_plaintext, security=login("SASL_PLAINTEXT", "PLAIN", listeners))
        await log.ensure_topics({topic: 1})
        async with log.open_writer() as writer:
            (answer,) = await writer.append([Outgoing(topic, b"x")])
            assert isinstance(answer, Position)
            await access(listeners, CreateAclsRequest, topic)  # somebody else's from now on
            expected = f"Kafka does not allow us to write to topic {topic}: TopicAuthorizationFailedError"
            with trio.fail_after(WITHIN_S):
                while isinstance(answer, Position):  # brokers hear of it a moment later
                    (answer,) = await writer.append([Outgoing(topic, b"x")])
            assert isinstance(answer, Forbidden)
            assert str(answer) == expected
        async with log.open_writer() as writer:  # one that never could
            answers = await writer.append([Outgoing(topic, b"x") for _ in range(3)])
            assert [str(answer) for answer in answers] == [expected] * 3
            await access(listeners, DeleteAclsRequest, topic)
            with trio.fail_after(WITHIN_S):
                while not isinstance(answer, Position):
                    (answer,) = await writer.append([Outgoing(topic, b"x")])


async def access(listeners: Listeners, request: Callable[..., Any], topic: str) -> None:
    """Make only a user `nobody` a writer of this topic, or take that back."""
    any_host, is_topic, literal, write, allow = "*", 2, 3, 4, 3

    async def change() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=listeners.plaintext)
        await admin.start()
        try:
            rule = (is_topic, topic, literal, "User:nobody", any_host, write, allow)
            await admin._client.send(admin._client.get_random_node(), request(*rule))
        finally:
            await admin.close()

    await aio.call(change)


def test_files_that_cannot_be_used_are_a_matter_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="file of ssl_ca_location"):
        KafkaLog("h:1", security=Security("SSL", ca=tmp_path / "none.pem"))
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ConfigError, match="ssl_key_location"):
        KafkaLog("h:1", security=Security("SSL", certificate=empty, key=empty))
