"""Limits of what is handed out: from the configuration, and on the metrics page and in the log."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from taskd.config.schema import LimitsSection
from taskd.config.selectors import namespace_of, rate_of, task_of
from taskd.inflight.limits import LimitKind, LimitRule, LimitState
from taskd.inflight.rates import Rate
from taskd.telemetry import metrics

FREE_FOR = 12  # looks at a limit that holds nothing back, until that is told again

log = structlog.get_logger("taskd.dispatch")


def limit_rules(limits: LimitsSection) -> tuple[LimitRule, ...]:
    """The limits in the store's terms."""
    rules = []
    for name, of_namespace in limits.namespaces.items():
        application, namespace = namespace_of(name)
        rules.append(
            LimitRule(LimitKind.NAMESPACE, name, application, namespace, concurrency=of_namespace.concurrency)
        )
    for name, of_task in limits.tasks.items():
        rate = None if of_task.rate is None else Rate(*rate_of(of_task.rate))
        rules.append(LimitRule(LimitKind.TASK, name, *task_of(name), of_task.concurrency, rate))
    for name, of_pool in limits.pools.items():
        rules.append(LimitRule(LimitKind.POOL, name, concurrency=of_pool.concurrency))
    return tuple(rules)


class LimitReport:
    """Tells of the limits on the metrics page, and in the log when one begins to hold back work."""

    def __init__(self) -> None:
        self._free: dict[tuple[LimitKind, str], int] = {}  # looks since it held anything back

    def tell(self, states: Sequence[LimitState]) -> None:
        metrics.limit_live.clear()  # what is not limited any more disappears
        metrics.limit_concurrency.clear()
        metrics.limit_rate_per_second.clear()
        metrics.limit_waiting.clear()
        for state in states:
            labels = (state.kind.value, state.name)
            metrics.limit_live.labels(*labels).set(state.live)
            if state.concurrency is not None:
                metrics.limit_concurrency.labels(*labels).set(state.concurrency)
            if state.rate is not None:
                metrics.limit_rate_per_second.labels(*labels).set(state.rate.count * 1000 / state.rate.per_ms)
            metrics.limit_waiting.labels(*labels).set(state.waiting)
            self._log(state)
        names = {(state.kind, state.name) for state in states}
        self._free = {key: looks for key, looks in self._free.items() if key in names}

    def _log(self, state: LimitState) -> None:
        key = (state.kind, state.name)
        if not state.waiting:
            if key in self._free:
                self._free[key] += 1
                if self._free[key] >= FREE_FOR:
                    del self._free[key]
            return
        if key not in self._free:
            log.info(
                "a limit holds back work: see dispatch.limits",
                limit=f"{state.kind.value} {state.name}",
                waiting=state.waiting,
                live=state.live,
            )
        self._free[key] = 0
