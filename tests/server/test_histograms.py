"""Our histogram tells what `prometheus_client`'s tells."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from server.histograms import Histogram

BOUNDS = (0.001, 0.5, 1, 2.5, 300)


def told(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def many(histogram: Histogram) -> None:
    for _ in range(500):
        histogram.observe(1.0)


@given(st.lists(st.sampled_from([0.0, 0.0005, 0.001, 0.25, 0.5, 1.0, 1.5, 2.5, 299.0, 301.0])))
def test_it_reads_as_the_library_s(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    one = Histogram("a_seconds", "Some time.", BOUNDS, ours)
    other = prometheus_client.Histogram("a_seconds", "Some time.", buckets=BOUNDS, registry=theirs)
    for value in values:
        one.observe(value)
        other.observe(value)
    assert told(ours) == told(theirs)


def test_no_observation_of_any_thread_is_lost() -> None:
    registry = CollectorRegistry()
    found = Histogram("b", "b", BOUNDS, registry)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: many(found), range(8)))
    assert registry.get_sample_value("b_count") == 4000
    assert registry.get_sample_value("b_bucket", {"le": "1.0"}) == 4000
    assert registry.get_sample_value("b_bucket", {"le": "0.5"}) == 0
