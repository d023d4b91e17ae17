"""Embeddings: denied, or only for texts that are not flagged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from server.types import ServerOptions
from tests.server.proxy_fakes import Live, error_of, live

PATH = "/v1/embeddings"
ANSWER = b'{"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}]}'
KIND = [("content-type", "application/json"), ("x-internal", "1")]


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live(ServerOptions(embeddings="pass"), pieces=[ANSWER], headers=KIND) as parts:
        yield parts


@pytest.fixture
def app(served: Live) -> Live:
    served.engine.posts.clear()
    served.guard.recorded.clear()
    return served


def ask(given: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": given, **fields}


def test_they_are_denied_by_default() -> None:
    with live(ServerOptions(api_keys=("secret",))) as app:
        assert app.http.post(PATH, json=ask()).status_code == 401
        key = {"authorization": "Bearer secret"}
        for body in (ask(), {"surprise": 1}):
            response = app.http.post(PATH, json=body, headers=key)
            assert (response.status_code, error_of(response)["code"]) == (403, "forbidden")
        assert app.engine.posts == []


@pytest.mark.parametrize("given", ["hello", ["hello", "and more"]])
def test_plain_inputs_are_sent_on(app: Live, given: Any) -> None:
    body = ask(given, encoding_format="float", dimensions=8, user="u")
    response = app.http.post(PATH, json=body)
    assert (response.status_code, response.content) == (200, ANSWER)
    assert "x-internal" not in response.headers
    path, sent, _ = app.engine.posts[0]
    expected = {"model": "m", "input": given, "encoding_format": "float", "dimensions": 8}
    assert (path, json.loads(sent)) == (PATH, expected)


@pytest.mark.parametrize("word", ["wizard", "forbidden", "garbled", "unread"])
@pytest.mark.parametrize("several", [False, True])
def test_flagged_inputs_are_refused(app: Live, word: str, several: bool) -> None:
    text = f"a {word}"
    response = app.http.post(PATH, json=ask(["plain", text] if several else text))
    assert (response.status_code, error_of(response)["code"]) == (400, "content_refused")
    assert app.engine.posts == []
    assert len(app.guard.recorded) == (word != "unread")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (ask(surprise=1), "unknown_parameter", "surprise"),
        (ask([1, 2]), "unsupported_content", "input"),
        (ask([[1, 2]]), "unsupported_content", "input"),
        (ask(["a", 1]), "unsupported_content", "input"),
        (ask([]), "invalid_value", "input"),
        (ask(["a"] * 257), "invalid_value", "input"),
        (ask(dimensions=0), "invalid_value", "dimensions"),
        (ask(encoding_format="hex"), "invalid_value", "encoding_format"),
        ({"model": "m"}, "missing_required_parameter", "input"),
    ],
)
def test_what_is_not_declared_is_refused(
    app: Live, body: dict[str, Any], code: str, param: str
) -> None:
    response = app.http.post(PATH, json=body)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == (code, param)
    assert app.engine.posts == []


def test_a_guard_that_fails_refuses(app: Live) -> None:
    response = app.http.post(PATH, json=ask("a broken guard"))
    assert (response.status_code, error_of(response)["code"]) == (503, "guard_failed")
    assert app.engine.posts == []


def test_the_official_client_reads_them(app: Live) -> None:
    # It asks for base64 unless it is told otherwise, and reads lists of numbers too.
    found = app.openai.embeddings.create(model="m", input="hello", encoding_format="float")
    assert found.data[0].embedding == [0.5]
    with pytest.raises(openai.BadRequestError, match="can't be answered"):
        app.openai.embeddings.create(model="m", input="a wizard")
