"""Fixtures of more than one test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from taskd.testing.kafka import open_local_kafka


@pytest.fixture(scope="session")
def kafka_address() -> Iterator[str]:
    """`host:port` of a Kafka-protocol broker: Tansu, or the cluster of TASKD_TEST_KAFKA."""
    with open_local_kafka() as address:
        yield address
