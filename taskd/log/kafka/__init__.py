"""The log on Kafka. Only this folder imports aiokafka; its errors become ours here."""

from __future__ import annotations

from taskd.log.kafka.cluster import KafkaLog
from taskd.log.kafka.connection import Security

__all__ = ["KafkaLog", "Security"]
