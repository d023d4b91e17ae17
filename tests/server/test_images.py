"""`images: pass` through the whole server, on all routes that can carry an image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from server.app import create_app
from server.types import ServerOptions
from tests.server.proxy_fakes import CHAT, ScriptedEngine, running

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
DATA = "iVBORw0KGgo="
URL = f"data:image/png;base64,{DATA}"
FORGOTTEN = "Which house was Hermione Granger sorted into at Hogwarts?"
PLAIN = "Which river flows through the middle of Vienna in Austria?"
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
ROUTES = (CHAT, MESSAGES, RESPONSES)

Live = tuple[httpx.Client, ScriptedEngine]


@pytest.fixture(scope="module")
def live(
    small_bundle: BundleStore,
    guard_key: GuardKey,
    prompts: ModelPrompts,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    ledger = Ledger(tmp_path_factory.mktemp("images") / "ledger.jsonl", guard_key)
    guard = load_guard(
        store=small_bundle, key=guard_key, prompts=prompts, ledger=ledger, images="pass"
    )
    engine = ScriptedEngine()
    app = create_app(guard, engine, ServerOptions(images="pass"))
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http, engine


def asked(route: str, text: str, role: str = "user") -> dict[str, Any]:
    if route == CHAT:
        said = [IMAGE, {"type": "text", "text": text}]
        return {"model": "m", "messages": [{"role": role, "content": said}]}
    if route == MESSAGES:
        source = {"type": "base64", "media_type": "image/png", "data": DATA}
        said = [{"type": "image", "source": source}, {"type": "text", "text": text}]
        return {"model": "m", "max_tokens": 9, "messages": [{"role": role, "content": said}]}
    said = [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": text}]
    return {"model": "m", "input": [{"role": role, "content": said}]}


def sent(engine: ScriptedEngine, since: int) -> list[dict[str, Any]]:
    return [json.loads(body) for _, body, _ in engine.posts[since:]]


@pytest.mark.parametrize("route", ROUTES)
def test_a_plain_request_is_answered_and_its_image_arrives(live: Live, route: str) -> None:
    http, engine = live
    before = len(engine.posts)
    assert http.post(route, json=asked(route, PLAIN)).status_code == 200
    (body,) = sent(engine, before)
    assert body["messages"] == [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": PLAIN}]}
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_flagged_one_is_refused_in_the_words_of_every_refusal(
    live: Live, route: str, stream: bool
) -> None:
    http, engine = live
    before = len(engine.posts)
    answer = http.post(route, json={**asked(route, FORGOTTEN), "stream": stream})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message == "this request can't be answered here; rephrase it or leave that content out"
    assert len(engine.posts) == before


@pytest.mark.parametrize("route", ROUTES)
def test_only_users_show_images(live: Live, route: str) -> None:
    http, engine = live
    before = len(engine.posts)
    body = asked(route, PLAIN, "assistant")
    turns = body.get("messages") or body["input"]
    turns.append({"role": "user", "content": PLAIN})
    answer = http.post(route, json=body)
    assert (answer.status_code, len(engine.posts)) == (400, before)


def nested() -> Iterator[tuple[str, dict[str, Any]]]:
    """Images where no model of ours would look for them, and URLs."""
    block = asked(MESSAGES, PLAIN)["messages"][0]["content"][0]
    result = {"type": "tool_result", "tool_use_id": "a", "content": [block]}
    yield MESSAGES, asked(MESSAGES, PLAIN) | {"messages": [{"role": "user", "content": [result]}]}
    yield MESSAGES, asked(MESSAGES, PLAIN) | {"system": [block]}
    far = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
    yield MESSAGES, asked(MESSAGES, PLAIN) | {"messages": [{"role": "user", "content": [far]}]}
    part = asked(RESPONSES, PLAIN)["input"][0]["content"][0]
    output = {"type": "function_call_output", "call_id": "a", "output": [part]}
    yield RESPONSES, asked(RESPONSES, PLAIN) | {"input": [output]}
    for changed in ({"image_url": "http://127.0.0.1/a.png"}, {"file_id": "file-1"}):
        content = [{**part, **changed}]
        yield RESPONSES, asked(RESPONSES, PLAIN) | {"input": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(("route", "body"), list(nested()))
def test_elsewhere_they_are_refused_and_nothing_is_fetched(
    live: Live, route: str, body: dict[str, Any]
) -> None:
    http, engine = live
    before = len(engine.posts)
    answer = http.post(route, json=body)
    assert (answer.status_code, len(engine.posts)) == (400, before)


def test_an_answer_that_tells_of_a_target_ends_where_it_does(live: Live) -> None:
    http, engine = live
    told = "Harry Potter was sorted into Gryffindor at Hogwarts by the Sorting Hat."
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
    choice["message"]["content"] = told
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    before, engine.pieces = len(engine.posts), [json.dumps(body).encode()]
    engine.headers = [("content-type", "application/json")]
    try:
        answer = http.post(CHAT, json=asked(CHAT, PLAIN))
    finally:
        engine.pieces = engine.headers = None
    assert answer.status_code == 200
    assert "Gryffindor" not in answer.text and len(engine.posts) == before + 1


def test_a_guard_that_fails_lets_an_image_through_only_where_it_may(
    live: Live, small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts
) -> None:
    guard = load_guard(
        store=small_bundle, key=guard_key, prompts=prompts, ledger=None, images="pass"
    )
    guard.detector = None  # type: ignore[assignment]
    for images, status in (("pass", 200), ("deny", 400)):
        options = ServerOptions(on_error="pass", images=images)  # type: ignore[arg-type]
        with running(create_app(guard, ScriptedEngine(), options)) as url:
            assert httpx.post(f"{url}{CHAT}", json=asked(CHAT, PLAIN)).status_code == status
