"""A Prometheus histogram that costs little to observe.

`prometheus_client`'s own looks at every bucket and takes a lock for each number that it changes;
with seven of them a request, that is a tenth of what the proxy takes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from threading import Lock

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Histogram(Collector):
    """Counts observations by size; safe to share between threads.

    Args:
        name: Of the metric.
        text: Its description.
        buckets: Upper bounds, ascending; one for all that is larger is added.
        registry: Where it is registered.
    """

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._text = name, text
        self._bounds = [float(bound) for bound in buckets]
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._lock = Lock()
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count a value."""
        place = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[place] += 1
            self._sum += value

    def describe(self) -> list[Metric]:
        """Name the metric without reading it."""
        return [HistogramMetricFamily(self._name, self._text)]

    def collect(self) -> Iterator[Metric]:
        """Yield the metric: of each bucket, how many were at most as large as its bound."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        rows, count = [], 0
        for bound, found in zip([*self._bounds, float("inf")], counts, strict=True):
            count += found
            rows.append((str(floatToGoString(bound)), float(count)))  # type: ignore[no-untyped-call]
        yield HistogramMetricFamily(self._name, self._text, buckets=rows, sum_value=total)
