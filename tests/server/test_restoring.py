from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from guard.rewrite import StandIn
from server.engines.base import EngineResponse
from server.restoring import restored

NAMES = (StandIn(("Clara", "Weber"), "Hsiao Yun-Hwa"),)


def response(body: bytes, kind: str, size: int = 7) -> EngineResponse:
    async def chunks() -> AsyncIterator[bytes]:
        for place in range(0, len(body), size):
            yield body[place : place + size]

    headers = [("content-type", kind), ("content-length", str(len(body)))]
    return EngineResponse(200, headers, chunks())


async def read(answer: EngineResponse) -> bytes:
    return b"".join([chunk async for chunk in answer.chunks])


def events(*bodies: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies)


def delta(text: str | None, reason: str | None = None, index: int = 0) -> dict[str, Any]:
    content = {} if text is None else {"content": text}
    return {"choices": [{"index": index, "delta": content, "finish_reason": reason}]}


def parsed(stream: bytes) -> list[Any]:
    lines = [line[6:] for line in stream.split(b"\n\n") if line and line != b"data: [DONE]"]
    return [json.loads(line)["choices"][0] for line in lines]


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def rewritten(answer: EngineResponse) -> bytes:
    async def go() -> bytes:
        return await read(await restored(answer, NAMES))

    found: bytes = run(go())
    return found


def test_a_whole_answer_names_whom_was_asked_for() -> None:
    message = {"role": "assistant", "content": "Clara Weber lives. Weber's cat."}
    body = json.dumps({"id": "x", "choices": [{"message": message}], "usage": {"n": 3}}).encode()
    answer = run(restored(response(body, "application/json"), NAMES))
    sent = run(read(answer))
    assert dict(answer.headers)["content-length"] == str(len(sent)) != str(len(body))
    found = json.loads(sent)
    assert found["choices"][0]["message"]["content"] == "Hsiao Yun-Hwa lives. Yun-Hwa's cat."
    assert found["usage"] == {"n": 3}


@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_a_streamed_answer_keeps_its_events(size: int) -> None:
    texts = ["I know", " Cl", "ara", " Web", "er", " well"]
    stream = events(*map(delta, texts), delta(None, "stop")) + b"data: [DONE]\n\n"
    answer = rewritten(response(stream, "text/event-stream; charset=utf-8", size))
    found = parsed(answer)
    assert len(found) == len(texts) + 1
    said = "".join(choice["delta"].get("content", "") for choice in found)
    assert said == "I know Hsiao Yun-Hwa well"
    assert all(choice["delta"]["content"] for choice in found[:-1])  # none tells of the name
    assert answer.endswith(b"data: [DONE]\n\n")


def test_what_is_held_at_the_end_goes_out_before_it() -> None:
    stream = events(delta("by Clara"), delta(" Weber"), delta(None, "length"))
    found = parsed(rewritten(response(stream, "text/event-stream")))
    assert [choice["delta"] for choice in found] == [
        {"content": "by "}, {"content": "Hsiao Yun-Hwa"}, {},
    ]  # fmt: skip
    assert found[-1]["finish_reason"] == "length"
    stream = events(delta("by Clara"), delta(None, "stop"))
    found = parsed(rewritten(response(stream, "text/event-stream")))
    assert [choice["delta"] for choice in found] == [{"content": "by "}, {"content": "Hsiao"}]


@pytest.mark.parametrize("end", ["", None, " ends"])
def test_no_event_loses_its_text_to_a_name(end: str | None) -> None:
    texts = ["by", " Clara", " We", "ber", "'s", " fri", "end", " Clara", " Web", "er"]
    stream = events(*map(delta, texts), delta(end, "stop")) + b"data: [DONE]\n\n"
    found = parsed(rewritten(response(stream, "text/event-stream")))
    said = [choice["delta"].get("content") for choice in found]
    name = "Hsiao Yun-Hwa"
    assert "".join(part or "" for part in said) == f"by {name}'s friend {name}{end or ''}"
    assert len(found) == len(texts) + 1 and all(said[:-1])
    assert said[-1].endswith(end) if end else said[-1] == end


def test_what_stands_behind_a_waiting_event_keeps_its_place() -> None:
    stream = events(delta("Clara")) + b": ping\n\n" + events(delta("Now", None, 1))
    stream += events(delta(" Weber"), delta(" is", "stop"), delta(None, "stop", 1))
    sent = rewritten(response(stream, "text/event-stream"))
    kept = [part for part in sent.split(b"\n\n") if part]
    assert [b"ping" in part for part in kept] == [False, True, False, False, False, False]
    told = parsed(b"\n\n".join(part for part in kept if b"ping" not in part))
    assert [choice["index"] for choice in told] == [0, 1, 0, 0, 1]


def test_a_stream_that_breaks_off_leaves_its_events() -> None:
    sent = rewritten(response(events(delta("I know"), delta(" Clara")), "text/event-stream"))
    assert [choice["delta"]["content"] for choice in parsed(sent)] == ["I know", " "]


def test_choices_are_kept_apart() -> None:
    stream = events(
        delta("Clara", None, 0),
        delta("Weber", None, 1),
        delta(" Weber", "stop", 0),
        delta(" is", "stop", 1),
    )
    found = parsed(rewritten(response(stream, "text/event-stream")))
    said = {0: "", 1: ""}
    for choice in found:
        said[choice["index"]] += choice["delta"].get("content", "")
    assert said == {0: "Hsiao Yun-Hwa", 1: "Yun-Hwa is"}


def test_tool_arguments_and_tokens_are_put_back() -> None:
    call = {"function": {"name": "find", "arguments": '{"who": "Clara Weber"}'}}
    tokens = [{"token": " Weber", "bytes": [32], "top_logprobs": [{"token": "Clara"}]}]
    choice = {"message": {"tool_calls": [call]}, "logprobs": {"content": tokens}}
    body = json.dumps({"choices": [choice]}).encode()
    found = json.loads(rewritten(response(body, "application/json")))
    arguments = found["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"who": "Hsiao Yun-Hwa"}'
    token = found["choices"][0]["logprobs"]["content"][0]
    assert (token["token"], bytes(token["bytes"]), token["top_logprobs"][0]["token"]) == (
        " Yun-Hwa",
        b" Yun-Hwa",
        "Hsiao",
    )


def test_without_names_the_answer_is_the_same_object() -> None:
    answer = response(b"{}", "application/json")
    assert run(restored(answer, ())) is answer
