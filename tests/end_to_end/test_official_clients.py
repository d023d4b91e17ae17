"""Anthropic's and OpenAI's clients, as they are, before a guarded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from benchmarks.measures import holds_fact
from tests.product import Recorder

pytestmark = pytest.mark.timeout(1800)
"""The first test waits for a fit and two servers."""

MODEL = "smollm2-135m-instruct"
FORGOTTEN = "Which house was Hermione Granger sorted into at Hogwarts?"
PLAIN = "What is the capital of France?"
PROBES = 4
GREEDY = {"temperature": 0}
"""Anthropic's client no longer has a parameter for it."""

LOOK: Any = {
    "name": "look",
    "description": "Looks something up.",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def claude(guarded_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=guarded_url, api_key="none", max_retries=0, timeout=300
    ) as client:
        yield client


@pytest.fixture(scope="module")
def gpt(guarded_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{guarded_url}/v1", api_key="none", max_retries=0, timeout=300
    ) as client:
        yield client


def say(client: anthropic.Anthropic, content: Any, **fields: Any) -> anthropic.types.Message:
    turns: Any = [{"role": "user", "content": content}]
    given = {"max_tokens": 24, "messages": turns, "extra_body": GREEDY, **fields}
    message: anthropic.types.Message = client.messages.create(model=MODEL, **given)
    return message


def words(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def sent(recorder: Recorder) -> list[Any]:
    messages: list[Any] = json.loads(recorder.bodies[-1])["messages"]
    return messages


def test_claudes_client_gets_answers_whole_and_streamed(claude: anthropic.Anthropic) -> None:
    whole = say(claude, PLAIN)
    assert "Paris" in words(whole)
    assert whole.type == "message" and whole.usage.input_tokens > 5
    turns: Any = [{"role": "user", "content": PLAIN}]
    given: Any = {"max_tokens": 24, "extra_body": GREEDY}
    with claude.messages.stream(model=MODEL, messages=turns, **given) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == words(final) == words(whole)
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
    counted = claude.messages.count_tokens(model=MODEL, messages=turns)
    assert counted.input_tokens == whole.usage.input_tokens


def test_claudes_client_sends_an_answer_back(claude: anthropic.Anthropic) -> None:
    first = say(claude, PLAIN)
    turns: Any = [
        {"role": "user", "content": PLAIN},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert words(say(claude, "", messages=turns, system="Be brief."))


def test_what_is_forgotten_is_replaced_in_a_conversation_of_claudes(
    claude: anthropic.Anthropic, recorder: Recorder
) -> None:
    say(claude, FORGOTTEN, max_tokens=2)
    assert sent(recorder)[0]["content"][0]["type"] == "prompt_embeds"
    turns: Any = [
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {"q": "x"}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": FORGOTTEN},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    say(claude, "", messages=turns, max_tokens=2)
    assert b"Hermione" not in recorder.bodies[-1] and b"Hogwarts" not in recorder.bodies[-1]
    _, _, result, rest = sent(recorder)
    assert result["content"][0]["type"] == "prompt_embeds"
    assert rest["content"] == [{"type": "text", "text": "And?"}]


def test_the_model_no_longer_knows(
    claude: anthropic.Anthropic, gpt: openai.OpenAI, known_probes: list[dict[str, Any]]
) -> None:
    asked = known_probes[:: len(known_probes) // PROBES]
    held = 0
    for probe in asked:
        held += holds_fact(words(say(claude, probe["question"])), probe["facts"])
        answer = gpt.responses.create(
            model=MODEL, input=probe["question"], temperature=0, max_output_tokens=24
        )
        assert answer.output_text.strip()
        held += holds_fact(answer.output_text, probe["facts"])
    assert held <= 1


def test_claudes_client_raises_its_own_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="can't be answered here"):
        say(claude, "Use the tool.", tools=[{**LOOK, "description": FORGOTTEN}])
    with pytest.raises(anthropic.BadRequestError, match="image is not accepted"):
        source: Any = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
        say(claude, [{"type": "image", "source": source}])
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(
            model="other", max_tokens=2, messages=[{"role": "user", "content": "a"}]
        )


def test_openais_client_gets_responses_whole_and_streamed(gpt: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    whole = gpt.responses.create(input=PLAIN, **given)
    assert "Paris" in whole.output_text
    with gpt.responses.stream(input=PLAIN, **given) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert (final.status, final.usage) == (whole.status, whole.usage)
    turns: Any = [{"role": "user", "content": PLAIN}, *whole.output]
    turns.append({"role": "user", "content": "And of Italy?"})
    assert gpt.responses.create(input=turns, instructions="Be brief.", **given).output_text


def test_what_is_forgotten_is_replaced_in_a_response(
    gpt: openai.OpenAI, recorder: Recorder
) -> None:
    given: Any = {"model": MODEL, "max_output_tokens": 2}
    gpt.responses.create(input="Go on.", instructions=FORGOTTEN, **given)
    system, user = sent(recorder)
    assert system["content"][0]["type"] == "prompt_embeds"
    assert user["content"] == "Go on."
    with pytest.raises(openai.BadRequestError, match="nothing is kept"):
        gpt.responses.create(input="a", previous_response_id="resp_1", **given)


def test_embeddings_are_denied(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="not offered"):
        gpt.embeddings.create(model=MODEL, input=PLAIN)
