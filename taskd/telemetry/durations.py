"""A histogram that takes many durations at once: those of one transaction, at a tenth of the cost each."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString


class Durations:
    """A collector of whole numbers of which a second has `per_s`, by default milliseconds.

    They are rendered in seconds; `buckets`: their upper ends in seconds.
    """

    def __init__(self, name: str, about: str, buckets: Iterable[float], per_s: int = 1_000) -> None:
        self.name, self._about, self._per_s = name, about, per_s
        self._ends_s = (*buckets, float("inf"))
        self._ends = [round(end_s * per_s) for end_s in self._ends_s[:-1]]
        self._counts = [0] * len(self._ends_s)
        self._sum = 0

    def observe_all(self, values: Sequence[int]) -> None:
        for value, times in Counter(values).items():  # those of one transaction are much alike
            self._counts[bisect_left(self._ends, value)] += times
        self._sum += sum(values)

    def describe(self) -> Iterator[Metric]:
        """Its names, without a look at the values: what a registry checks."""
        yield HistogramMetricFamily(self.name, self._about)

    def collect(self) -> Iterator[Metric]:
        ends = map(floatToGoString, self._ends_s)
        buckets = list(zip(ends, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(
            self.name, self._about, buckets=buckets, sum_value=self._sum / self._per_s
        )
