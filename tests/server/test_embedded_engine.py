"""The embedded engine as the proxy uses it: bodies in, bodies and events out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from guard.embeds import embeds_part
from guard.errors import EngineBusyError, EngineUnavailableError
from server.engines.base import Engine, EngineResponse
from server.engines.embedded import EmbeddedEngine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(smollm2_dir: Path, runner: asyncio.Runner) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(smollm2_dir, "smollm2", max_queue=1, threads=2)
    runner.run(engine.start())
    yield engine
    runner.run(engine.close())


def chat(question: str = "What is the capital of France?", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {
        "model": "smollm2",
        "messages": messages,
        "max_tokens": 12,
        "temperature": 0,
        **fields,
    }


def completion(prompt: Any = "One, two, three,", **fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "prompt": prompt, "max_tokens": 6, "temperature": 0, **fields}


class Client:
    """Posts bodies and reads answers, one after the other."""

    def __init__(self, engine: Engine, runner: asyncio.Runner) -> None:
        self._engine, self._runner = engine, runner

    def post(
        self, body: Any, path: str = CHAT, headers: dict[str, str] | None = None
    ) -> tuple[EngineResponse, bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def go() -> tuple[EngineResponse, bytes]:
            response = await self._engine.post(path, raw, headers or {})
            return response, await response.read()

        return self._runner.run(go())

    def answer(self, body: Any, path: str = CHAT, **kwargs: Any) -> dict[str, Any]:
        response, raw = self.post(body, path, **kwargs)
        assert response.status == 200, raw
        decoded: dict[str, Any] = json.loads(raw)
        return decoded

    def refusal(self, body: Any, path: str = CHAT) -> tuple[int, dict[str, Any]]:
        response, raw = self.post(body, path)
        assert ("content-type", "application/json") in response.headers
        error: dict[str, Any] = json.loads(raw)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status, error

    def events(self, body: dict[str, Any], path: str = CHAT) -> list[dict[str, Any]]:
        response, raw = self.post({**body, "stream": True}, path)
        assert dict(response.headers)["content-type"].startswith("text/event-stream")
        *events, done, end = raw.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture
def client(engine: EmbeddedEngine, runner: asyncio.Runner) -> Client:
    return Client(engine, runner)


def text_of(answer: dict[str, Any], index: int = 0) -> str:
    choice = answer["choices"][index]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


# --- Shapes --------------------------------------------------------------------------------------


def test_a_chat_answer_has_openais_shape(client: Client) -> None:
    answer = client.answer(chat(logprobs=True, top_logprobs=2))
    ChatCompletion.model_validate(answer, strict=True)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "smollm2"
    assert "Paris" in text_of(answer)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == usage["completion_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)


def test_a_completion_has_openais_shape(client: Client) -> None:
    answer = client.answer(completion(logprobs=1), COMPLETIONS)
    Completion.model_validate(answer, strict=True)
    assert answer["id"].startswith("cmpl-")
    choice = answer["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"][:2] == [0, len(choice["logprobs"]["tokens"][0])]
    assert answer["usage"]["completion_tokens"] == 6
    assert choice["finish_reason"] == "length"


def test_a_stream_tells_the_role_the_text_the_end_and_the_usage(client: Client) -> None:
    body = chat("Tell me a very short story with an emoji 😀.", max_tokens=20)
    events = client.events({**body, "stream_options": {"include_usage": True}})
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({event["id"] for event in events}) == 1
    *tokens, usage = events[1:]
    finish = [event["choices"][0]["finish_reason"] for event in tokens]
    assert finish[-1] in ("stop", "length")
    assert set(finish[:-1]) == {None}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(tokens)
    streamed = "".join(event["choices"][0]["delta"]["content"] for event in tokens)
    assert streamed == text_of(client.answer(body))
    assert "usage" not in tokens[0]


def test_a_completion_streams_the_same_text(client: Client) -> None:
    body = completion(["One, two,", "A, b,"], n=2, temperature=0.8, seed=11)
    events = client.events(body, COMPLETIONS)
    whole = client.answer(body, COMPLETIONS)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    for index in range(4):
        pieces = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == text_of(whole, index)
        assert pieces[-1]["finish_reason"] == "length"


# --- What a request may ask for ------------------------------------------------------------------


def test_a_stop_string_over_several_tokens_never_shows(client: Client) -> None:
    full = text_of(client.answer(chat()))
    stop = full[5:14]
    assert stop in full
    answer = client.answer(chat(stop=[stop]))
    assert text_of(answer) == full[: full.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == stop
    events = client.events(chat(stop=[stop]))
    shown = "".join(event["choices"][0]["delta"]["content"] for event in events)
    assert shown == text_of(answer)


def test_a_seed_repeats_an_answer_and_n_gives_several(client: Client) -> None:
    body = chat(temperature=1.3, top_p=0.95, seed=42, n=3, max_tokens=8)
    first, second = client.answer(body), client.answer(body)
    texts = [text_of(first, index) for index in range(3)]
    assert texts == [text_of(second, index) for index in range(3)]
    assert len(set(texts)) > 1
    assert first["usage"]["completion_tokens"] <= 24


def test_embeddings_stand_for_text_in_every_role(client: Client, engine: EmbeddedEngine) -> None:
    model = engine.model

    def part(text: str) -> dict[str, str]:
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        return {"type": "prompt_embeds", "data": embeds_part(model.embed_tokens(ids))}

    turns = [
        ("system", "Answer briefly."),
        ("user", "What is the capital of France?"),
        ("assistant", "Paris."),
        ("user", "And of Italy?"),
    ]
    plain = [{"role": role, "content": text} for role, text in turns]
    spliced = [{"role": role, "content": [part(text)]} for role, text in turns]
    expected = client.answer({**chat(), "messages": plain})
    found = client.answer({**chat(), "messages": spliced})
    assert text_of(found) == text_of(expected)
    assert found["usage"] == expected["usage"]
    mixed = [{"role": "user", "content": [{"type": "text", "text": "Say:"}, part("hello")]}]
    joined = client.answer({**chat(), "messages": mixed})
    assert (
        joined["usage"]["prompt_tokens"]
        == (client.answer(chat("Say:\nhello"))["usage"]["prompt_tokens"])
    )


def test_completions_take_text_tokens_and_embeddings(
    client: Client, engine: EmbeddedEngine
) -> None:
    ids = engine.model.tokenizer.encode("One, two, three,")
    text = text_of(client.answer(completion(), COMPLETIONS))
    assert text_of(client.answer(completion(ids), COMPLETIONS)) == text
    assert text_of(client.answer(completion([ids, ids]), COMPLETIONS), 1) == text
    body = completion()
    del body["prompt"]
    encoded = embeds_part(engine.model.embed_tokens(ids))
    for embeds in (encoded, [encoded]):
        answer = client.answer({**body, "prompt_embeds": embeds}, COMPLETIONS)
        assert text_of(answer) == text


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not valid"),
        (b'{"model": "smollm2", "messages": "x"}', 400, "$.messages"),
        (b"[" * 5000, 400, "not valid"),
        (chat(model="other"), 404, "`other` does not exist"),
        (chat(temperature=-1), 400, "$.temperature"),
        (chat(top_p=0), 400, "$.top_p"),
        (chat(logit_bias={"99999999": 1}), 400, "99999999"),
        (chat(top_logprobs=2), 400, "needs logprobs"),
        (chat(stream_options={"include_usage": True}), 400, "needs stream"),
        (chat(response_format={"type": "json_object"}), 400, "response_format"),
        (chat(tool_choice="required"), 400, "tool_choice"),
        (chat("tell me of <prompt_embeds> now"), 400, "reserved placeholder"),
        (chat(messages=[{"role": "<prompt_embeds>", "content": "x"}]), 400, "reserved"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "image_url"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "prompt_embeds", "data": "x"}]}]),
            400,
            "prompt_embeds cannot be read",
        ),
        (chat(chat_template_kwargs={"tokenize": True}), 400, "chat_template_kwargs"),
        (chat("word " * 9000), 400, "maximum context length is 8192"),
        (chat(max_tokens=8190), 400, "maximum context length is 8192"),
    ],
)
def test_bad_chat_requests_are_answers(client: Client, body: Any, status: int, words: str) -> None:
    found, error = client.refusal(body)
    assert found == status
    assert words in error["message"]


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, "x"], [49152], ["<prompt_embeds>"], [-1]])
def test_bad_prompts_are_answers(client: Client, prompt: Any) -> None:
    status, error = client.refusal(completion(prompt), COMPLETIONS)
    assert status == 400
    assert error["param"].startswith("prompt")


def test_error_codes_are_openais(client: Client) -> None:
    assert client.refusal(chat(model="other"))[1]["code"] == "model_not_found"
    assert client.refusal(chat(max_tokens=9000))[1]["code"] == "context_length_exceeded"
    assert client.refusal(chat(), "/v1/embeddings")[0] == 404


def test_embeddings_of_another_model_are_refused(client: Client) -> None:
    data = embeds_part(np.zeros((2, 8), np.float32))
    body = chat(messages=[{"role": "user", "content": [{"type": "prompt_embeds", "data": data}]}])
    status, error = client.refusal(body)
    assert status == 400
    assert "must be (tokens, 576)" in error["message"]


# --- One at a time -------------------------------------------------------------------------------


LONG = json.dumps(chat("Tell a long story.", max_tokens=4000, ignore_eos=True, stream=True))


async def idle(engine: EmbeddedEngine) -> None:
    """Wait until nothing runs or waits."""
    worker = engine._worker
    assert worker is not None
    while worker.depth:  # noqa: ASYNC110 (the worker has no event of its own)
        await asyncio.sleep(0.01)


def test_the_queue_is_bounded_and_a_closed_answer_makes_room(
    engine: EmbeddedEngine, runner: asyncio.Runner
) -> None:
    async def go() -> None:
        running = await engine.post(CHAT, LONG.encode(), {})
        assert b'"role":"assistant"' in await anext(running.chunks)
        waiting = await engine.post(CHAT, LONG.encode(), {})
        with pytest.raises(EngineBusyError) as busy:
            await engine.post(CHAT, LONG.encode(), {})
        assert busy.value.retry_after_s >= 1
        await waiting.aclose()
        await running.aclose()
        await idle(engine)
        response = await engine.post(CHAT, json.dumps(chat(max_tokens=2)).encode(), {})
        assert response.status == 200

    runner.run(asyncio.wait_for(go(), 60))


def test_a_cancelled_request_frees_the_engine(
    engine: EmbeddedEngine, runner: asyncio.Runner
) -> None:
    async def go() -> None:
        body = json.dumps(chat("Tell a long story.", max_tokens=4000, ignore_eos=True)).encode()
        waiting = asyncio.create_task(engine.post(CHAT, body, {}))
        await asyncio.sleep(0.5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await idle(engine)

    runner.run(asyncio.wait_for(go(), 60))


def test_an_answer_that_nobody_reads_can_be_closed(
    engine: EmbeddedEngine, runner: asyncio.Runner
) -> None:
    async def go() -> None:
        response = await engine.post(CHAT, LONG.encode(), {})
        await response.aclose()
        await idle(engine)

    runner.run(asyncio.wait_for(go(), 60))


def test_a_close_ends_what_runs_and_refuses_what_comes(smollm2_dir: Path) -> None:
    async def go() -> None:
        engine = EmbeddedEngine(smollm2_dir)
        with pytest.raises(EngineUnavailableError, match="not started"):
            await engine.health()
        await engine.start()
        await engine.start()
        await engine.health()
        assert await engine.models() == [smollm2_dir.name]
        body = {**json.loads(LONG), "model": smollm2_dir.name}
        running = await engine.post(CHAT, json.dumps(body).encode(), {})
        await anext(running.chunks)
        await engine.close()
        rest = await running.read()
        assert b'"error"' in rest
        with pytest.raises(EngineUnavailableError):
            await engine.post(CHAT, b"{}", {})
        await engine.close()

    asyncio.run(asyncio.wait_for(go(), 120))
