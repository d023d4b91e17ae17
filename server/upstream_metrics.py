"""What an engine that is several says of each, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_MEANINGS: Final = {
    "healthy": "Whether an upstream is given requests: 1 or 0.",
    "outstanding": "Requests that an upstream is answering.",
    "failures": "Failures of an upstream since the start, of checks and of requests.",
    "ejections": "How often an upstream was taken out since the start.",
    "retried": "Requests that went on from an upstream to another since the start.",
}


class UpstreamFigures(Collector):
    """An engine's own numbers of its replicas, as Prometheus takes them.

    Args:
        figures: Returns numbers by name, by replica; asked whenever metrics are read.
    """

    def __init__(self, figures: Callable[[], Mapping[str, Mapping[str, int]]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Yield one metric for each kind of number, labelled by replica."""
        metrics = {
            name: GaugeMetricFamily(f"unlearn_guard_upstream_{name}", meaning, labels=["upstream"])
            for name, meaning in _MEANINGS.items()
        }
        for replica, figures in self._figures().items():
            for name, value in figures.items():
                metrics[name].add_metric([replica], float(value))
        yield from metrics.values()
