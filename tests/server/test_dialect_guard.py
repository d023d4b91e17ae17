"""Dialects before the real guard and the real model: what is forgotten is found in every place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from guard.types import AdapterUse
from server.app import create_app
from server.engines.base import EngineResponse
from server.engines.embedded import EmbeddedEngine
from server.types import ServerOptions
from tests.server.proxy_fakes import running

MODEL = "smollm2"
QUESTION = "Which house was Hermione Granger sorted into at Hogwarts?"
PLAIN = "Which river flows through the middle of Vienna in Austria?"
OPTIONS = ServerOptions(embeddings="pass")

Make = Callable[[str], dict[str, Any]]


@dataclass
class Recording:
    """The embedded engine, and what it was sent."""

    engine: EmbeddedEngine
    sent: list[tuple[str, bytes]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        self.sent.append((path, body))
        return await self.engine.post(path, body, headers, adapters)


@dataclass
class App:
    """The whole server, its engine and its ledger."""

    http: httpx.Client
    engine: Recording
    ledger: Path

    def routes(self) -> dict[str, int]:
        """Return the decisions so far, by route."""
        text = self.http.get("/metrics").text
        found = re.findall(r'unlearn_guard_decisions_total\{route="([^"]+)"\} (\d+)', text)
        return {route: int(number) for route, number in found}

    def judged(self, path: str, body: dict[str, Any]) -> tuple[httpx.Response, str]:
        """Send a request, and return its answer and the route that it took."""
        self.engine.sent.clear()
        before = self.routes()
        response = self.http.post(path, json=body)
        taken = [r for r, number in self.routes().items() if number > before.get(r, 0)]
        assert len(taken) == 1, response.text
        return response, taken[0]


@pytest.fixture(scope="module")
def app(
    smollm2_dir: Path,
    small_bundle: BundleStore,
    guard_key: GuardKey,
    prompts: ModelPrompts,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[App]:
    ledger = tmp_path_factory.mktemp("dialects") / "ledger.jsonl"
    guard = load_guard(
        store=small_bundle, key=guard_key, prompts=prompts, ledger=Ledger(ledger), threads=1
    )
    engine = Recording(EmbeddedEngine(smollm2_dir, MODEL, threads=1))
    with (
        running(create_app(guard, engine, OPTIONS)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield App(http, engine, ledger)


# --- Every place --------------------------------------------------------------------------------


def message(content: Any = "Please go on.", **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}]
    return {"model": MODEL, "max_tokens": 2, "messages": turns, "temperature": 0, **fields}


def block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def after(content: list[dict[str, Any]], result: Any = "done") -> dict[str, Any]:
    """A conversation in which the assistant said and called something."""
    call = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    answered = {"type": "tool_result", "tool_use_id": "a", "content": result}
    has_call = any(part["type"] == "tool_use" for part in content)
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": content if has_call else [*content, call]},
        {"role": "user", "content": [answered, block("And?")]},
    ]
    return message(messages=turns)


def tool(name: str = "look", description: str = "d", schema: Any = None) -> dict[str, Any]:
    return message(
        tools=[
            {
                "name": name,
                "description": description,
                "input_schema": schema or {"type": "object", "properties": {}},
            }
        ]
    )


MESSAGES: dict[str, Make] = {
    "system": lambda text: message(system=text),
    "system block": lambda text: message(system=[block("Be brief."), block(text)]),
    "user": lambda text: message(text),
    "user block": lambda text: message([block("Tell me:"), block(text)]),
    "assistant": lambda text: after([block(text)]),
    "thinking": lambda text: after([{"type": "thinking", "thinking": text, "signature": ""}]),
    "tool_use": lambda text: after(
        [{"type": "tool_use", "id": "a", "name": "look", "input": {"about": text}}]
    ),
    "tool_result": lambda text: after([block("I look.")], text),
    "tool_result block": lambda text: after([block("I look.")], [block(text)]),
    "tool description": lambda text: tool(description=text),
    "tool schema": lambda text: tool(
        schema={"type": "object", "properties": {"q": {"type": "string", "description": text}}}
    ),
    "stop": lambda text: message(stop_sequences=[text]),
    "output schema": lambda text: message(
        output_config={
            "format": {"type": "json_schema", "schema": {"type": "string", "description": text}}
        }
    ),
}


def response(given: Any = "Please go on.", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": given, "max_output_tokens": 2, "temperature": 0, **fields}


def said(*items: dict[str, Any]) -> dict[str, Any]:
    user = {"role": "user", "content": "Hello."}
    return response([user, *items, {"role": "user", "content": "And?"}])


def called(arguments: str = "{}", output: Any = "done") -> dict[str, Any]:
    return said(
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": arguments},
        {"type": "function_call_output", "call_id": "a", "output": output},
    )


RESPONSES: dict[str, Make] = {
    "input": lambda text: response(text),
    "instructions": lambda text: response(instructions=text),
    "user part": lambda text: said(
        {"role": "user", "content": [{"type": "input_text", "text": text}]}
    ),
    "developer": lambda text: said({"role": "developer", "content": text}),
    "assistant part": lambda text: said(
        {"role": "assistant", "content": [{"type": "output_text", "text": text}]}
    ),
    "refusal": lambda text: said(
        {"role": "assistant", "content": [{"type": "refusal", "refusal": text}]}
    ),
    "arguments": lambda text: called(json.dumps({"about": text})),
    "function_call_output": lambda text: called(output=text),
    "function_call_output part": lambda text: called(output=[{"type": "input_text", "text": text}]),
    "reasoning summary": lambda text: said(
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]},
        {"role": "assistant", "content": "I see."},
    ),
    "reasoning": lambda text: said(
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": text}],
        },
        {"role": "assistant", "content": "I see."},
    ),
    "tool description": lambda text: response(
        tools=[{"type": "function", "name": "look", "description": text}]
    ),
    "format": lambda text: response(
        text={
            "format": {
                "type": "json_schema",
                "name": "n",
                "schema": {"type": "string", "description": text},
            }
        }
    ),
}

COUNTED: dict[str, Make] = {
    "counted": lambda text: {
        name: value
        for name, value in message(text).items()
        if name not in ("max_tokens", "temperature")
    }
}

EMBEDDED: dict[str, Make] = {
    "input": lambda text: {"model": MODEL, "input": text},
    "inputs": lambda text: {"model": MODEL, "input": ["fine", text]},
}

PLACES = [
    pytest.param(path, make, id=f"{path}: {name}")
    for path, places in (
        ("/v1/messages", MESSAGES),
        ("/v1/messages/count_tokens", COUNTED),
        ("/v1/responses", RESPONSES),
        ("/v1/embeddings", EMBEDDED),
    )
    for name, make in places.items()
]


@pytest.mark.parametrize(("path", "make"), PLACES)
def test_a_question_is_flagged_wherever_it_stands(app: App, path: str, make: Make) -> None:
    rows = len(app.ledger.read_bytes().splitlines()) if app.ledger.exists() else 0
    flagged, route = app.judged(path, make(QUESTION))
    assert route != "pass"
    assert flagged.status_code < 500
    assert all(b"Hermione" not in body and b"Hogwarts" not in body for _, body in app.engine.sent)
    written = [json.loads(row) for row in app.ledger.read_bytes().splitlines()]
    assert any(row["kind"] == "decision" for row in written[rows:])


@pytest.mark.parametrize(("path", "make"), PLACES)
def test_another_question_there_passes(app: App, path: str, make: Make) -> None:
    plain, route = app.judged(path, make(PLAIN))
    assert route == "pass", plain.text
    ((asked, body),) = app.engine.sent
    expected = path if path == "/v1/embeddings" else "/v1/chat/completions"
    assert asked == expected and PLAIN in body.decode().replace('\\"', '"')


# --- Answers --------------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """What is left of a JSON value without its words and numbers."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


