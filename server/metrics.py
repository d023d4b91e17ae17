"""Prometheus metrics. No label comes from a client: endpoints, routes and statuses are bounded.

Targets are labels too, bounded by the bundle: the series of one that was removed go with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from guard.types import Decision
from server.histograms import Histogram

_PREFIX = "unlearn_guard"
_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 300),
)
_TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
_SHARES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)


class Metrics:
    """The metrics of one application, in a registry of its own.

    Args:
        waiting: Returns how many requests wait for a worker.
        in_flight: Returns how many requests are in work.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(
        self, waiting: Callable[[], int], in_flight: Callable[[], int] = lambda: 0
    ) -> None:
        self.registry = CollectorRegistry()
        self._make_counters()
        self._make_histograms()
        self._gauge("in_flight", "Requests in work.", in_flight)
        self._gauge("waiting", "Requests that wait for a worker.", waiting)
        # Looking a series up by its labels takes longer than counting.
        self._answered: dict[tuple[str, str, int], Counter] = {}
        self._decided: dict[str, Counter] = {}
        self._target_names: Callable[[], Collection[str]] | None = None
        self._target_series: set[tuple[str, str]] = set()

    def _make_counters(self) -> None:
        self.requests = self._counter(
            "requests",
            "Requests answered, by endpoint, route taken and status (499: the client left).",
            "endpoint",
            "route",
            "status",
        )
        self.decisions = self._counter("decisions", "Decisions, by route.", "route")
        self.target_decisions = self._counter(
            "target_decisions",
            "Decisions that touch a target, by route ('detecting': recorded and not enforced).",
            "target",
            "route",
        )
        self.failures = self._counter("failures", "Failures of a part.", "part")
        self.answer_checks = self._counter(
            "answer_checks", "Checks of answers before they leave, by outcome.", "outcome"
        )
        self.remakes = self._counter(
            "remakes",
            "Answers that touched a target: made 'again' from there on, or 'ended' there.",
            "outcome",
        )

    def _make_histograms(self) -> None:
        self.connection_wait_seconds = self._histogram(
            "connection_wait_seconds",
            "From accepting a connection to the first byte of its first request.",
        )
        self.queue_wait_seconds = self._histogram(
            "queue_wait_seconds", "From a request's first byte to its handling."
        )
        self.body_seconds = self._histogram("body_seconds", "Time to read a body.")
        self.worker_wait_seconds = self._histogram(
            "worker_wait_seconds", "Time a decision waited for a worker."
        )
        self.detect_seconds = self._histogram("detect_seconds", "Time a worker took to decide.")
        self.decide_seconds = self._histogram("decide_seconds", "Time to decide, queue included.")
        self.rewrite_seconds = self._histogram("rewrite_seconds", "Time to rewrite a request.")
        self.first_byte_seconds = self._histogram(
            "engine_first_byte_seconds", "Time until the engine's answer began."
        )
        self.hold_back_seconds = self._histogram(
            "hold_back_seconds", "Time a piece of an answer was held back to be checked."
        )
        self.hold_back_tokens = Histogram(
            f"{_PREFIX}_hold_back_tokens",
            "Events of a stream that were held back when some of them left.",
            buckets=_TOKENS,
            registry=self.registry,
        )
        self.request_seconds = self._histogram("request_seconds", "Time of a whole request.")
        self.coverage = Histogram(
            f"{_PREFIX}_coverage",
            "Share of a request's characters that the detectors read.",
            buckets=_SHARES,
            registry=self.registry,
        )

    def decided(self, decision: Decision, route: str) -> None:
        """Count a decision.

        Args:
            decision: What the guard said.
            route: What is done; another than the guard's where not everything was read.
        """
        known = self._decided.get(route)
        if known is None:
            known = self._decided[route] = self.decisions.labels(route)
        known.inc()
        self.coverage.observe(decision.coverage)
        for hit in decision.targets:
            series = (hit.name, route if hit.enforced else "detecting")
            self._target_series.add(series)
            self.target_decisions.labels(*series).inc()

    def follow_targets(self, names: Callable[[], Collection[str]]) -> None:
        """Drop what was counted for targets that the bundle no longer holds.

        Args:
            names: Returns the bundle's targets; asked whenever metrics are read.
        """
        self._target_names = names

    def follow_adapters(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Report what an engine says of its adapters, read whenever metrics are.

        Args:
            counts: Returns numbers by what they count: loads, evictions, …
        """
        self.registry.register(_AdapterCounts(counts))

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self._forget_removed()
        return generate_latest(self.registry)

    def _forget_removed(self) -> None:
        """A target's name is what someone asked to be forgotten: it doesn't outlive the target."""
        if self._target_names is None:
            return
        known = frozenset(self._target_names())
        for series in [series for series in self._target_series if series[0] not in known]:
            self.target_decisions.remove(*series)
            self._target_series.discard(series)

    def answered(self, endpoint: str, route: str, status: int) -> None:
        """Count a request by what became of it."""
        series = (endpoint, route, status)
        known = self._answered.get(series)
        if known is None:
            known = self.requests.labels(endpoint, route, str(status))
            self._answered[series] = known
        known.inc()

    def _gauge(self, name: str, text: str, value: Callable[[], int]) -> None:
        gauge = Gauge(f"{_PREFIX}_{name}", text, registry=self.registry)
        gauge.set_function(lambda: float(value()))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, buckets=_SECONDS, registry=self.registry)


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
