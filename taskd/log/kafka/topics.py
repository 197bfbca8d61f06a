"""Creating the topics that are missing."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import structlog
import trio

from taskd import aio  # isort: skip  # before aiokafka: it replaces functions of asyncio

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from taskd.errors import ConfigError, StartupError
from taskd.log.kafka.connection import STOP_WITHIN_S
from taskd.log.kafka.errors import FOREIGN
from taskd.log.kept import delays
from taskd.log.limits import is_topic

log = structlog.get_logger("taskd.log.kafka")


async def ensure_topics(client: Mapping[str, Any], topics: Mapping[str, int], rng: random.Random) -> None:
    """As `KafkaLog.ensure_topics`. `client`: how aiokafka's clients connect."""
    for topic in topics:
        if not is_topic(topic):
            raise ConfigError(
                f"expected a topic name of at most 249 letters, digits, '.', '_' and '-', found {topic!r}"
            )
    for delay_s in delays(rng):
        try:
            await _create_missing(client, topics)
            break
        except FOREIGN as error:
            log.warning("cannot create topics yet", retry_in_s=round(delay_s, 2), error=repr(error))
        await trio.sleep(delay_s)


async def _create_missing(client: Mapping[str, Any], topics: Mapping[str, int]) -> None:
    async def make() -> AIOKafkaAdminClient:
        return AIOKafkaAdminClient(**client)

    admin = await aio.call(make)
    try:
        await aio.call(admin.start)
        # Asked first, because a user who may not create topics may still use those that exist.
        existing = await aio.call(admin.list_topics)
        missing = [_new_topic(name, topics[name]) for name in topics if name not in existing]
        if missing:
            response = await aio.call(admin.create_topics, missing)
            for name, code, *_ in response.topic_errors:
                _judge_creation(name, errors.for_code(code))
    finally:
        await aio.finish(admin.close, within_s=STOP_WITHIN_S)


def _new_topic(name: str, partitions: int) -> NewTopic:
    topic = NewTopic(name, partitions, 1)
    topic.replication_factor = -1  # the cluster's default; the constructor would refuse to be told so
    return topic


def _judge_creation(name: str, kind: type[errors.KafkaError]) -> None:
    if kind in (errors.NoError, errors.TopicAlreadyExistsError):
        return
    if kind.retriable:
        raise kind()
    raise StartupError(
        f"Kafka refuses to create topic {name}: {kind.__name__}. "
        "Create it yourself, or allow this user to, or give another name.",
        exit_code=69,
    )
