"""Metrics of one request, from the socket on; every label is bounded."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from guard.types import Decision, TargetHit
from server.metrics import Metrics
from server.upstream_metrics import UpstreamFigures
from server.worker_metrics import WorkerMetrics
from tests.server.observed import ObservedApp, observed
from tests.server.proxy_fakes import CHAT, chat, eventually

PAUSE_S = 0.3
DOCS = Path(__file__).parents[2] / "docs"
SPELLED_OTHERWISE = {"access"}
"""What begins like a metric and is none: a logger."""


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Return a sample's value; 0 where there is none yet."""
    found = metrics.registry.get_sample_value(f"unlearn_guard_{name}", labels)
    return 0.0 if found is None else found


def hit(name: str, *, enforced: bool = True) -> TargetHit:
    return TargetHit(name, 9.0, 0.0, 1.0, (), enforced)


# --- Waiting -------------------------------------------------------------------------------------


def exchange(sock: socket.socket, pause_s: float) -> None:
    """Send a request whose headers stop for a while, and read the answer."""
    body = json.dumps(chat()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    sock.sendall(head.encode())
    time.sleep(pause_s)
    sock.sendall(f"content-length: {len(body)}\r\n\r\n".encode() + body)
    assert sock.recv(65_536).startswith(b"HTTP/1.1 200")


def test_waiting_is_measured_from_the_socket_on() -> None:
    with observed() as (app, http):
        address = urlsplit(str(http.base_url))
        with socket.create_connection((address.hostname, address.port), timeout=20) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            time.sleep(PAUSE_S)
            exchange(sock, 0.0)
            assert value(app.metrics, "connection_wait_seconds_sum") >= PAUSE_S * 0.9
            assert value(app.metrics, "queue_wait_seconds_sum") < PAUSE_S * 0.9
            time.sleep(PAUSE_S)  # a client's own pause between requests is nobody's waiting
            exchange(sock, PAUSE_S)
            assert value(app.metrics, "queue_wait_seconds_sum") >= PAUSE_S * 0.9
            assert value(app.metrics, "queue_wait_seconds_sum") < PAUSE_S * 1.9
        assert value(app.metrics, "queue_wait_seconds_count") == 2
        assert value(app.metrics, "connection_wait_seconds_count") == 1


def test_waiting_for_a_worker_and_its_work_are_told_apart() -> None:
    with observed() as (app, http):
        slow = threading.Thread(target=lambda: http.post(CHAT, json=chat("slow")))
        slow.start()
        assert eventually(lambda: value(app.metrics, "worker_wait_seconds_count") == 1)
        second = threading.Thread(target=lambda: http.post(CHAT, json=chat()))
        second.start()
        time.sleep(PAUSE_S)
        app.guard.release.set()
        slow.join(20)
        second.join(20)
        assert value(app.metrics, "worker_wait_seconds_sum") >= PAUSE_S * 0.5
        assert value(app.metrics, "detect_seconds_count") == 2
        assert value(app.metrics, "decide_seconds_sum") >= value(app.metrics, "detect_seconds_sum")


def answered(app: ObservedApp, count: int) -> bool:
    return eventually(lambda: value(app.metrics, "request_seconds_count") == count)


def test_each_part_is_counted_once_and_a_failed_one_is_not() -> None:
    with observed() as (app, http):
        for text in ("hello", "a wizard", "broken"):
            http.post(CHAT, json=chat(text))
        assert answered(app, 3)
        counts = {
            "body_seconds": 3,
            "decide_seconds": 2,
            "rewrite_seconds": 1,
            "engine_first_byte_seconds": 2,
            "coverage": 2,
        }
        for name, count in counts.items():
            assert value(app.metrics, f"{name}_count") == count, name
        labels = {"endpoint": CHAT, "status": "200"}
        assert value(app.metrics, "requests_total", route="corrupt", **labels) == 1
        assert value(app.metrics, "requests_total", route="pass", **labels) == 1


def test_a_client_that_left_is_counted_as_such() -> None:
    with observed() as (app, http):
        app.gate.clear()
        address = urlsplit(str(http.base_url))
        body = json.dumps(chat()).encode()
        with socket.create_connection((address.hostname, address.port), timeout=20) as sock:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            assert eventually(lambda: app.waiting == 1)
        assert answered(app, 1)
        labels = {"endpoint": CHAT, "route": "pass", "status": "499"}
        assert value(app.metrics, "requests_total", **labels) == 1


# --- Decisions -----------------------------------------------------------------------------------


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(lambda: 3)


def test_decisions_are_counted_by_route_and_by_target(metrics: Metrics) -> None:
    both = (hit("a"), hit("b", enforced=False))
    metrics.decided(Decision(True, "corrupt", 1.0, both), "corrupt")
    metrics.decided(Decision(True, "refuse", 1.0, (hit("a"),)), "refuse")
    metrics.decided(Decision(False, "pass", 0.5, ()), "block")
    found = {
        (sample.labels["target"], sample.labels["route"]): sample.value
        for family in metrics.target_decisions.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    assert found == {("a", "corrupt"): 1, ("b", "detecting"): 1, ("a", "refuse"): 1}
    for route in ("corrupt", "refuse", "block"):
        assert value(metrics, "decisions_total", route=route) == 1
    assert value(metrics, "coverage_bucket", le="0.5") == 1
    assert value(metrics, "coverage_bucket", le="0.9999") == 1
    assert value(metrics, "coverage_bucket", le="1.0") == 3


def test_the_series_of_a_removed_target_go(metrics: Metrics) -> None:
    names = {"harry-potter", "other"}
    metrics.follow_targets(lambda: names)
    gone = Decision(True, "corrupt", 1.0, (hit("harry-potter"), hit("other")))
    metrics.decided(gone, "corrupt")
    assert b"harry-potter" in metrics.render()
    names.remove("harry-potter")
    text = metrics.render()
    assert b"harry-potter" not in text
    assert b'target="other"' in text
    metrics.decided(gone, "corrupt")  # a request that the old version was at work on
    assert b"harry-potter" not in metrics.render()
    names.add("harry-potter")
    metrics.decided(gone, "corrupt")
    assert value(metrics, "target_decisions_total", target="harry-potter", route="corrupt") == 1


def test_all_of_it_is_prometheus_text(metrics: Metrics) -> None:
    metrics.decided(Decision(True, "corrupt", 1.0, (hit('a"b\n'),)), "corrupt")
    metrics.answer_checks.labels("hit").inc()
    metrics.remakes.labels("again").inc()
    metrics.hold_back_seconds.observe(0.01)
    metrics.follow_adapters(lambda: {"loaded": 1})
    metrics.registry.register(UpstreamFigures(lambda: {"0": {"healthy": 1, "failures": 2}}))
    families = {
        family.name: family for family in text_string_to_metric_families(metrics.render().decode())
    }
    for name, number in (("healthy", 1.0), ("failures", 2.0)):
        (sample,) = families[f"unlearn_guard_upstream_{name}"].samples
        assert (sample.labels, sample.value) == ({"upstream": "0"}, number)


# --- What the docs say ---------------------------------------------------------------------------

_ROW = re.compile(r"^\| ((?:`[a-z_]+`(?:, )?)+) \|([^|]*)\|([^|]*)\|$", re.M)
_NAME = re.compile(r"`([a-z_]+)`")


def documented() -> dict[str, set[str]]:
    """Labels by metric, of the table in the docs."""
    text = (DOCS / "operations.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = _ROW.findall(text)
    return {
        name: set(_NAME.findall(labels))
        for names, labels, _ in rows
        for name in _NAME.findall(names)
    }


def registered() -> dict[str, set[str]]:
    """Labels by metric, of everything that one of several processes can show."""
    metrics = Metrics(lambda: 0)
    metrics.follow_adapters(lambda: {"loaded": 1})
    figures = dict.fromkeys(("healthy", "outstanding", "failures", "ejections", "retried"), 1)
    metrics.registry.register(UpstreamFigures(lambda: {"0": figures}))
    WorkerMetrics(Path(), 0, 2).count_starts(metrics.registry, 1)
    metrics.decided(Decision(True, "corrupt", 1.0, (hit("a"),)), "corrupt")
    metrics.requests.labels("e", "r", "200").inc()
    for counter in (metrics.failures, metrics.answer_checks, metrics.remakes):
        counter.labels("x").inc()
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            name = re.sub(r"_(bucket|count|sum)$", "", sample.name)
            if not name.endswith("_created"):
                found.setdefault(name.removeprefix("unlearn_guard_"), set()).update(sample.labels)
    return {name: labels - {"le"} for name, labels in found.items()}


def test_the_docs_list_every_metric_with_its_labels() -> None:
    assert documented() == registered()


def test_other_pages_name_no_metric_that_there_is_not() -> None:
    known = registered()
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"unlearn_guard_([a-z_]+)", page.read_text()):
            short = re.sub(r"_(bucket|count|sum)$", "", name.rstrip("_"))
            # `unlearn_guard_upstream_healthy`, `_failures` and so on are a beginning and the rest.
            assert short in known or name in SPELLED_OTHERWISE, f"{page.name}: {name}"
