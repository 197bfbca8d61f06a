"""The configuration of `taskd broker`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from taskd.config.schema.base import GraceSeconds, PositiveInt, PositiveSeconds, Secret, Section
from taskd.config.schema.dispatch import DispatchSection, PushSection
from taskd.config.schema.listen import HttpSection, RpcSection
from taskd.config.schema.log import LogSection
from taskd.config.schema.store import IngestSection, StoreSection, UpkeepSection


class SwitchesSection(Section):
    """The file of switches: tasks that are killed, namespaces that are sent elsewhere."""

    file: Path | None = Field(default=None, description="YAML file of switches; null: there is none")
    poll_s: PositiveSeconds = Field(
        default=0.5, description="how often it is looked at; a change holds within twice that at most"
    )


class AdminSection(Section):
    """Where operators' orders are taken, such as `taskd pause`."""

    socket: Path | None = Field(
        default=None, description="Unix socket, for the broker's user only; null: admin.sock in data_dir"
    )
    secrets: tuple[Secret, ...] = Field(
        default=(), description="orders signed with one of these are taken at `rpc` too; empty: none are"
    )


class BrokerConfig(Section):
    """Configuration of `taskd broker`."""

    data_dir: Path = Field(
        default=Path("taskd-data"), description="folder of the store and the embedded log; one broker each"
    )
    rpc: RpcSection = RpcSection()
    http: HttpSection = HttpSection()
    log: LogSection = LogSection()
    store: StoreSection = StoreSection()
    ingest: IngestSection = IngestSection()
    dispatch: DispatchSection = DispatchSection()
    push: PushSection = PushSection()
    upkeep: UpkeepSection = UpkeepSection()
    switches: SwitchesSection = SwitchesSection()
    admin: AdminSection = AdminSection()
    drain_grace_s: GraceSeconds = Field(
        default=8, description="how long to wait for running work when stopping; closing takes a second more"
    )
    max_request_bytes: PositiveInt = Field(default=10 * 1024 * 1024, description="largest RPC request")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log line"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else json"
    )

    @field_validator("admin")
    @classmethod
    def _orders_have_secrets_of_their_own(cls, admin: AdminSection, info: ValidationInfo) -> AdminSection:
        rpc = info.data.get("rpc")  # None: it is wrong itself
        if rpc is not None and set(admin.secrets) & set(rpc.secrets):
            raise ValueError(
                "secrets must have none of rpc.secrets: whoever may work or produce could also give orders"
            )
        return admin
