"""How work is handed out, to whom, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from taskd.config.schema.base import GraceSeconds, PositiveInt, PositiveSeconds, Section, WorkerUrl
from taskd.config.selectors import namespace_of, rate_of, task_of


def _rate(value: str) -> str:
    rate_of(value)
    return value


class ConcurrencySection(Section):
    """A limit of what is handed out at once."""

    concurrency: PositiveInt = Field(description="most activations that workers hold at once")


class TaskLimitSection(Section):
    """Limits of one task."""

    concurrency: PositiveInt | None = Field(
        default=None, description="most activations that workers hold at once; null: any number"
    )
    rate: Annotated[str, AfterValidator(_rate)] | None = Field(
        default=None, description="most activations handed out in a time, 100/s, 30/m or 5/h; null: any"
    )


class LimitsSection(Section):
    """Limits of what is handed out, over all workers of this broker."""

    namespaces: dict[str, ConcurrencySection] = Field(
        default_factory=dict, description="by namespace, or application:namespace"
    )
    tasks: dict[str, TaskLimitSection] = Field(
        default_factory=dict, description="by namespace:task, or application:namespace:task"
    )
    pools: dict[str, ConcurrencySection] = Field(
        default_factory=dict, description="by name of the pool that workers on the stream belong to"
    )

    @model_validator(mode="after")
    def _can_be_read(self) -> LimitsSection:
        if problems := [*self._of(self.namespaces, namespace_of), *self._of(self.tasks, task_of)]:
            raise ValueError("; ".join(problems))
        empty = [name for name, limit in self.tasks.items() if limit == TaskLimitSection()]
        if empty:
            raise ValueError(f"task {empty[0]!r} needs concurrency or rate, found neither")
        return self

    def _of(self, keys: Iterable[str], read: Callable[[str], object]) -> Iterator[str]:
        for key in keys:
            try:
                read(key)
            except ValueError as error:
                yield str(error)


class DispatchSection(Section):
    """How work is handed out."""

    mode: Literal["pull", "push"] = Field(
        default="pull", description="pull: workers fetch; push: to the workers of push.worker_map"
    )
    processing_deadline_grace_s: GraceSeconds = Field(
        default=3, description="added to every deadline before the broker acts"
    )
    lease_s: PositiveSeconds = Field(
        default=30, description="a stream lease ends this long after its worker's last frame"
    )
    max_assignments_per_frame: PositiveInt = Field(
        default=1_024, description="activations in one frame to a worker"
    )
    unknown_tasks: Literal["park", "fail"] = Field(
        default="park", description="what no connected worker knows; park: waits for one; fail: is handed out"
    )
    strict_order_namespaces: tuple[str, ...] = Field(
        default=(), description="namespaces that run one activation at a time, in order"
    )
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _limits_fit_strict_order(self) -> DispatchSection:
        for name, limit in self.limits.tasks.items():
            _, namespace, _ = task_of(name)
            if namespace in self.strict_order_namespaces and limit.concurrency is not None:
                raise ValueError(
                    f"limits.tasks {name!r} must not have a concurrency: {namespace!r} is one of "
                    "strict_order_namespaces, which run one activation at a time; a rate is possible"
                )
        return self


class PushTlsSection(Section):
    """TLS of the way to workers whose URL begins with https. Files are PEM."""

    ca: Path | None = Field(
        default=None, description="who signs the workers' certificates; null: whom the machine trusts"
    )
    certificate: Path | None = Field(
        default=None, description="our certificate, for workers that ask for one"
    )
    key: Path | None = Field(default=None, description="its private key, without a passphrase")


class PushSection(Section):
    """Delivery to workers that wait to be called, when `dispatch.mode` is push; `rpc.secrets` sign."""

    worker_map: dict[str, WorkerUrl] = Field(
        default_factory=dict, description="URL of the workers of each application, http://HOST:PORT"
    )
    timeout_s: PositiveSeconds = Field(default=30, description="longest wait for a worker to take one")
    claim_margin_s: PositiveSeconds = Field(
        default=10, description="added to timeout_s: then a claim is over and the activation waits again"
    )
    max_in_flight_per_worker: PositiveInt = Field(
        default=16, le=100, description="calls under way to one URL; HTTP/2 workers take 100 at most"
    )
    tls: PushTlsSection = PushTlsSection()
