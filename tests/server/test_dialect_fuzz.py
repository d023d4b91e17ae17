"""Whatever a client sends or an engine answers: no 5xx, nothing raised, nothing half said."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.request import ENDPOINTS, parse_request
from server.app import create_app
from server.types import ServerOptions
from tests.server.proxy_fakes import SSE, ScriptedEngine, WordGuard
from tests.server.test_dialect_guard import EMBEDDED, MESSAGES, RESPONSES
from tests.server.test_dialect_messages import call, pieces

PLACES: Final = {
    "/v1/messages": MESSAGES,
    "/v1/responses": RESPONSES,
    "/v1/embeddings": EMBEDDED,
}
STREAMS: Final = ("/v1/messages", "/v1/responses")
QUICK: Final = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

JSON: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["wizard", "<prompt_embeds>", "\ud800", "text", "user", "tool_result"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "content", "role", "x"]), inner)
    ),
    max_leaves=8,
)


@dataclass
class App:
    """The application, called in this process: what it raises is raised here."""

    runner: asyncio.Runner
    engine: ScriptedEngine
    http: httpx.AsyncClient

    def post(self, path: str, body: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return self.runner.run(self.http.post(path, content=body, headers=headers))


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    engine = ScriptedEngine()
    made = create_app(WordGuard(), engine, ServerOptions(embeddings="pass", output_guard=False))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://x")
    with asyncio.Runner() as runner:
        yield App(runner, engine, client)
        runner.run(client.aclose())
        made.state.proxy.close()


def places_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in a body."""
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, inner in children:
        yield (*path, key)
        yield from places_of(inner, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, path: str) -> bytes:
    """A body that was right but for one to three places."""
    makers = PLACES[path]
    text = draw(st.sampled_from(["hello", "a wizard", "forbidden", "sealed"]))
    body = copy.deepcopy(makers[draw(st.sampled_from(sorted(makers)))](text))
    body["model"] = "m"
    if path in STREAMS:
        body["stream"] = draw(st.booleans())
    for _ in range(draw(st.integers(0, 3))):
        way = draw(st.sampled_from(list(places_of(body))))
        node: Any = body
        for key in way[:-1]:
            node = node[key]
        what = draw(st.sampled_from(["change", "delete", "add", "twice"]))
        if what == "change":
            node[way[-1]] = draw(JSON)
        elif what == "delete":
            del node[way[-1]]
        elif isinstance(node, dict):
            node[draw(st.text(max_size=4))] = draw(JSON)
        else:
            node.insert(0, copy.deepcopy(node[way[-1]]))
        if not body:
            break
    return json.dumps(body).encode()


def check(app: App, path: str, body: bytes) -> None:
    app.engine.posts.clear()
    response = app.post(path, body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = json.loads(response.content)["error"]
        assert isinstance(error["message"], str) and error["type"]
    for endpoint, sent, _ in app.engine.posts:
        assert b"forbidden" not in sent
        if endpoint in ENDPOINTS and b"prompt_embeds" not in sent:
            assert parse_request(endpoint, sent)


@pytest.mark.parametrize("path", sorted(PLACES))
@QUICK
@given(data=st.data())
def test_bodies_that_are_almost_right(app: App, path: str, data: st.DataObject) -> None:
    check(app, path, data.draw(mutated(path)))


@pytest.mark.parametrize("path", sorted(PLACES))
@QUICK
@given(body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(app: App, path: str, body: bytes) -> None:
    check(app, path, body)


EVENTS: Final = [
    *pieces({"role": "assistant", "content": ""}, {"content": "a"}, {"reasoning": "b"}),
    *pieces({"tool_calls": [call("f", "")]}, {"tool_calls": [call(None, "{}")]}),
    *pieces({"tool_calls": [call("g", "{", 1)]}, {"refusal": "no"}, reason="length"),
    b": a comment\n\n",
    b"data: {}\n\n",
    b"data: nonsense\n\n",
    b'data: {"choices": 3}\n\n',
    b'data: {"error": {"message": "e"}}\n\n',
    b"\xff\xfe",
]


@pytest.mark.parametrize("path", STREAMS)
@QUICK
@given(events=st.lists(st.sampled_from(EVENTS), max_size=9), cut=st.integers(1, 40))
def test_any_stream_of_an_engine_ends_in_words(
    app: App, path: str, events: list[bytes], cut: int
) -> None:
    whole = b"".join(events)
    app.engine.pieces = [whole[i : i + cut] for i in range(0, len(whole), cut)] or [b" "]
    app.engine.headers = SSE
    body = PLACES[path]["user" if path == "/v1/messages" else "input"]("hello")
    try:
        answer = app.post(path, json.dumps({**body, "model": "m", "stream": True}).encode())
    finally:
        app.engine.pieces = app.engine.headers = None
    assert answer.status_code == 200
    told = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    kinds = [json.loads(data.removeprefix("data: "))["type"] for _, data in told]
    ends = ("message_stop", "error", "response.completed", "response.incomplete", "response.failed")
    assert kinds[-1] in ends
    assert not set(kinds[:-1]) & set(ends), "nothing comes after the end"
