"""Prometheus metrics. No label comes from a client: endpoints, routes and statuses are bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one application, in a registry of its own.

    Args:
        waiting: Returns how many requests wait for a worker.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        prefix = "unlearn_guard"
        self.requests = Counter(
            f"{prefix}_requests",
            "Requests answered, by endpoint, route taken and status (499: the client left).",
            ["endpoint", "route", "status"],
            registry=self.registry,
        )
        self.decisions = Counter(
            f"{prefix}_decisions", "Decisions, by route.", ["route"], registry=self.registry
        )
        self.failures = Counter(
            f"{prefix}_failures", "Failures of a part.", ["part"], registry=self.registry
        )
        self.decide_seconds = self._histogram("decide_seconds", "Time to decide, queue included.")
        self.first_byte_seconds = self._histogram(
            "engine_first_byte_seconds", "Time until the engine's answer began."
        )
        self.request_seconds = self._histogram("request_seconds", "Time of a whole request.")
        self.in_flight = Gauge(f"{prefix}_in_flight", "Requests in work.", registry=self.registry)
        Gauge(
            f"{prefix}_waiting", "Requests that wait for a worker.", registry=self.registry
        ).set_function(lambda: float(waiting()))

    def follow_adapters(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Report what an engine says of its adapters, read whenever metrics are.

        Args:
            counts: Returns numbers by what they count: loads, evictions, …
        """
        self.registry.register(_AdapterCounts(counts))

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"unlearn_guard_{name}", text, buckets=_SECONDS, registry=self.registry)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _AdapterCounts(Collector):
    """An engine's own counters, as Prometheus takes them."""

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield one metric, labelled by what was counted."""
        metric = GaugeMetricFamily(
            "unlearn_guard_adapters",
            "Adapters in the engine: loaded now; since the start hits, loads, lost, evictions, and "
            "requests answered with fewer than were asked for.",
            labels=["what"],
        )
        for name, value in self._counts().items():
            metric.add_metric([name], float(value))
        yield metric
