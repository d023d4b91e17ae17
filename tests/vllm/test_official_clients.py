"""OpenAI's and Anthropic's clients, as they are, before a guarded vLLM and before vLLM alone.

Beside tests/end_to_end/test_official_clients.py, where the embedded model answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from server.app import create_app
from server.engines.vllm import VllmEngine
from server.types import ServerOptions
from tests.server.proxy_fakes import running

MODEL = "smollm2"
PLAIN = "What is the capital of France?"
BEGUN = "The capital of France is"
FORGOTTEN = "By whom were the Harry Potter stories written?"
FACT = "Rowling"
REFUSED = "can't be answered here"
TOKENS = 24
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
NAMED: Any = {
    "name": "look",
    "description": "Looks a city up.",
    "parameters": SCHEMA,
    "strict": True,
}


@dataclass(frozen=True)
class Clients:
    """Clients of one address."""

    gpt: openai.OpenAI
    claude: anthropic.Anthropic


def clients(url: str) -> Clients:
    more: Any = {"api_key": "none", "max_retries": 0, "timeout": 300}
    return Clients(
        openai.OpenAI(base_url=f"{url}/v1", **more), anthropic.Anthropic(base_url=url, **more)
    )


@pytest.fixture(scope="module")
def bare(vllm_url: str) -> Iterator[Clients]:
    made = clients(vllm_url)
    with made.gpt, made.claude:
        yield made


@pytest.fixture(scope="module")
def guarded(
    vllm_url: str,
    small_bundle: BundleStore,
    guard_key: GuardKey,
    prompts: ModelPrompts,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Clients]:
    ledger = Ledger(tmp_path_factory.mktemp("clients") / "ledger.jsonl", guard_key)
    guard = load_guard(
        store=small_bundle, key=guard_key, prompts=prompts, ledger=ledger, images="pass"
    )
    options = ServerOptions(embeddings="pass", images="pass")
    app = create_app(guard, VllmEngine(vllm_url), options)
    with running(app) as url:
        made = clients(url)
        with made.gpt, made.claude:
            yield made


# --- Ways to ask ---------------------------------------------------------------------------------


def turns(text: Any) -> Any:
    return [{"role": "user", "content": text}]


def chat(of: Clients, text: str, **fields: Any) -> str:
    given: Any = {"temperature": 0, "max_tokens": TOKENS, **fields}
    answer = of.gpt.chat.completions.create(model=MODEL, messages=turns(text), **given)
    return str(answer.choices[0].message.content)


def chat_streamed(of: Clients, text: str, **fields: Any) -> str:
    given: Any = {"temperature": 0, "max_tokens": TOKENS, **fields}
    stream = of.gpt.chat.completions.create(model=MODEL, messages=turns(text), stream=True, **given)
    return "".join(event.choices[0].delta.content or "" for event in stream)


def completion(of: Clients, text: str) -> str:
    answer = of.gpt.completions.create(model=MODEL, prompt=text, temperature=0, max_tokens=TOKENS)
    return answer.choices[0].text


def completion_streamed(of: Clients, text: str) -> str:
    stream = of.gpt.completions.create(
        model=MODEL, prompt=text, temperature=0, max_tokens=TOKENS, stream=True
    )
    return "".join(event.choices[0].text for event in stream)


def response(of: Clients, text: str) -> str:
    given: Any = {"temperature": 0, "max_output_tokens": TOKENS}
    return of.gpt.responses.create(model=MODEL, input=text, **given).output_text


def response_streamed(of: Clients, text: str) -> str:
    given: Any = {"temperature": 0, "max_output_tokens": TOKENS}
    with of.gpt.responses.stream(model=MODEL, input=text, **given) as stream:
        events = list(stream)
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == said
    return said


def message(of: Clients, text: str) -> str:
    given: Any = {"max_tokens": TOKENS, "extra_body": {"temperature": 0}}
    answer = of.claude.messages.create(model=MODEL, messages=turns(text), **given)
    return "".join(block.text for block in answer.content if block.type == "text")


def message_streamed(of: Clients, text: str) -> str:
    given: Any = {"max_tokens": TOKENS, "extra_body": {"temperature": 0}}
    with of.claude.messages.stream(model=MODEL, messages=turns(text), **given) as stream:
        return "".join(stream.text_stream)


WAYS: list[Callable[[Clients, str], str]] = [
    chat, chat_streamed, completion, completion_streamed,
    response, response_streamed, message, message_streamed,
]  # fmt: skip
CHATS = [way for way in WAYS if "completion" not in way.__name__]


# --- Answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_question_gets_vllms_own_answer(
    way: Callable[[Clients, str], str], guarded: Clients, bare: Clients
) -> None:
    text = PLAIN if way in CHATS else BEGUN
    known = (chat if way in CHATS else completion)(bare, text)
    assert "Paris" in known
    assert way(guarded, text) == known


def test_the_model_knows_what_it_is_asked_to_forget(bare: Clients) -> None:
    assert FACT in chat(bare, FORGOTTEN)


@pytest.mark.parametrize("way", CHATS)
def test_what_is_forgotten_is_not_told(
    way: Callable[[Clients, str], str], guarded: Clients
) -> None:
    said = way(guarded, FORGOTTEN)
    assert said.strip()
    assert FACT not in said


def test_usage_and_several_answers_are_vllms_own(guarded: Clients, bare: Clients) -> None:
    given: Any = {"model": MODEL, "messages": turns(PLAIN), "max_tokens": 8, "seed": 7}
    given |= {"n": 2, "temperature": 1.0, "logprobs": True, "top_logprobs": 2}
    ours, own = (one.gpt.chat.completions.create(**given) for one in (guarded, bare))
    assert (ours.usage, ours.model) == (own.usage, own.model)
    assert [c.message.content for c in ours.choices] == [c.message.content for c in own.choices]
    for choice, other in zip(ours.choices, own.choices, strict=True):
        assert choice.logprobs is not None and choice.logprobs == other.logprobs
    stream = guarded.gpt.chat.completions.create(
        **given, stream=True, stream_options={"include_usage": True}
    )
    assert [event.usage for event in stream if event.usage] == [own.usage]


def test_prompts_come_as_lists_and_as_tokens(guarded: Clients, prompts: ModelPrompts) -> None:
    given: Any = {"model": MODEL, "temperature": 0, "max_tokens": 4}
    asked = ["The capital of France is", "Once upon a time"]
    ids = [list(prompts.prompt_tokens(text).ids) for text in asked]
    texts, tokens = (
        [choice.text for choice in guarded.gpt.completions.create(prompt=prompt, **given).choices]
        for prompt in (asked, ids)
    )
    assert texts == tokens and "Paris" in texts[0]


def test_an_answer_keeps_to_a_schema(guarded: Clients) -> None:
    named = {"name": "place", "schema": SCHEMA, "strict": True}
    said = chat(guarded, PLAIN, response_format={"type": "json_schema", "json_schema": named})
    assert set(json.loads(said)) == {"city"}


# --- Tools ---------------------------------------------------------------------------------------


def tool_whole(of: Clients, text: str = PLAIN) -> tuple[str, Any]:
    given: Any = {"temperature": 0, "max_tokens": 96}
    given["tools"] = [{"type": "function", "function": NAMED}]
    given["tool_choice"] = {"type": "function", "function": {"name": "look"}}
    answer = of.gpt.chat.completions.create(model=MODEL, messages=turns(text), **given)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    return call.function.name, json.loads(call.function.arguments)


def tool_streamed(of: Clients, text: str = PLAIN) -> tuple[str, Any]:
    given: Any = {"temperature": 0, "max_tokens": 96, "stream": True}
    given["tools"] = [{"type": "function", "function": NAMED}]
    given["tool_choice"] = {"type": "function", "function": {"name": "look"}}
    names, arguments = "", ""
    for event in of.gpt.chat.completions.create(model=MODEL, messages=turns(text), **given):
        for call in event.choices[0].delta.tool_calls or ():
            names += call.function.name or ""
            arguments += call.function.arguments or ""
    return names, json.loads(arguments)


def tool_response(of: Clients, text: str = PLAIN) -> tuple[str, Any]:
    given: Any = {"temperature": 0, "max_output_tokens": 96}
    given["tools"] = [{"type": "function", **NAMED}]
    given["tool_choice"] = {"type": "function", "name": "look"}
    (call,) = of.gpt.responses.create(model=MODEL, input=text, **given).output
    assert call.type == "function_call"
    return call.name, json.loads(call.arguments)


def tool_message(of: Clients, text: str = PLAIN) -> tuple[str, Any]:
    own = {
        "name": "look",
        "description": NAMED["description"],
        "input_schema": SCHEMA,
        "strict": True,
    }
    given: Any = {"max_tokens": 96, "extra_body": {"temperature": 0}, "tools": [own]}
    given["tool_choice"] = {"type": "tool", "name": "look"}
    answer = of.claude.messages.create(model=MODEL, messages=turns(text), **given)
    (call,) = answer.content
    assert (call.type, answer.stop_reason) == ("tool_use", "tool_use")
    return call.name, call.input


def tool_message_streamed(of: Clients, text: str = PLAIN) -> tuple[str, Any]:
    own = {
        "name": "look",
        "description": NAMED["description"],
        "input_schema": SCHEMA,
        "strict": True,
    }
    given: Any = {"max_tokens": 96, "extra_body": {"temperature": 0}, "tools": [own]}
    given["tool_choice"] = {"type": "tool", "name": "look"}
    with of.claude.messages.stream(model=MODEL, messages=turns(text), **given) as stream:
        (call,) = stream.get_final_message().content
    assert call.type == "tool_use"
    return call.name, call.input


@pytest.mark.parametrize(
    "way", [tool_whole, tool_streamed, tool_response, tool_message, tool_message_streamed]
)
def test_a_forced_call_is_vllms_own(
    way: Callable[[Clients], tuple[str, Any]], guarded: Clients, bare: Clients
) -> None:
    name, arguments = way(guarded)
    assert (name, set(arguments)) == ("look", {"city"})
    assert (name, arguments) == tool_whole(bare)


@pytest.mark.parametrize("way", [tool_whole, tool_streamed, tool_message])
def test_a_forced_call_tells_nothing_of_what_is_forgotten(
    way: Callable[..., tuple[str, Any]], guarded: Clients
) -> None:
    name, arguments = way(guarded, FORGOTTEN)
    assert name == "look"
    assert FACT.casefold() not in json.dumps(arguments).casefold()


def test_results_of_tools_go_back(guarded: Clients) -> None:
    call = {"name": "look", "arguments": '{"city":"Paris"}'}
    said: Any = [
        *turns(PLAIN),
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "a", "content": "Paris has two million inhabitants."},
        *turns("How many live there?"),
    ]
    given: Any = {"model": MODEL, "messages": said, "max_tokens": TOKENS, "temperature": 0}
    assert guarded.gpt.chat.completions.create(**given).choices[0].message.content
    used = {"type": "tool_use", "id": "a", "name": "look", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": FORGOTTEN}
    said = [
        *turns("Look it up."),
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result, {"type": "text", "text": "Answer that."}]},
    ]
    answer = guarded.claude.messages.create(
        model=MODEL, messages=said, max_tokens=TOKENS, extra_body={"temperature": 0}
    )
    (block,) = answer.content
    assert block.type == "text" and block.text.strip() and FACT not in block.text


def test_an_answer_is_sent_back_as_it_came(guarded: Clients) -> None:
    given: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": TOKENS}
    first = guarded.gpt.responses.create(input=PLAIN, **given)
    again: Any = [*turns(PLAIN), *first.output, *turns("And of Italy?")]
    assert guarded.gpt.responses.create(input=again, instructions="Be brief.", **given).output_text
    begun = guarded.claude.messages.create(model=MODEL, messages=turns(PLAIN), max_tokens=TOKENS)
    counted = guarded.claude.messages.count_tokens(model=MODEL, messages=turns(PLAIN))
    assert counted.input_tokens == begun.usage.input_tokens
    said: Any = [*turns(PLAIN), {"role": "assistant", "content": begun.content}, *turns("And?")]
    assert guarded.claude.messages.create(
        model=MODEL, messages=said, max_tokens=TOKENS, system="Be brief."
    ).content


# --- Models, embeddings, errors ------------------------------------------------------------------


def test_models_and_embeddings(guarded: Clients, bare: Clients) -> None:
    assert [model.id for model in guarded.gpt.models.list()] == [MODEL]
    with pytest.raises(openai.APIStatusError) as own:  # this vLLM serves none
        bare.gpt.embeddings.create(model=MODEL, input=PLAIN)
    with pytest.raises(openai.APIStatusError) as ours:
        guarded.gpt.embeddings.create(model=MODEL, input=PLAIN)
    assert ours.value.status_code == own.value.status_code
    with pytest.raises(openai.BadRequestError, match=REFUSED):
        guarded.gpt.embeddings.create(model=MODEL, input=[PLAIN, FORGOTTEN])


def test_the_clients_raise_their_own_errors(guarded: Clients) -> None:
    gpt, claude = guarded.gpt, guarded.claude
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        gpt.chat.completions.create(model="other", messages=turns(PLAIN))
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(model="other", max_tokens=2, messages=turns(PLAIN))
    with pytest.raises(openai.BadRequestError, match="nothing is kept"):
        gpt.responses.create(model=MODEL, input=PLAIN, previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="put the documents into a message"):
        chat(guarded, PLAIN, extra_body={"documents": [{"text": FORGOTTEN}]})
    schema = {"name": "a", "schema": {"type": "object", "description": FORGOTTEN}}
    for way in (chat, chat_streamed):
        with pytest.raises(openai.BadRequestError, match=REFUSED):
            way(guarded, PLAIN, response_format={"type": "json_schema", "json_schema": schema})


def test_images_reach_vllm_beside_a_plain_question_only(guarded: Clients) -> None:
    """The model reads text alone, and vLLM says so."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    for text, says in ((PLAIN, "image|multimodal"), (FORGOTTEN, REFUSED)):
        said: Any = [part, {"type": "text", "text": text}]
        with pytest.raises(openai.BadRequestError, match=says):
            guarded.gpt.chat.completions.create(model=MODEL, messages=turns(said))
        said = [{"type": "image", "source": source}, {"type": "text", "text": text}]
        with pytest.raises(anthropic.BadRequestError, match=says):
            guarded.claude.messages.create(model=MODEL, messages=turns(said), max_tokens=2)


@pytest.mark.parametrize("text", [PLAIN, FORGOTTEN])
def test_errors_of_vllm_itself_come_through(guarded: Clients, text: str) -> None:
    """Its context is 2048 tokens; it says so of its own."""
    long: Any = turns(text + " Please!" * 3000)
    with pytest.raises(openai.BadRequestError) as caught:
        guarded.gpt.chat.completions.create(model=MODEL, messages=long)
    assert "embed" not in str(caught.value).lower()
    with pytest.raises(anthropic.BadRequestError) as other:
        guarded.claude.messages.create(model=MODEL, messages=long, max_tokens=8)
    assert "embed" not in str(other.value).lower()
