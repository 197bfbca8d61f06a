"""What is in flight: how much, for how long, and how it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from taskd.config.schema.base import GraceSeconds, PositiveInt, PositiveSeconds, Section, not_a_bool


class StoreSection(Section):
    """The file of what is in flight, and its limits."""

    path: Path | None = Field(default=None, description="the file; null: inflight.sqlite in data_dir")
    integrity_check: Literal["quick", "full", "off"] = Field(
        default="quick", description="look for damage at the start; a damaged file is set aside"
    )
    integrity_check_within_s: GraceSeconds = Field(
        default=1.0, description="longest that this holds up the start; then it goes on beside the work"
    )
    vacuum_interval_s: PositiveSeconds = Field(
        default=10, description="time between two looks for free room to give back to the disk"
    )
    max_pending_count: PositiveInt = Field(
        default=2_048, description="most rows waiting; reading pauses above it"
    )
    max_delay_count: PositiveInt = Field(default=8_192, description="most rows delayed")
    max_processing_count: PositiveInt = Field(default=2_048, description="most rows handed out")
    max_size_bytes: PositiveInt = Field(
        default=3_000_000_000, description="largest database; reading pauses above it"
    )
    max_processing_attempts: PositiveInt = Field(default=5, description="most times one row may start")
    max_crashes: PositiveInt = Field(
        default=3, description="most processes one row may crash: then it fails, with the reason poison"
    )
    enforce_max_attempts: bool = Field(
        default=False, description="dead-letter what is retried more than 3 times beyond its max_attempts"
    )
    max_processing_deadline_s: PositiveSeconds | None = Field(
        default=None, description="no run is longer than this, however many heartbeats its task gives"
    )
    max_delay_s: PositiveSeconds | None = Field(
        default=None, description="longer delays are shortened to this"
    )
    tombstone_ttl_s: PositiveSeconds = Field(default=600, description="finished ids are remembered this long")
    tombstone_max_count: PositiveInt = Field(default=2_000_000, description="finished ids remembered at most")


class IngestSection(Section):
    """How batches are read."""

    batch_max_records: PositiveInt = Field(
        default=1_024, description="records in one transaction at most (16 MB end a batch too)"
    )
    max_application_share: Annotated[float, BeforeValidator(not_a_bool), Field(gt=0, le=1)] = Field(
        default=1, description="largest part of max_pending_count that one application may fill; 1: no share"
    )
    overflow_topic: str | None = Field(
        default=None, description="takes what is beyond a share; null: reading waits instead"
    )


class UpkeepSection(Section):
    """The small duties."""

    interval_s: PositiveSeconds = Field(default=1.0, description="time between two rounds")
    startup_quiet_s: GraceSeconds = Field(
        default=60, description="no lease is judged so soon after a start: workers may still report"
    )
    max_rows_per_round: PositiveInt = Field(default=2_000, description="rows one duty handles in one go")
