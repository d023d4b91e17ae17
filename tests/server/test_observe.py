"""Metrics of one request, from the socket on; every label is bounded."""

from __future__ import annotations

import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from guard.types import Decision, TargetHit
from server.metrics import Metrics
from tests.server.observed import ObservedApp, observed
from tests.server.proxy_fakes import CHAT, chat, eventually

PAUSE_S = 0.3


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
    metrics.follow_upstreams(lambda: {"0": {"healthy": 1, "failures": 2}})
    families = {
        family.name: family for family in text_string_to_metric_families(metrics.render().decode())
    }
    wanted = {
        *("queue_wait_seconds", "connection_wait_seconds", "body_seconds", "worker_wait_seconds"),
        *("detect_seconds", "decide_seconds", "rewrite_seconds", "engine_first_byte_seconds"),
        *("hold_back_seconds", "request_seconds", "coverage", "requests", "decisions"),
        *("target_decisions", "failures", "answer_checks", "remakes", "in_flight", "waiting"),
        *("adapters", "upstreams"),
    }
    assert wanted <= {name.removeprefix("unlearn_guard_") for name in families}
    upstreams = families["unlearn_guard_upstreams"].samples
    assert {(s.labels["upstream"], s.labels["what"], s.value) for s in upstreams} == {
        ("0", "healthy", 1.0),
        ("0", "failures", 2.0),
    }
