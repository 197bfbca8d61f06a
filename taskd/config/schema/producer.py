"""The configuration of those who call tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator

from taskd.config.schema.base import Address, PositiveSeconds, Secret, Section
from taskd.config.schema.log import ClusterSection, SaslMechanism, SecurityProtocol


class ProducerConfig(Section):
    """How `.delay()` and `taskd submit` reach the log. Environment: TASKD_LOG, TASKD_BROKER, …"""

    log: Literal["embedded", "kafka"] = Field(
        default="embedded", description="embedded: append through the broker; kafka: produce to the cluster"
    )
    broker: Address = Field(
        default="127.0.0.1:50051", description="host:port of the broker that owns the embedded log"
    )
    secret: Secret | None = Field(
        default=None, description="shared with the broker: signs our calls; default: they are not signed"
    )
    tls: bool = Field(default=False, description="the broker speaks TLS, signed by whom the machine trusts")
    tls_ca: Path | None = Field(
        default=None, description="PEM file of who signs the broker's certificate; turns TLS on"
    )
    tls_certificate: Path | None = Field(
        default=None, description="PEM file of our certificate, for a broker that asks for one"
    )
    tls_key: Path | None = Field(default=None, description="PEM file of its private key")
    kafka: str = Field(default="127.0.0.1:9092", description="bootstrap servers of the Kafka cluster")
    kafka_security_protocol: SecurityProtocol = Field(
        default="PLAINTEXT", description="how to connect to Kafka"
    )
    kafka_sasl_mechanism: SaslMechanism = Field(default="PLAIN", description="how to log in to Kafka")
    kafka_sasl_username: str | None = Field(default=None, description="user to log in to Kafka as")
    kafka_sasl_password: SecretStr | None = Field(default=None, description="that user's password")
    kafka_ssl_ca_location: Path | None = Field(
        default=None, description="PEM file of who signs Kafka's certificates; default: the system's"
    )
    kafka_ssl_certificate_location: Path | None = Field(
        default=None, description="PEM file of our certificate, when Kafka asks for one"
    )
    kafka_ssl_key_location: Path | None = Field(
        default=None, description="PEM file of that certificate's key"
    )
    topic: str = Field(default="taskd", min_length=1, description="topic of namespaces that name none")
    timeout_s: PositiveSeconds = Field(default=10, description="longest wait for an append to be durable")

    @property
    def cluster(self) -> ClusterSection:
        """The Kafka cluster in the broker's terms."""
        return ClusterSection.model_construct(
            address=self.kafka,
            security_protocol=self.kafka_security_protocol,
            sasl_mechanism=self.kafka_sasl_mechanism,
            sasl_username=self.kafka_sasl_username,
            sasl_password=self.kafka_sasl_password,
            ssl_ca_location=self.kafka_ssl_ca_location,
            ssl_certificate_location=self.kafka_ssl_certificate_location,
            ssl_key_location=self.kafka_ssl_key_location,
        )

    @model_validator(mode="after")
    def _cluster_is_complete(self) -> ProducerConfig:
        if self.cluster.incomplete:
            raise ValueError(f"for Kafka: {self.cluster.incomplete} (TASKD_KAFKA_SASL_USERNAME and the like)")
        return self
