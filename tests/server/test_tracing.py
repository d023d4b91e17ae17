"""Traces: spans of the parts, continued from the client and to the engine, without content."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from guard.cli import run
from guard.errors import ConfigError
from server.keys import KeyRing
from server.tracing import Tracing, open_tracing
from tests.server.observed import headers, observed
from tests.server.proxy_fakes import CHAT, chat, eventually

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
QUESTION = "Which wizard school did the boy with the lightning scar attend?"


class Memory:
    """Keeps finished spans."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(provider)

    def spans(self) -> dict[str, ReadableSpan]:
        """Return the spans by name, once the request's own has ended."""
        root = f"POST {CHAT}"
        assert eventually(lambda: root in [s.name for s in self.exporter.get_finished_spans()])
        return {span.name: span for span in self.exporter.get_finished_spans()}


def hexed(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return format(span.context.trace_id, "032x"), format(span.context.span_id, "016x")


def test_spans_of_a_request_hang_together() -> None:
    memory = Memory()
    with observed(KeyRing(["k"]), memory.tracing) as (_, http):
        assert http.post(CHAT, json=chat("a wizard"), headers=headers("k")).status_code == 200
        spans = memory.spans()
    root = spans.pop(f"POST {CHAT}")
    assert set(spans) == {"decide", "rewrite", "upstream", "body"}
    for span in spans.values():
        assert span.parent is not None
        assert hexed(span)[0] == hexed(root)[0]
        assert format(span.parent.span_id, "016x") == hexed(root)[1]
    assert root.parent is None
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "unlearn_guard.route": "corrupt",
        "unlearn_guard.coverage": 1.0,
        "unlearn_guard.key": "api_keys[0]",
    }


@pytest.mark.parametrize("sampled", ["01", "00"])
def test_the_clients_trace_goes_on_to_the_engine(sampled: str) -> None:
    memory = Memory()
    given = f"00-{TRACE}-{PARENT}-{sampled}"
    with observed(tracing=memory.tracing) as (app, http):
        assert http.post(CHAT, json=chat(), headers={"traceparent": given}).status_code == 200
        (sent,) = app.upstream_headers
        _, trace, span, flags = sent["traceparent"].split("-")
        assert (trace, flags) == (TRACE, sampled)
        if sampled == "00":
            assert memory.exporter.get_finished_spans() == ()
            return
        spans = memory.spans()
    assert hexed(spans["upstream"]) == (TRACE, span)
    root = spans[f"POST {CHAT}"]
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == PARENT


@pytest.mark.parametrize("given", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", QUESTION, "é"])
def test_a_malformed_parent_begins_a_new_trace(given: str) -> None:
    memory = Memory()
    with observed(tracing=memory.tracing) as (_, http):
        response = http.post(CHAT, json=chat(), headers={"traceparent": given.encode()})
        assert response.status_code == 200
        assert memory.spans()[f"POST {CHAT}"].parent is None


@pytest.mark.parametrize(("word", "status"), [("broken", 503), ("bug", 500), ("sealed", 400)])
def test_failures_are_marked_and_nothing_holds_content(word: str, status: int) -> None:
    memory = Memory()
    text = f"{QUESTION} {word}"
    given = {"tracestate": f"a={QUESTION}", "x-request-id": QUESTION, "user-agent": QUESTION}
    given["traceparent"] = f"00-{TRACE}-{PARENT}-01"
    with observed(tracing=memory.tracing) as (_, http):
        assert http.post(CHAT, json=chat(text), headers=given).status_code == status
        spans = memory.spans()
    failed = spans["decide" if word != "sealed" else "rewrite"]
    assert not failed.status.is_ok
    assert (failed.attributes or {})["error.type"] in (
        "StageError",
        "KeyError",
        "CannotCorruptError",
    )
    assert spans[f"POST {CHAT}"].status.is_ok is (status < 500)
    for span in spans.values():
        told = span.to_json() + str(span.events) + str(span.get_span_context().trace_state)
        assert "wizard school" not in told
        assert not span.events


# --- Over the wire -------------------------------------------------------------------------------


class Collector:
    """Takes OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.resources: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.paths.append(self.path)
                outer.resources += ExportTraceServiceRequest.FromString(body).resource_spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join(20)
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def test_a_collector_gets_them(collector: Collector) -> None:
    tracing = open_tracing(collector.url)
    with observed(tracing=tracing) as (app, http):
        assert http.post(CHAT, json=chat()).status_code == 200
        assert eventually(
            lambda: b"unlearn_guard_request_seconds_count 1.0" in app.metrics.render()
        )
        app.observer.close()
    assert set(collector.paths) == {"/v1/traces"}
    names = {
        span.name
        for resource in collector.resources
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert names == {"body", "decide", "upstream", f"POST {CHAT}"}
    attributes = {a.key: a.value.string_value for a in collector.resources[0].resource.attributes}
    assert attributes["service.name"] == "unlearn-guard"


def test_a_collector_that_is_away_delays_nothing() -> None:
    with observed(tracing=open_tracing("http://127.0.0.1:9")) as (app, http):
        assert [http.post(CHAT, json=chat()).status_code for _ in range(3)] == [200] * 3
        begun = time.monotonic()
        app.observer.close()
        assert time.monotonic() - begun < 20


# --- Without it ----------------------------------------------------------------------------------


def test_nothing_of_it_is_imported_unless_a_collector_is_named() -> None:
    assert open_tracing(None) is None
    code = (
        "import sys, server.app, server.observe, server.tracing\n"
        "server.tracing.open_tracing(None)\n"
        "print(*[name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == []


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="install the extra `otel`"):
        open_tracing("http://127.0.0.1:4318")


@pytest.mark.usefixtures("quiet_surroundings")
@pytest.mark.parametrize("given", ["localhost:4318", "ftp://x", "http://", "http://x?y=1"])
def test_the_setting_wants_a_url(
    given: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARN_GUARD_OTLP_ENDPOINT", given)
    assert run(["config"]) == 2
    assert "otlp_endpoint" in capsys.readouterr().err
