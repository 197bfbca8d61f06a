"""Which errors of aiokafka mean what."""

from __future__ import annotations

from taskd import aio  # noqa: F401 # isort: skip  # before aiokafka: it replaces functions of asyncio

import asyncio

from aiokafka import errors

FOREIGN = (
    errors.KafkaError,
    errors.ConsumerStoppedError,
    errors.IllegalOperation,
    OSError,
    asyncio.TimeoutError,
)
"""What Kafka's being away, or in trouble, looks like."""

HOPELESS = (
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.InvalidTopicError,
    errors.InvalidTimestampError,
    errors.PolicyViolationError,
    errors.UnsupportedForMessageFormatError,
)
"""A record that was answered so will be answered so again."""

FORBIDDEN = (errors.TopicAuthorizationFailedError, errors.ClusterAuthorizationFailedError)
"""Operators can mend that while we run."""

NO_IDEMPOTENCE = (
    errors.ClusterAuthorizationFailedError,
    errors.UnsupportedVersionError,
    errors.IncompatibleBrokerVersion,
    errors.UnknownError,
)
"""What brokers answer that have no idempotent producers, or allow this user none. Tansu: UnknownError."""
