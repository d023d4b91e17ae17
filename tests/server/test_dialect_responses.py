"""OpenAI's responses: what they become, and how answers and errors come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from guard.errors import EngineError, RequestError
from guard.request import parse_request
from server.dialects.responses import Responses
from server.types import ServerOptions
from tests.server.proxy_fakes import CHAT, SSE, Live, error_of, live
from tests.server.test_dialect_messages import call, events_of, pieces, whole

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "look", "description": "Looks up.", "parameters": {}}


def ask(given: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": given, **fields}


def translated(body: dict[str, Any]) -> dict[str, Any]:
    """Translate, and hold the outcome against what the guard accepts."""
    chat, _ = Responses().read(json.dumps(body).encode())
    assert parse_request(CHAT, chat)
    found: dict[str, Any] = json.loads(chat)
    return found


def refusal(body: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        Responses().read(json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


@pytest.fixture(scope="module")
def app() -> Iterator[Live]:
    with live() as parts:
        yield parts


# --- Requests -------------------------------------------------------------------------------------


def test_items_become_turns() -> None:
    answered = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [
            {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []},
            {"type": "refusal", "refusal": "Not there."},
        ],
    }
    given = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Look."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}],
         "content": [{"type": "reasoning_text", "text": "I must look."}],
         "encrypted_content": None},
        answered,
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call", "call_id": "b", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "one"},
        {"type": "function_call_output", "call_id": "b",
         "output": [{"type": "input_text", "text": "two"}]},
        {"role": "assistant", "content": "Two."},
        {"role": "assistant", "content": "Or one."},
        {"role": "user", "content": "Which?"},
    ]  # fmt: skip
    calls = [
        {"id": i, "type": "function", "function": {"name": "look", "arguments": "{}"}} for i in "ab"
    ]
    said = [{"type": "text", "text": "I look."}, {"type": "refusal", "refusal": "Not there."}]
    assert translated(ask(given, instructions="Be brief."))["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Look."}]},
        {
            "role": "assistant",
            "content": said,
            "reasoning_content": "Hm\nI must look.",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "Two."},
        {"role": "assistant", "content": "Or one."},
        {"role": "user", "content": "Which?"},
    ]


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    body = ask(
        max_output_tokens=9, temperature=0.5, top_p=0.9, tools=[TOOL], tool_choice="required",
        parallel_tool_calls=False, text={"format": schema}, reasoning={"effort": "low"},
        stream=True, stream_options={"include_obfuscation": False}, user="u", store=True,
        metadata={"a": "b"}, truncation="disabled", include=["reasoning.encrypted_content"],
        background=False, previous_response_id=None, top_logprobs=0, service_tier="auto",
        safety_identifier="s", prompt_cache_key="k",
    )  # fmt: skip
    function = {"name": "look", "description": "Looks up.", "parameters": {}}
    assert translated(body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        "reasoning_effort": "low",
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "u",
    }
    named = ask(tools=[TOOL], tool_choice={"type": "function", "name": "look"})
    forced = {"type": "function", "function": {"name": "look"}}
    assert translated(named)["tool_choice"] == forced
    json_object = translated(ask(text={"format": {"type": "json_object"}}))
    assert json_object["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (ask(surprise=1), "surprise", "not among the declared"),
        (ask([{"role": "user", "content": "a", "surprise": 1}]), "input[0].surprise", "declared"),
        (ask(background=True), "background", "nothing is kept"),
        (ask(background=0), "background", ""),
        (ask(previous_response_id="r"), "previous_response_id", "nothing is kept"),
        (ask(conversation="c"), "conversation", "nothing is kept"),
        (ask(prompt={"id": "p"}), "prompt", "templates"),
        (ask(truncation="auto"), "truncation", "shorten"),
        (ask(top_logprobs=3), "top_logprobs", "likelihoods"),
        (ask(include=["message.output_text.logprobs"]), "include[0]", "nothing can be added"),
        (ask(tools=[{"type": "web_search"}]), "tools[0].type", "only functions"),
        (ask(tools=[{"type": "mcp", "server_url": "u"}]), "tools[0].type", "only functions"),
        (ask(max_tool_calls=1), "max_tool_calls", "services|service"),
        (ask(reasoning={"summary": "auto"}), "reasoning.summary", "as the model wrote it"),
        (ask(metadata={"a": "x" * 513}), "metadata[...]", "length"),
        (ask(temperature=3), "temperature", "2"),
        (ask([]), "input", "length"),
        ({"model": "m"}, "input", "required"),
        (
            ask([{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]),
            "input[0].content[0].type",
            "input_image is not accepted",
        ),
        (ask([{"type": "item_reference", "id": "i"}]), "input[0].type", "nothing is kept"),
        (
            ask([{"type": "reasoning", "summary": [], "encrypted_content": "x"}]),
            "input[0].encrypted_content",
            "can't read",
        ),
        (
            ask([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]),
            "input[0].content[0].type",
            "only the assistant",
        ),
    ],
)
def test_what_is_not_declared_is_refused_by_name(
    body: dict[str, Any], param: str, said: str
) -> None:
    error = refusal(body)
    assert error.param == param
    assert any(word in str(error) for word in said.split("|")), str(error)


# --- Answers --------------------------------------------------------------------------------------


def post(body: dict[str, Any], **engine: Any) -> httpx.Response:
    with live(**engine) as app:
        return app.http.post(PATH, json=body)


def test_a_whole_answer() -> None:
    calls = [call("look", '{"x":1}')]
    message = {"content": "Hi", "reasoning": "Hm", "tool_calls": calls}
    metadata = {"a": "b"}
    body = ask(metadata=metadata, store=True, tools=[TOOL], instructions="Be brief.")
    answer = post(body, pieces=whole(message, "tool_calls")).json()
    text = {"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}
    assert answer["output"] == [
        {
            "id": "rs_a-b0000",
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm"}],
        },
        {
            "id": "msg_a-b0001",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [text],
        },
        {
            "id": "fc_a-b0002",
            "type": "function_call",
            "status": "completed",
            "call_id": "id-0",
            "name": "look",
            "arguments": '{"x":1}',
        },
    ]
    assert (answer["id"], answer["object"], answer["status"]) == (
        "resp_a-b",
        "response",
        "completed",
    )
    assert (answer["metadata"], answer["store"], answer["instructions"]) == (
        metadata,
        False,
        "Be brief.",
    )
    assert answer["usage"]["total_tokens"] == 10
    again = answer["output"] + [{"type": "function_call_output", "call_id": "id-0", "output": "x"}]
    assert [m["role"] for m in translated(ask(again))["messages"]] == ["assistant", "tool"]


def test_an_answer_that_ran_out_of_tokens_is_incomplete() -> None:
    answer = post(ask(), pieces=whole({"content": "Hi"}, "length")).json()
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    parts = pieces({"content": "Hi"}, {"content": ""}, reason="length")
    events = events_of(post(ask(stream=True), pieces=parts, headers=SSE).text)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_stream_has_an_item_after_another() -> None:
    parts = pieces(
        {"role": "assistant", "content": ""},
        {"reasoning": "Hm"},
        {"content": "H"},
        {"content": "i"},
        {"tool_calls": [call("look", "")]},
        {"tool_calls": [call(None, '{"x":')]},
        {"tool_calls": [call(None, "1}")]},
        {"content": ""},
        reason="tool_calls",
    )
    cut = b"".join(parts)
    crumbs = [cut[i : i + 7] for i in range(0, len(cut), 7)]
    told = [post(ask(stream=True), pieces=p, headers=SSE).text for p in (parts, crumbs)]
    assert told[0] == told[1], "where the engine cuts must not matter"
    events = events_of(told[0])
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [(e["type"].removeprefix("response."), e.get("output_index")) for e in events] == [
        ("created", None),
        ("in_progress", None),
        ("output_item.added", 0),
        ("content_part.added", 0),
        ("reasoning_text.delta", 0),
        ("reasoning_text.done", 0),
        ("content_part.done", 0),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("content_part.added", 1),
        ("output_text.delta", 1),
        ("output_text.delta", 1),
        ("output_text.done", 1),
        ("content_part.done", 1),
        ("output_item.done", 1),
        ("output_item.added", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2),
        ("output_item.done", 2),
        ("completed", None),
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    assert {item["status"] for item in done} == {"completed"}
    assert events[-1]["response"]["usage"]["output_tokens"] == 8


@pytest.mark.parametrize(
    "end",
    [
        [b'data: {"error": {"message": "it fell over", "code": 500}}\n\n', b"data: [DONE]\n\n"],
        [b'data: {"cho', EngineError("gone")],
        [],
    ],
)
def test_a_stream_that_breaks_off_says_so(end: list[Any]) -> None:
    begun = pieces({"content": "H"}, {"content": "i"})[:1]
    options = ServerOptions(output_guard=False)
    response = post(ask(stream=True), options=options, pieces=begun + end, headers=SSE)
    *_, last = events_of(response.text)
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["output"][0]["status"] == "incomplete"


# --- Errors, and the official client --------------------------------------------------------------


def test_errors_are_openais(app: Live) -> None:
    for body, status, code in (
        (ask(surprise=1), 400, "unknown_parameter"),
        (ask("a forbidden word"), 400, "content_refused"),
        (ask("a broken guard"), 503, "guard_failed"),
        (ask(model="unheard-of"), 404, "model_not_found"),
        (ask("x" * 2_100_000), 413, "request_too_large"),
    ):
        response = app.http.post(PATH, json=body)
        assert (response.status_code, error_of(response)["code"]) == (status, code)


def test_the_official_client_reads_whole_answers_and_streams(app: Live) -> None:
    response = app.openai.responses.create(**ask())
    assert (response.output_text, response.status) == ("Hello", "completed")
    with app.openai.responses.stream(model="m", input="hello") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "Hello"
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    with pytest.raises(openai.BadRequestError, match="nothing is kept"):
        app.openai.responses.create(**ask(previous_response_id="r"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("conversation", {"id": "conv_1"}),
        ("background", True),
        ("input", [{"type": "item_reference", "id": "msg_1"}]),
    ],
)
def test_what_an_engine_would_remember_is_refused_and_the_error_says_what_to_send(
    app: Live, name: str, value: Any
) -> None:
    app.engine.posts.clear()
    response = app.http.post(PATH, json=ask(**{name: value}) if name != "input" else ask(value))
    error = error_of(response)
    assert (response.status_code, error["param"].split("[")[0]) == (400, name)
    assert "send the whole conversation as input" in error["message"]
    assert not app.engine.posts


@pytest.mark.parametrize("value", [True, False, None])
def test_nothing_is_stored_whatever_is_asked_for(app: Live, value: bool | None) -> None:
    app.engine.posts.clear()
    answer = app.http.post(PATH, json=ask(store=value)).json()
    assert answer["store"] is False
    ((path, body, _),) = app.engine.posts
    assert (path, "store" in json.loads(body)) == (CHAT, False)
    for method, place in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("GET", "/input_items"),
    ):
        assert app.http.request(method, f"{PATH}/{answer['id']}{place}").status_code == 404
    assert len(app.engine.posts) == 1


def test_flagged_and_plain_requests_go_the_same_way(app: Live) -> None:
    app.engine.posts.clear()
    answers = [app.http.post(PATH, json=ask(f"a {word}")) for word in ("lizard", "wizard")]
    assert [path for path, _, _ in app.engine.posts] == [CHAT, CHAT]
    plain, flagged = (json.loads(body) for _, body, _ in app.engine.posts)
    assert flagged["messages"][0]["content"][0]["type"] == "prompt_embeds"
    assert flagged.keys() == plain.keys()
    assert answers[0].content == answers[1].content
    assert answers[0].headers.keys() == answers[1].headers.keys()
