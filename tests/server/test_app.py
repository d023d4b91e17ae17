"""The proxy's way of a request, through a real server: what is passed, rewritten and refused."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from guard.errors import EngineUnavailableError
from guard.rewrite import StandIn
from server.app import create_app
from server.types import Readiness, ServerOptions
from tests.server.proxy_fakes import (
    ANSWER,
    CHAT,
    EVENTS,
    TEXT,
    Live,
    ScriptedEngine,
    WordGuard,
    chat,
    error_of,
    eventually,
    live,
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Live]:
    with live() as parts:
        yield parts


@pytest.fixture
def app(shared: Live) -> Live:
    shared.engine.posts.clear()
    shared.guard.recorded.clear()
    return shared


# --- Passing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_unflagged_bytes_go_through_untouched_both_ways(app: Live, path: str) -> None:
    field = '"messages" : [ {"role":"user","content":"h\\u00e9llo"} ]'
    if path == TEXT:
        field = '"prompt":\t"h\\u00e9llo"'
    body = ("{" + field + ',  "model":"m","temperature":0.70}\n').encode()
    response = app.http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert response.content == ANSWER
    assert [(p, b) for p, b, _ in app.engine.posts] == [(path, body)]
    assert app.guard.recorded == []


def test_headers_pass_by_allow_list_both_ways(app: Live) -> None:
    sent = {
        "x-request-id": "q-1", "traceparent": "00-a-b-01", "authorization": "Bearer k",
        "x-amzn-sagemaker-adapter-identifier": "lora", "x-vllm-priority": "1", "cookie": "a=b",
    }  # fmt: skip
    response = app.http.post(CHAT, json=chat(), headers=sent)
    _, _, headers = app.engine.posts[0]
    assert headers["x-request-id"] == "q-1"
    assert headers["traceparent"] == "00-a-b-01"
    assert set(headers) == {"accept", "content-type", "x-request-id", "traceparent"}
    assert set(response.headers) == {"date", "content-type", "content-length", "x-request-id"}


def test_authorization_is_forwarded_only_when_asked() -> None:
    with live(ServerOptions(forward_authorization=True)) as app:
        app.http.post(CHAT, json=chat(), headers={"authorization": "Bearer k"})
        assert app.engine.posts[0][2]["authorization"] == "Bearer k"
        app.http.post(CHAT, json=chat())
        assert app.engine.posts[1][2]["authorization"] == ""  # not the engine's own key


def test_events_come_unchanged_and_as_they_arrive() -> None:
    gates = [threading.Event(), threading.Event()]
    pieces = [EVENTS[0], gates[0], EVENTS[1], gates[1], EVENTS[2]]
    with live(ServerOptions(output_guard=False), pieces=pieces) as app:
        found: list[bytes] = []
        with app.http.stream("POST", CHAT, json=chat(stream=True)) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for chunk in response.iter_raw():
                found.append(chunk)
                # The next piece is made only after this one came through.
                if len(found) <= len(gates):
                    gates[len(found) - 1].set()
    assert found == EVENTS


def test_openai_client_streaming_and_not(app: Live) -> None:
    messages: Any = chat()["messages"]
    whole = app.openai.chat.completions.create(model="m", messages=messages)
    assert whole.choices[0].message.content == "Hello"
    pieces = app.openai.chat.completions.create(model="m", messages=messages, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "Hello"


# --- Flagged requests ----------------------------------------------------------------------------


def test_flagged_message_is_replaced_and_nothing_else(app: Live) -> None:
    body = chat("a wizard", seed=7, temperature=0.5)
    body["messages"].insert(0, {"role": "system", "content": "be kind"})
    response = app.http.post(CHAT, json=body)
    sent = json.loads(app.engine.posts[0][1])
    part = {"type": "prompt_embeds", "data": base64.b64encode(b"ABC").decode()}
    assert sent["messages"][1].pop("content") == [part]
    body["messages"][1].pop("content")
    assert sent == body
    assert response.content == ANSWER
    assert app.guard.recorded == ["corrupt"]


def test_flagged_prompt_becomes_embeddings(app: Live) -> None:
    app.ask("a wizard", TEXT)
    assert json.loads(app.engine.posts[0][1]) == {"model": "m", "prompt_embeds": "QUJD"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_answers_look_alike_on_both_routes(app: Live, stream: bool, path: str) -> None:
    shapes = []
    for text in ("hello", "a wizard"):
        body = {**chat(text), "stream": stream}
        if path == TEXT:
            body = {"model": "m", "prompt": text, "stream": stream}
        with app.http.stream("POST", path, json=body) as response:
            pieces = list(response.iter_raw())
        headers = [(name, value) for name, value in response.headers.raw if name != b"date"]
        shapes.append((response.status_code, headers, pieces, app.engine.posts[-1][2]))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("text", ["sealed", "forbidden", "garbled", "unread"])
def test_what_cannot_be_answered_safely_is_refused_never_passed(app: Live, text: str) -> None:
    response = app.ask(f"{text} words")
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "content_refused")
    assert app.engine.posts == []
    assert text not in error["message"]


def test_engine_that_refuses_embeddings_does_not_tell() -> None:
    message = b'{"error":{"message":"prompt_embeds are not enabled"}}'
    with live(status=400, pieces=[message], headers=[("content-type", "application/json")]) as app:
        assert error_of(app.ask("a wizard"))["code"] == "content_refused"
        assert app.ask("hello").content == message


def test_other_errors_of_the_engine_are_relayed_alike() -> None:
    message = b'{"error":{"message":"context too long"}}'
    headers = [("content-type", "application/json"), ("content-length", str(len(message)))]
    with live(status=400, pieces=[message], headers=headers) as app:
        plain, flagged = app.ask("hello"), app.ask("a wizard")
        assert plain.status_code == flagged.status_code == 400
        assert plain.content == flagged.content == message
        assert set(plain.headers) == set(flagged.headers)


def test_an_answer_with_a_name_put_back_has_the_headers_of_any_other(app: Live) -> None:
    app.guard.stand_ins = (StandIn(("Hello",), "Xin Lee Williams"),)
    plain, flagged = app.ask("hello"), app.ask("a wizard")
    assert plain.json()["choices"][0]["message"]["content"] == "Hello"
    assert flagged.json()["choices"][0]["message"]["content"] == "Xin Lee Williams"
    assert set(plain.headers) == set(flagged.headers)
    assert int(flagged.headers["content-length"]) == len(flagged.content)


# --- When the guard fails ------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "status"), [("broken", 503), ("bug", 500)])
def test_guard_that_fails_closes(app: Live, text: str, status: int) -> None:
    response = app.ask(text)
    assert response.status_code == status
    assert text not in json.dumps(error_of(response))
    assert app.engine.posts == []


def test_operator_may_choose_to_pass_when_the_guard_fails() -> None:
    with live(ServerOptions(on_error="pass")) as app:
        assert app.ask("broken").content == ANSWER
        assert app.ask("broken", foo=1).status_code == 400
        assert app.ask("broken", model="other").status_code == 404
        app.guard.rewrite_fails = True
        assert app.ask("a wizard").status_code == 503
        assert len(app.engine.posts) == 1


def test_decision_that_takes_too_long_closes() -> None:
    with live(ServerOptions(decide_timeout_s=0.05)) as app:
        response = app.ask("slow")
        assert (response.status_code, error_of(response)["code"]) == (503, "guard_failed")
        assert response.headers["retry-after"]


def test_ledger_that_fails_closes_and_looks_like_any_failure_of_the_guard() -> None:
    with live() as app:
        broken = error_of(app.ask("broken"))
        app.guard.ledger_fails = True
        response = app.ask("a wizard")
        assert response.status_code == 503
        assert error_of(response) == broken
        assert app.engine.cancelled.wait(5)
        assert app.ask("hello").status_code == 200


def test_no_text_reaches_any_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with live() as app:
        app.guard.ledger_fails = True
        for text in ("broken", "bug", "sealed", "a wizard", "forbidden"):
            app.ask(f"{text} Xyzzy-Plugh")
        app.guard.ledger_fails, app.guard.rewrite_fails = False, True
        app.ask("a wizard Xyzzy-Plugh")
        app.http.post(CHAT, json=chat(**{"Xyzzy-Plugh": 1}))
        app.http.post(CHAT, json={"model": "Xyzzy-Plugh", "messages": chat()["messages"]})
        app.http.post("/Xyzzy-Plugh", content=b"Xyzzy-Plugh")
        app.engine.fails = EngineUnavailableError("Xyzzy-Plugh")
        app.ask("hello")
        app.engine.fails = RuntimeError("Xyzzy-Plugh")
        app.ask("hello")
        app.engine.unhealthy = True
        app.http.get("/ready")
    logged = "\n".join(
        str(value) for record in caplog.records
        if record.name.partition(".")[0] not in ("httpx", "httpcore", "openai")
        for value in (record.getMessage(), record.exc_text, record.exc_info)
    )  # fmt: skip
    assert "StageError" in logged
    assert "Xyzzy" not in logged
    assert "wizard" not in logged


# --- Refused before the guard or the engine -------------------------------------------------------


def test_unknown_model_is_404_and_never_reaches_the_engine(app: Live) -> None:
    response = app.ask(model="gpt-9")
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert app.engine.posts == []
    with pytest.raises(openai.NotFoundError):
        app.openai.chat.completions.create(
            model="lora", messages=[{"role": "user", "content": "x"}]
        )


def test_models_are_asked_for_once_in_a_while(app: Live) -> None:
    before = app.engine.asked_models
    for _ in range(5):
        app.ask(model="nope")
    assert app.engine.asked_models <= before + 1


def test_undeclared_field_is_named_to_the_client(app: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        app.openai.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], extra_body={"vllm_xargs": {}}
        )
    assert caught.value.param == "vllm_xargs"
    assert app.engine.posts == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model":"m","model":"m"}']
)
def test_malformed_body_is_400(app: Live, body: bytes) -> None:
    response = app.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")
    assert app.ask().status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": ""},
    ],
)
def test_other_content_types_are_415(app: Live, headers: dict[str, str]) -> None:
    response = app.http.post(CHAT, content=json.dumps(chat()).encode(), headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1", "/v1/chat/completions/", "/v1/chat/completions/batch", "/v1/responses/r",
        "/v1/messages/render", "/v1/embeddings/x", "/v1/models/m", "/invocations",
        "/generative_scoring",
        "/tokenize", "/detokenize", "/pooling", "/score", "/v1/load_lora_adapter", "/docs",
        "/redoc", "/version", "/inference/v1/generate", "/v1/%63hat/x", "//v1/models",
        "/v1/caf%C3%A9",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_every_other_route_is_404(app: Live, path: str, method: str) -> None:
    response = app.http.request(method, path, json={} if method == "POST" else None)
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    assert app.engine.posts == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, {"POST"}),
        ("DELETE", TEXT, {"POST"}),
        ("OPTIONS", CHAT, {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("PUT", "/metrics", {"GET", "HEAD"}),
    ],
)
def test_wrong_method_is_405_and_says_which(
    app: Live, method: str, path: str, allowed: set[str]
) -> None:
    response = app.http.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == allowed


# --- Keys ----------------------------------------------------------------------------------------


def test_api_keys_guard_the_api_but_not_the_probes() -> None:
    with live(ServerOptions(api_keys=("k1", "k2"))) as app:
        for sent in (None, "Bearer wrong", "Basic k1", "k1", "Bearer"):
            headers = {"authorization": sent} if sent is not None else {}
            for response in (
                app.http.post(CHAT, json=chat(), headers=headers),
                app.http.get("/v1/models", headers=headers),
            ):
                assert (response.status_code, error_of(response)["code"]) == (
                    401,
                    "invalid_api_key",
                )
                assert response.headers["www-authenticate"] == "Bearer"
        assert app.engine.posts == []
        for key in ("k1", "k2"):
            headers = {"authorization": f"Bearer {key}"}
            assert app.http.post(CHAT, json=chat(), headers=headers).status_code == 200
        assert "authorization" not in app.engine.posts[0][2]
        assert app.http.get("/health").status_code == 200
        assert app.http.get("/ready").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            app.openai.models.list()


# --- Small routes --------------------------------------------------------------------------------


def test_models_lists_public_names_only(app: Live) -> None:
    response = app.http.get("/v1/models").json()
    assert [entry["id"] for entry in response["data"]] == ["m", "m2"]
    assert set(response["data"][0]) == {"id", "object", "created", "owned_by"}
    assert [model.id for model in app.openai.models.list()] == ["m", "m2"]


def test_ready_says_what_is_loaded() -> None:
    state = Readiness(bundle_version=3, self_check="passed")
    with live(readiness=lambda: state) as app:
        assert app.http.get("/ready").json() == {
            "status": "ready", "engine": "scripted", "bundle_version": 3, "self_check": "passed",
        }  # fmt: skip
        app.engine.unhealthy = True
        response = app.http.get("/ready")
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
        assert "wizard" not in response.text
        assert app.http.get("/health").status_code == 200


def test_failed_self_check_is_not_ready() -> None:
    with live(readiness=lambda: Readiness(1, "failed")) as app:
        response = app.http.get("/ready")
        assert response.status_code == 503
        assert "self-check" in error_of(response)["message"]


def test_metrics_count_by_bounded_labels(app: Live) -> None:
    app.ask("a wizard")
    app.ask("hello", model="Xyzzy")
    app.http.get("/Xyzzy")
    assert eventually(lambda: "guard_in_flight 0.0" in app.http.get("/metrics").text)
    text = app.http.get("/metrics").text
    assert (
        'unlearn_guard_requests_total{endpoint="/v1/chat/completions",route="corrupt",status="200"}'
        in text
    )
    assert 'unlearn_guard_decisions_total{route="corrupt"}' in text
    for name in (
        "decide_seconds_count",
        "engine_first_byte_seconds_count",
        "request_seconds_count",
    ):
        assert f"unlearn_guard_{name}" in text
    assert "Xyzzy" not in text


def test_metrics_are_for_the_operator() -> None:
    with live(ServerOptions(metrics_key="op", api_keys=("k",))) as app:
        assert app.http.get("/metrics").status_code == 401
        assert app.http.get("/metrics", headers={"authorization": "Bearer k"}).status_code == 401
        assert app.http.get("/metrics", headers={"authorization": "Bearer op"}).status_code == 200


@pytest.mark.parametrize(
    ("peer", "status"), [("10.0.0.7", 403), ("127.0.0.1", 200), ("::1", 200), ("odd", 403)]
)
def test_metrics_without_a_key_answer_loopback_only(peer: str, status: int) -> None:
    application = create_app(WordGuard(), ScriptedEngine())
    transport = httpx.ASGITransport(application, client=(peer, 1))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            forwarded = {"x-forwarded-for": "127.0.0.1"}
            return (await client.get("/metrics", headers=forwarded)).status_code

    assert asyncio.run(ask()) == status


def test_engine_lives_as_long_as_the_application() -> None:
    with live() as app:
        engine = app.engine
        assert (engine.started, engine.closed) == (1, 0)
    assert (engine.started, engine.closed) == (1, 1)


def test_importing_the_server_loads_no_heavy_library() -> None:
    code = (
        "import sys, server.app, server.run\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'onnxruntime', 'faiss', 'pandas'}\n"
        "print(*(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr.strip(), done.returncode) == ("", "", 0)
