"""Anthropic's messages: what they become, how answers and errors come back, keys and clients."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from guard.errors import EngineError, RequestError
from guard.request import parse_request
from server.dialects.messages import CountTokens, Messages
from server.types import ServerOptions
from tests.server.proxy_fakes import CHAT, SSE, Live, eventually, live

PATH = "/v1/messages"
EPHEMERAL = {"type": "ephemeral"}
TOOL = {"name": "look", "description": "Looks up.", "input_schema": {"type": "object"}}


def ask(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}]
    return {"model": "m", "max_tokens": 9, "messages": turns, **fields}


def translated(body: dict[str, Any]) -> dict[str, Any]:
    """Translate, and hold the outcome against what the guard accepts."""
    chat, _ = Messages().read(json.dumps(body).encode())
    assert parse_request(CHAT, chat)
    found: dict[str, Any] = json.loads(chat)
    return found


def refusal(body: dict[str, Any]) -> str:
    with pytest.raises(RequestError) as caught:
        Messages().read(json.dumps(body).encode())
    assert caught.value.status == 400
    return str(caught.value)


@pytest.fixture(scope="module")
def app() -> Iterator[Live]:
    with live() as parts:
        yield parts


# --- Requests -------------------------------------------------------------------------------------


def test_a_conversation_with_tools_keeps_its_order() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I must look.", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "look", "input": {"x": "é"}},
                {"type": "tool_use", "id": "b", "name": "look", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "one"},
                {"type": "text", "text": "And?"},
                {
                    "type": "tool_result",
                    "tool_use_id": "b",
                    "is_error": True,
                    "content": [{"type": "text", "text": "two", "cache_control": EPHEMERAL}],
                },
            ],
        },
    ]
    system = [{"type": "text", "text": "Be kind.", "cache_control": EPHEMERAL}]
    assert translated(ask(messages=turns, system=system))["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "reasoning_content": "I must look.",
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"x":"é"}'},
                },
                {"id": "b", "type": "function", "function": {"name": "look", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {
            "role": "tool",
            "tool_call_id": "b",
            "content": [{"type": "text", "text": "Error: "}, {"type": "text", "text": "two"}],
        },
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]


def test_fields_become_those_of_a_chat() -> None:
    body = ask(
        stop_sequences=["END"], temperature=0.5, top_p=0.9, top_k=7, stream=True,
        metadata={"user_id": "u"}, tools=[{**TOOL, "type": "custom", "cache_control": EPHEMERAL}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True}, service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 2048}, cache_control=EPHEMERAL,
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {}}},
    )  # fmt: skip
    function = {"name": "look", "description": "Looks up.", "parameters": {"type": "object"}}
    assert translated(body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 9,
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "user": "u",
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": True},
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {}},
        },
    }


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "look"}, {"type": "function", "function": {"name": "look"}}),
    ],
)
def test_tool_choices(choice: dict[str, Any], expected: Any) -> None:
    assert translated(ask(tools=[TOOL], tool_choice=choice))["tool_choice"] == expected


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (ask(surprise=1), "'surprise'"),
        (ask([{"type": "text", "text": "a", "surprise": 1}]), "'messages[0].content[0].surprise'"),
        (ask([{"type": "image", "source": {}}]), "image is not accepted"),
        (
            ask([{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}]),
            "'messages[0].content[0].content[0]': image",
        ),
        (
            ask(
                messages=[
                    {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
                    {"role": "user", "content": "go on"},
                ]
            ),
            "redacted_thinking is not accepted: the guard can't read it",
        ),
        (ask(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "tools[0].type"),
        (ask(tool_choice={"type": "auto"}), "no tools"),
        (ask(tools=[TOOL], tool_choice={"type": "tool"}), "tool_choice.name"),
        (ask(container="c"), "nothing is kept"),
        (ask(mcp_servers=[]), "mcp_servers"),
        (ask(temperature=3), "temperature"),
        (ask(max_tokens=0), "max_tokens"),
        ({"model": "m", "messages": [{"role": "user", "content": "a"}]}, "max_tokens"),
        (ask(messages=[{"role": "system", "content": "a"}]), "messages[0].role"),
        (ask("the <prompt_embeds> token"), "reserved token"),
    ],
)
def test_what_is_not_declared_is_refused_by_name(body: dict[str, Any], said: str) -> None:
    assert said in refusal(body)


def test_an_answer_is_not_continued() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "can't be continued" in refusal(ask(messages=turns))


def test_json_that_two_parsers_could_read_differently_is_refused() -> None:
    for body in (b'{"model":"m","model":"n"}', b"[]", b"\xff", b'{"a":NaN}', b'{"a":"\\ud800"}'):
        with pytest.raises(RequestError, match="not acceptable JSON"):
            Messages().read(body)


def test_counting_asks_for_one_token() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "system": "b"}
    chat = json.loads(CountTokens().read(json.dumps(body).encode())[0])
    assert chat["max_tokens"] == 1 and len(chat["messages"]) == 2
    with pytest.raises(RequestError, match="max_tokens"):
        CountTokens().read(json.dumps(ask()).encode())


# --- Answers --------------------------------------------------------------------------------------


def whole(message: dict[str, Any], reason: str, stop: Any = None) -> list[bytes]:
    choice = {"index": 0, "message": message, "finish_reason": reason, "stop_reason": stop}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    head = {"id": "chatcmpl-a-b", "model": "m", "created": 1}
    return [json.dumps({**head, "choices": [choice], "usage": usage}).encode()]


def pieces(*deltas: dict[str, Any], reason: str = "stop") -> list[bytes]:
    """Return a stream as vLLM writes it; its usage comes last, in an event of its own."""
    found = []
    for number, delta in enumerate(deltas, start=1):
        ended = reason if number == len(deltas) else None
        choice = {"index": 0, "delta": delta, "finish_reason": ended}
        usage = {"prompt_tokens": 7, "completion_tokens": number}
        found.append({"id": "chatcmpl-a-b", "model": "m", "choices": [choice], "usage": usage})
    found.append({**found[-1], "choices": []})
    return [b"data: " + json.dumps(e).encode() + b"\n\n" for e in found] + [b"data: [DONE]\n\n"]


def call(name: str | None, arguments: str, index: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": name and f"id-{index}", "function": function}


def post(body: dict[str, Any], **engine: Any) -> httpx.Response:
    with live(**engine) as app:
        return app.http.post(PATH, json=body)


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        ("stop", None, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("stop", 42, ("end_turn", None)),
        ("length", None, ("max_tokens", None)),
        ("content_filter", None, ("refusal", None)),
    ],
)
def test_a_whole_answer(reason: str, stop: Any, expected: tuple[str, str | None]) -> None:
    body = ask(stop_sequences=["END"])
    response = post(body, pieces=whole({"content": "Hi", "reasoning": "Hm"}, reason, stop))
    assert response.headers["content-length"] == str(len(response.content))
    assert response.json() == {
        "id": "msg_a-b",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "Hm", "signature": ""},
            {"type": "text", "text": "Hi", "citations": None},
        ],
        "stop_reason": expected[0],
        "stop_sequence": expected[1],
        "usage": {
            "input_tokens": 7,
            "cache_creation_input_tokens": None,
            "cache_read_input_tokens": None,
            "output_tokens": 3,
        },
    }


def test_a_whole_answer_with_calls() -> None:
    calls = [call("look", '{"x":1}'), call("look", '{"x', 1), call("look", "", 2)]
    answer = post(ask(), pieces=whole({"content": None, "tool_calls": calls}, "tool_calls")).json()
    assert answer["stop_reason"] == "tool_use"
    inputs = [{"x": 1}, {"unparsed_arguments": '{"x'}, {}]
    assert [block["input"] for block in answer["content"]] == inputs
    assert [block["id"] for block in answer["content"]] == ["id-0", "id-1", "id-2"]


def events_of(text: str) -> list[dict[str, Any]]:
    found = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_stream_has_a_block_after_another() -> None:
    parts = pieces(
        {"role": "assistant", "content": ""},
        {"reasoning": "Hm"},
        {"content": "H"},
        {"content": "i"},
        {"tool_calls": [call("look", "")]},
        {"tool_calls": [call(None, '{"x":')]},
        {"tool_calls": [call(None, "1}"), call("peek", "{}", 1)]},
        {"content": ""},
        reason="tool_calls",
    )
    cut = b"".join(parts)
    crumbs = [cut[i : i + 7] for i in range(0, len(cut), 7)]
    told = [post(ask(stream=True), pieces=p, headers=SSE).text for p in (parts, crumbs)]
    assert told[0] == told[1], "where the engine cuts must not matter"
    events = events_of(told[0])
    assert events[0]["message"]["usage"]["input_tokens"] == 7
    assert events[0]["message"]["id"] == "msg_a-b"
    text, look, peek = ({"type": t} for t in ("text", "tool_use", "tool_use"))
    text |= {"text": "", "citations": None}
    look |= {"id": "id-0", "name": "look", "input": {}}
    peek |= {"id": "id-1", "name": "peek", "input": {}}
    thinking = {"type": "thinking", "thinking": "", "signature": ""}
    assert [
        (e["type"], e.get("index"), e.get("content_block") or e.get("delta")) for e in events[1:-2]
    ] == [
        ("content_block_start", 0, thinking),
        ("content_block_delta", 0, {"type": "thinking_delta", "thinking": "Hm"}),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, text),
        ("content_block_delta", 1, {"type": "text_delta", "text": "H"}),
        ("content_block_delta", 1, {"type": "text_delta", "text": "i"}),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, look),
        ("content_block_delta", 2, {"type": "input_json_delta", "partial_json": '{"x":'}),
        ("content_block_delta", 2, {"type": "input_json_delta", "partial_json": "1}"}),
        ("content_block_stop", 2, None),
        ("content_block_start", 3, peek),
        ("content_block_delta", 3, {"type": "input_json_delta", "partial_json": "{}"}),
        ("content_block_stop", 3, None),
    ]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 8
    assert events[-1] == {"type": "message_stop"}


@pytest.mark.parametrize(
    "end",
    [
        [b'data: {"error": {"message": "it fell over", "code": 500}}\n\n', b"data: [DONE]\n\n"],
        [EngineError("gone")],
        [b'data: {"cho', EngineError("gone")],
        [b"data: what?\n\n"],
        [],
    ],
)
@pytest.mark.parametrize("guarded", [True, False])
def test_a_stream_that_breaks_off_says_so(end: list[Any], guarded: bool) -> None:
    begun = pieces({"content": "H"}, {"content": "i"})[:1]
    options = ServerOptions(output_guard=guarded)
    response = post(ask(stream=True), options=options, pieces=begun + end, headers=SSE)
    events = events_of(response.text)
    kinds = [event["type"] for event in events]
    assert events[-1]["error"]["type"] == "api_error"
    told = ["message_start", "content_block_start", "content_block_delta"]
    assert kinds[:-1] == told[: len(kinds) - 1]
    assert guarded or len(kinds) == 4, "without hold-back all that came must have left"


def test_the_official_client_raises_for_a_stream_that_breaks_off() -> None:
    broken = [*pieces({"content": "H"}, {"content": "i"})[:1], EngineError("gone")]
    with live(pieces=broken, headers=SSE) as app:
        client = anthropic.Anthropic(base_url=app.url, api_key="k", max_retries=0)
        stream = client.messages.create(**ask(stream=True))
        with pytest.raises(anthropic.APIStatusError, match="model failed"):
            list(stream)


def test_a_whole_answer_that_breaks_off_is_an_error() -> None:
    options = ServerOptions(output_guard=False)  # which may find such an answer out before us
    kind = [("content-type", "application/json")]
    for broken in ([b'{"choices": [', EngineError("gone")], [b"{}"], [b"nonsense"]):
        response = post(ask(), options=options, pieces=broken, headers=kind)
        assert response.status_code == 502
        assert response.json()["error"]["type"] == "api_error"


# --- Errors, keys, and those who leave ------------------------------------------------------------


def error_of(response: httpx.Response) -> dict[str, str]:
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    assert set(body) == {"type", "error"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return dict(body["error"])


def test_errors_have_anthropics_format(app: Live) -> None:
    for body, status, kind in (
        (ask(surprise=1), 400, "invalid_request_error"),
        (ask("a forbidden word"), 400, "invalid_request_error"),
        (ask("a broken guard"), 503, "api_error"),
        (ask(model="unheard-of"), 404, "not_found_error"),
        (ask("x" * 2_100_000), 413, "request_too_large"),
    ):
        response = app.http.post(PATH, json=body)
        assert (response.status_code, error_of(response)["type"]) == (status, kind)
    text = app.http.post(PATH, content=b"{}", headers={"content-type": "text/plain"})
    assert (text.status_code, error_of(text)["type"]) == (415, "invalid_request_error")


def test_an_engines_error_is_translated() -> None:
    said = b'{"error": {"message": "too long", "type": "BadRequestError", "code": 400}}'
    response = post(ask(), status=400, pieces=[said], headers=[("x-request-id", "r")])
    assert error_of_any(response) == {"type": "invalid_request_error", "message": "too long"}
    other = post(ask(), status=422, pieces=[b'{"detail": ["what"]}'])
    assert error_of_any(other)["type"] == "invalid_request_error"


def error_of_any(response: httpx.Response) -> dict[str, str]:
    return dict(response.json()["error"])


def test_a_body_that_grows_beyond_the_limit_is_refused_at_once() -> None:
    with live(ServerOptions(max_body_bytes=1000)) as app:
        body = ask([{"type": "text", "text": "é" * 3}] * 20)
        raw = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(raw) < 1000
        turns = [*body["messages"], *({"role": "user", "content": "é" * 5},) * 3]
        raw = json.dumps(ask(messages=turns), ensure_ascii=False, separators=(",", ":")).encode()
        response = app.http.post(PATH, content=raw, headers={"content-type": "application/json"})
        assert response.status_code in (200, 413)
        long = app.http.post(PATH, json=ask("x" * 1000))
        assert (long.status_code, error_of(long)["type"]) == (413, "request_too_large")


def test_keys_may_come_in_anthropics_header() -> None:
    with live(ServerOptions(api_keys=("secret",))) as app:
        wrong = app.http.post(PATH, json=ask())
        assert (wrong.status_code, error_of(wrong)["type"]) == (401, "authentication_error")
        for headers, status in (
            ({"x-api-key": "secret"}, 200),
            ({"x-api-key": "other"}, 401),
            ({"authorization": "Bearer secret"}, 200),
            ({"authorization": "Bearer other", "x-api-key": "secret"}, 401),
        ):
            assert app.http.post(PATH, json=ask(), headers=headers).status_code == status
        assert app.http.post(CHAT, json={}, headers={"x-api-key": "other"}).status_code == 401
        client = anthropic.Anthropic(base_url=app.url, api_key="secret", max_retries=0)
        assert client.messages.create(**ask()).content[0].type == "text"
        assert app.engine.posts[-1][0] == CHAT


def test_a_body_is_not_read_before_the_key_is_accepted() -> None:
    with live(ServerOptions(api_keys=("secret",))) as app:
        response = app.http.post(PATH, json=ask(surprise=1))
        assert response.status_code == 401


def test_a_client_that_leaves_ends_the_generation() -> None:
    gate = threading.Event()
    begun = pieces({"content": "H"}, {"content": "i"})[:1]
    with live(ServerOptions(output_guard=False), pieces=[*begun, gate], headers=SSE) as app:
        with app.http.stream("POST", PATH, json=ask(stream=True)) as response:
            assert next(response.iter_bytes()).startswith(b"event: message_start")
        assert app.engine.cancelled.wait(10)
        gate.set()
        assert eventually(lambda: 'status="499"' in app.http.get("/metrics").text)


def test_flagged_and_plain_requests_go_the_same_way(app: Live) -> None:
    app.engine.posts.clear()
    answers = [app.http.post(PATH, json=ask(f"a {word}")) for word in ("lizard", "wizard")]
    assert [path for path, _, _ in app.engine.posts] == [CHAT, CHAT]
    plain, flagged = (json.loads(body) for _, body, _ in app.engine.posts)
    assert flagged["messages"][0]["content"][0]["type"] == "prompt_embeds"
    assert flagged.keys() == plain.keys()
    assert answers[0].content == answers[1].content
    assert answers[0].headers.keys() == answers[1].headers.keys()


def test_the_official_client_counts_tokens() -> None:
    with live(pieces=whole({"content": "x"}, "length")) as app:
        client = anthropic.Anthropic(base_url=app.url, api_key="k", max_retries=0)
        turns: Any = [{"role": "user", "content": "a"}]
        assert client.messages.count_tokens(model="m", messages=turns).input_tokens == 7
