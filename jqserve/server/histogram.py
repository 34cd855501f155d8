"""A histogram that takes an observation of several equal values at once, for less than a microsecond."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """`bounds` ascending; what is above the last falls into +Inf."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self.name, self.help_text = name, help_text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, labels: Sequence[str], values: Sequence[str]) -> HistogramMetricFamily:
        """For the scrape: cumulative, as Prometheus wants it."""
        family = HistogramMetricFamily(self.name, self.help_text, labels=labels)
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        family.add_metric(values, buckets=buckets, sum_value=self._sum)
        return family
