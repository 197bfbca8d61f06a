"""The configuration of `taskd worker`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from taskd.config.schema.base import Address, GraceSeconds, Port, PositiveInt, Secret, Section, not_a_bool
from taskd.config.schema.listen import ListenSection, ListenTlsSection


class ClientTlsSection(Section):
    """TLS of a client. Files are PEM."""

    ca: Path | None = Field(
        default=None, description="who signs the brokers' certificates; null: authorities the machine trusts"
    )
    certificate: Path | None = Field(
        default=None, description="our certificate, for brokers that ask for one"
    )
    key: Path | None = Field(default=None, description="its private key, without a passphrase")


class PoolListenSection(ListenSection):
    """Where a pool with `protocol: push` is called by its broker; the pool's secrets sign those calls."""

    port: Port = Field(default=50053, description="port to bind; 0 takes a free one")
    tls: ListenTlsSection | None = Field(default=None, description="certificate and key; null: in the clear")


class PoolSection(Section):
    """One processing pool of a worker."""

    protocol: Literal["stream", "pull", "push"] = Field(
        default="stream",
        description="stream: brokers of taskd; pull: any broker of the taskbroker protocol, which is asked "
        "for work; push: such a broker that calls this worker",
    )
    brokers: tuple[Address, ...] = Field(
        default=("127.0.0.1:50051",), min_length=1, description="host:port of each broker"
    )
    secrets: tuple[Secret, ...] = Field(
        default=(), description="shared with the brokers; the first signs; empty: calls are not signed"
    )
    tls: ClientTlsSection | None = Field(
        default=None, description="how brokers prove who they are; null: not"
    )
    application: str | None = Field(
        default=None, description="only activations of this application; default: any"
    )
    namespaces: tuple[str, ...] = Field(
        default=(), description="only activations of these namespaces; default: any"
    )
    listen: PoolListenSection = PoolListenSection()
    modules: tuple[str, ...] = Field(
        default=(), description="Python modules to import besides the installed plugins, for their tasks"
    )
    slots: PositiveInt = Field(default=2, description="child processes, each runs one task at a time")
    async_slots: Annotated[int, BeforeValidator(not_a_bool), Field(ge=0)] = Field(
        default=100, description="async activations that run at once; 0: this pool runs no async tasks"
    )
    async_children: PositiveInt = Field(
        default=1, description="child processes that share them; more use more cores"
    )
    async_stall_s: Annotated[float, BeforeValidator(not_a_bool), Field(ge=2)] = Field(
        default=5.0, description="an async task that keeps its child's loop from the others so long is ended"
    )
    max_tasks_per_child: PositiveInt = Field(
        default=100_000,
        description="a child is replaced after so many tasks; one start costs as much as thousands",
    )
    max_child_rss_mb: PositiveInt | None = Field(
        default=None, description="a child is replaced after a task that left it with more memory; null: not"
    )
    child_memory_limit_mb: PositiveInt | None = Field(
        default=None,
        description="most data memory (MiB) of each child; beyond it a task gets MemoryError; null: none. "
        "A child above four fifths of it is replaced after its task",
    )
    spare_children: Annotated[int, BeforeValidator(not_a_bool), Field(ge=0)] = Field(
        default=1, description="children kept ready, so that replacing one does not cost its start-up"
    )
    max_prefetch: Annotated[int, BeforeValidator(not_a_bool), Field(ge=0)] = Field(
        default=2_048, description="most activations waiting in the worker for a slot"
    )
    drain_grace_s: GraceSeconds | None = Field(
        default=None,
        description="how long running tasks may finish when stopping; default: their longest deadline",
    )
    exception_grace_s: GraceSeconds = Field(
        default=1.0,
        description="for a task at its deadline, or cancelled, to end by the exception raised in it; then "
        "its processes get SIGTERM. With terminate_grace_s below the brokers' processing_deadline_grace_s",
    )
    terminate_grace_s: GraceSeconds = Field(
        default=1.0, description="for its processes to end by SIGTERM; then they get SIGKILL"
    )

    @model_validator(mode="after")
    def _fits_its_protocol(self) -> PoolSection:
        if self.protocol == "pull" and self.namespaces and self.application is None:
            raise ValueError("with protocol pull, namespaces need application: brokers find nothing without")
        if self.protocol == "push" and len(set(self.brokers)) > 1:
            raise ValueError(
                f"with protocol push, brokers must be one, found {len(set(self.brokers))}: nothing "
                "says which of them pushed a task, and a result given to the wrong one is lost; "
                "run a pool for each"
            )
        if self.protocol == "push" and self.tls is not None and self.listen.tls is None:
            raise ValueError(
                "with protocol push and tls, listen.tls must be set too: tasks come that way; "
                "{certificate: FILE, key: FILE}"
            )
        return self


class WorkerConfig(Section):
    """Configuration of `taskd worker`."""

    pools: dict[str, PoolSection] = Field(default_factory=lambda: {"default": PoolSection()}, min_length=1)
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log line"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else json"
    )
