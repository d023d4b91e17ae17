"""Keys, metrics, logs and traces on the real proxy."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.access_log import ACCESS, start_logging
from server.app import create_app
from server.keys import hash_key
from server.observe import Observer
from server.tracing import Tracing
from server.types import ServerOptions
from tests.server.proxy_fakes import (
    CHAT,
    TEXT,
    Live,
    ScriptedEngine,
    WordGuard,
    chat,
    error_of,
    eventually,
    live,
    running,
)

QUESTION = "Which wizard school did the boy with the lightning scar attend in Scotland?"
SECRET = "a secret of the guard"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """All logging as JSON, into memory; afterwards it is as it was."""
    root, access = logging.getLogger(), logging.getLogger(ACCESS)
    levels, handlers = (root.level, access.level), list(root.handlers)
    found = io.StringIO()
    start_logging("debug", "json", found)
    yield found
    root.setLevel(levels[0])
    access.setLevel(levels[1])
    root.handlers[:] = handlers


def requests(stream: io.StringIO) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in found if line["logger"] == ACCESS]


def keys_file(folder: Path, **limits: int) -> Path:
    file = folder / "keys.yaml"
    file.write_text(json.dumps([{"name": "alice", "sha256": hash_key(SECRET), **limits}]))
    return file


def ask(app: Live, text: str = "hello", key: str | None = SECRET, **more: str) -> httpx.Response:
    given = {name.replace("_", "-"): told for name, told in more.items()}
    if key is not None:
        given["authorization"] = f"Bearer {key}"
    return app.http.post(CHAT, json=chat(text), headers=given)


# --- Keys ----------------------------------------------------------------------------------------


def test_keys_of_a_file_guard_every_route(tmp_path: Path) -> None:
    options = ServerOptions(api_keys_file=keys_file(tmp_path, requests_per_minute=2))
    with live(options) as app:
        for path in (CHAT, TEXT):
            assert app.http.post(path, json=chat()).status_code == 401
        assert app.http.get("/v1/models").status_code == 401
        known = {"authorization": f"Bearer {SECRET}"}
        assert [app.http.get("/v1/models", headers=known).status_code for _ in range(5)] == [
            200
        ] * 5
        assert [ask(app).status_code for _ in range(3)] == [200, 200, 429]
        assert len(app.engine.posts) == 2
        response = ask(app)
        assert error_of(response)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "30"


def test_flagged_or_not_a_request_counts_the_same(tmp_path: Path) -> None:
    for text in ("hello", "a wizard", "forbidden", "broken"):
        options = ServerOptions(api_keys_file=keys_file(tmp_path, requests_per_minute=2))
        with live(options) as app:
            found = [ask(app, text).status_code for _ in range(4)]
        assert [status == 429 for status in found] == [False, False, True, True], text


def test_the_body_limit_of_a_key_is_the_lesser_one(tmp_path: Path) -> None:
    file = keys_file(tmp_path, max_body_bytes=3_000)
    for limit, length, status in ((9_000, 5_000, 413), (9_000, 2_000, 200), (1_500, 2_000, 413)):
        with live(ServerOptions(api_keys_file=file, max_body_bytes=limit)) as app:
            assert ask(app, "a" * length).status_code == status


# --- Logs ----------------------------------------------------------------------------------------


def test_one_line_per_request_whatever_became_of_it(stream: io.StringIO, tmp_path: Path) -> None:
    with live(ServerOptions(api_keys_file=keys_file(tmp_path))) as app:
        cases = [
            ("hello", 200, "pass"),
            ("a wizard", 200, "corrupt"),
            ("forbidden", 400, "refuse"),
            ("garbled", 400, "block"),
            ("unread", 400, "block"),
            ("broken", 503, "none"),
            ("bug", 500, "none"),
        ]
        for count, (text, status, _) in enumerate(cases, 1):
            assert ask(app, text).status_code == status
            assert eventually(lambda count=count: len(requests(stream)) == count)
        assert ask(app, key=None).status_code == 401
        assert eventually(lambda: len(requests(stream)) == len(cases) + 1)
    for line, (_, status, route) in zip(requests(stream), cases, strict=False):
        assert (line["status"], line["route"], line["key"]) == (status, route, "alice")
    first = requests(stream)[0]
    assert first["bytes_in"] == len(json.dumps(chat(), separators=(",", ":")))
    assert first["bytes_out"] > 0
    assert first["total_ms"] >= first["decide_ms"]


def test_other_routes_have_a_line_too(stream: io.StringIO) -> None:
    with live() as app:
        for path in ("/health", "/v1/models", f"/v1/{QUESTION}"):
            app.http.get(path)
        assert eventually(lambda: len(requests(stream)) == 3)
    found = {(line["endpoint"], line["status"]) for line in requests(stream)}
    assert found == {("/health", 200), ("/v1/models", 200), ("other", 404)}
    assert_no_content(stream.getvalue())


def test_a_stream_says_when_its_first_byte_left(stream: io.StringIO) -> None:
    with live() as app:
        assert app.ask("hello", stream=True).status_code == 200
        assert eventually(lambda: len(requests(stream)) == 1)
    (line,) = requests(stream)
    assert line["upstream_ms"] <= line["first_byte_ms"] <= line["total_ms"]


def everywhere(app: Live, suffix: str) -> list[int]:
    """Ask in every place of a request; return the statuses."""
    text = f"{QUESTION} {suffix}"
    names = ("x-request-id", "user-agent", "tracestate", "traceparent", "cookie", "authorization")
    given = dict.fromkeys(names, QUESTION)
    bodies: list[Any] = [
        chat(text),
        chat(text, stream=True),
        chat(text, model=QUESTION),
        chat(text, user=QUESTION, stop=QUESTION, metadata={"a": QUESTION}),
        chat(text, **{QUESTION: 1}),
        chat(text, tools=[{"type": QUESTION}]),
        {"model": "m", "messages": [{"role": QUESTION, "content": QUESTION}]},
        QUESTION,
    ]
    return [app.http.post(CHAT, json=body, headers=given).status_code for body in bodies]


def assert_no_content(log: str) -> None:
    said = " ".join(re.findall("[a-z]+", log.lower()))
    asked = re.findall("[a-z]+", QUESTION.lower())
    for place in range(len(asked) - 4):
        assert " ".join(asked[place : place + 5]) not in said


def test_no_content_reaches_the_log(stream: io.StringIO) -> None:
    asked = 0
    for suffix in ("", "broken", "bug", "sealed", "forbidden", "garbled"):
        with live() as app:
            asked += len(everywhere(app, suffix))
    for failing in (ValueError(QUESTION), OSError(QUESTION)):
        with live(fails=failing) as app:
            asked += len(everywhere(app, ""))
        with live(pieces=[b'data: {"a"', failing]) as app:
            with contextlib.suppress(httpx.RemoteProtocolError):
                app.ask(QUESTION, stream=True)
            asked += 1
    assert eventually(lambda: len(requests(stream)) == asked)
    assert_no_content(stream.getvalue())
    with pytest.raises(AssertionError):  # the check can fail
        assert_no_content(stream.getvalue() + QUESTION)


# --- Metrics -------------------------------------------------------------------------------------


def test_metrics_of_every_stage_and_target() -> None:
    with live() as app:
        for text in ("hello", "a wizard", "forbidden"):
            app.ask(text)
        text = app.http.get("/metrics").text
    for name, count in (
        ("queue_wait_seconds", 3),
        ("body_seconds", 3),
        ("worker_wait_seconds", 3),
        ("detect_seconds", 3),
        ("decide_seconds", 3),
        ("coverage", 3),
        ("rewrite_seconds", 1),
        ("engine_first_byte_seconds", 2),
    ):
        assert f"unlearn_guard_{name}_count {count}.0" in text, name
    assert 'unlearn_guard_target_decisions_total{route="refuse",target="t"} 1.0' in text
    assert 'unlearn_guard_target_decisions_total{route="corrupt",target="t"} 1.0' in text


# --- Traces --------------------------------------------------------------------------------------


def test_the_trace_goes_through_the_proxy_to_the_engine() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = ScriptedEngine()
    app = create_app(WordGuard(), engine)
    proxy = app.state.proxy
    proxy.observer = Observer(proxy.metrics, Tracing(provider))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        for text in ("hello", "a wizard"):
            given = {"traceparent": parent, "tracestate": "a=b"}
            assert http.post(CHAT, json=chat(text), headers=given).status_code == 200
        names = [span.name for span in exporter.get_finished_spans()]
        assert eventually(lambda: len(exporter.get_finished_spans()) == 9), names
    upstream = [span for span in exporter.get_finished_spans() if span.name == "upstream"]
    sent = [headers for _, _, headers in engine.posts]
    assert [set(headers) for headers in sent] == [set(sent[0])] * 2  # flagged or not
    for span, headers in zip(upstream, sent, strict=True):
        assert headers["tracestate"] == "a=b"
        _, trace, identity, _ = headers["traceparent"].split("-")
        assert trace == parent.split("-")[1]
        assert span.context is not None
        assert identity == format(span.context.span_id, "016x")


def test_without_tracing_the_clients_own_header_goes_on() -> None:
    with live() as app:
        assert ask(app, key=None, traceparent="00-a-b-01").status_code == 200
        assert app.engine.posts[0][2]["traceparent"] == "00-a-b-01"
