"""What can be configured, stage by stage: names, units, defaults and one line on each."""

from __future__ import annotations

from taskd.config.schema.base import (
    Address,
    GraceSeconds,
    Port,
    PositiveInt,
    PositiveSeconds,
    Secret,
    Section,
    WorkerUrl,
)
from taskd.config.schema.broker import AdminSection, BrokerConfig, SwitchesSection
from taskd.config.schema.dispatch import (
    ConcurrencySection,
    DispatchSection,
    LimitsSection,
    PushSection,
    PushTlsSection,
    TaskLimitSection,
)
from taskd.config.schema.listen import HttpSection, ListenSection, ListenTlsSection, RpcSection
from taskd.config.schema.log import (
    ClusterSection,
    EmbeddedLogSection,
    LogSection,
    RawSection,
    SaslMechanism,
    SecurityProtocol,
    TopicSection,
)
from taskd.config.schema.producer import ProducerConfig
from taskd.config.schema.store import IngestSection, StoreSection, UpkeepSection
from taskd.config.schema.worker import ClientTlsSection, PoolListenSection, PoolSection, WorkerConfig

__all__ = [
    "Address",
    "AdminSection",
    "BrokerConfig",
    "ClientTlsSection",
    "ClusterSection",
    "ConcurrencySection",
    "DispatchSection",
    "EmbeddedLogSection",
    "GraceSeconds",
    "HttpSection",
    "IngestSection",
    "LimitsSection",
    "ListenSection",
    "ListenTlsSection",
    "LogSection",
    "PoolListenSection",
    "PoolSection",
    "Port",
    "PositiveInt",
    "PositiveSeconds",
    "ProducerConfig",
    "PushSection",
    "PushTlsSection",
    "RawSection",
    "RpcSection",
    "SaslMechanism",
    "Secret",
    "Section",
    "SecurityProtocol",
    "StoreSection",
    "SwitchesSection",
    "TaskLimitSection",
    "TopicSection",
    "UpkeepSection",
    "WorkerConfig",
    "WorkerUrl",
]