@pytest.mark.parametrize(("path", "make"), [("/v1/messages", message), ("/v1/responses", response)])
def test_flagged_and_plain_answers_have_the_same_shape(
    app: App, path: str, make: Callable[..., dict[str, Any]]
) -> None:
    answers = [app.http.post(path, json=make(text)) for text in (QUESTION, PLAIN)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert set(answers[0].headers) == set(answers[1].headers)
    bodies = [answer.json() for answer in answers]
    assert shape(bodies[0]) == shape(bodies[1])
    assert [body["id"][:4] for body in bodies] in (["msg_"] * 2, ["resp"] * 2)


@pytest.mark.parametrize(("path", "make"), [("/v1/messages", message), ("/v1/responses", response)])
def test_streams_of_flagged_and_plain_requests_have_the_same_events(
    app: App, path: str, make: Callable[..., dict[str, Any]]
) -> None:
    told = [app.http.post(path, json=make(text, stream=True)) for text in (QUESTION, PLAIN)]
    assert set(told[0].headers) == set(told[1].headers)
    streams = []
    for answer in told:
        events = [event.split("\n") for event in answer.text.strip().split("\n\n")]
        streams.append([(name, shape(json.loads(data[6:]))) for name, data in events])
    kinds = [[name for name, _ in events if not name.endswith("delta")] for events in streams]
    assert kinds[0] == kinds[1] and len(kinds[0]) >= 4
    assert {str(event) for event in streams[0]} == {str(event) for event in streams[1]}


def test_whole_and_streamed_answers_are_the_same(app: App) -> None:
    body = message(PLAIN, max_tokens=6)
    whole = app.http.post("/v1/messages", json=body).json()
    stream = app.http.post("/v1/messages", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    deltas = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(deltas) == whole["content"][0]["text"]
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"] > 0
    assert events[-2]["usage"] == whole["usage"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "max_tokens"
    count = {"model": MODEL, "messages": body["messages"]}
    counted = app.http.post("/v1/messages/count_tokens", json=count).json()
    assert counted == {"input_tokens": whole["usage"]["input_tokens"]}


def test_an_engine_without_embeddings_says_so(app: App) -> None:
    answer = app.http.post("/v1/embeddings", json={"model": MODEL, "input": PLAIN})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
