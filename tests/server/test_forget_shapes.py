"""A forget question in any place of any dialect is flagged or refused, whatever is around it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from guard.prompts import ModelPrompts
from tests.conftest import EXAMPLE
from tests.server.judged import Judged, Make
from tests.server.test_dialect_guard import COUNTED, EMBEDDED, MESSAGES, RESPONSES
from tests.server.test_dialect_guard import after as messages_after
from tests.server.test_dialect_guard import message as messages_body

QUESTIONS = [
    json.loads(line)["question"] for line in (EXAMPLE / "forget.jsonl").read_text().splitlines()
]
PLAIN = "Which river flows through the middle of Vienna in Austria?"
BENIGN = ("How do I bake bread at home?", "Thanks, that helped.", "Name three colours.", PLAIN)
EXAMPLES = 8


# --- Chat and completions; the other dialects' shapes are those of test_dialect_guard.py ----------


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [*messages, user("Please go on.")], **fields}


def last(content: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [user(content)]}


def called(**call: str) -> dict[str, Any]:
    about = {"name": "look", "arguments": "{}", **call}
    return chat(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": about}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "done"},
    )


def tool(**fields: Any) -> dict[str, Any]:
    return chat(tools=[{"type": "function", "function": {"name": "look", **fields}}])


def schema(**about: Any) -> dict[str, Any]:
    made = {"name": "n", "schema": {"type": "object", "properties": {"a": about}}}
    return chat(response_format={"type": "json_schema", "json_schema": made})


def halves(text: str) -> tuple[str, str]:
    words = text.split(" ")
    return " ".join(words[: len(words) // 2]) + " ", " ".join(words[len(words) // 2 :])


CHAT: dict[str, Make] = {
    "string": last,
    "one part": lambda text: last([part(text)]),
    "second part": lambda text: last([part("Tell me:"), part(text)]),
    "first part": lambda text: last([part(text), part("Be brief.")]),
    "over two parts": lambda text: last([part(half) for half in halves(text)]),
    "over two turns": lambda text: {
        "model": "m",
        "messages": [user(halves(text)[0]), user(halves(text)[1])],
    },
    "earlier turn": lambda text: chat(user(text), {"role": "assistant", "content": "I see."}),
    "system": lambda text: chat({"role": "system", "content": text}),
    "system part": lambda text: chat({"role": "system", "content": [part("Hm."), part(text)]}),
    "developer": lambda text: chat({"role": "developer", "content": text}),
    "developer part": lambda text: chat({"role": "developer", "content": [part(text)]}),
    "assistant": lambda text: chat({"role": "assistant", "content": text}),
    "assistant part": lambda text: chat({"role": "assistant", "content": [part(text)]}),
    "refusal": lambda text: chat({"role": "assistant", "content": None, "refusal": text}),
    "refusal part": lambda text: chat(
        {"role": "assistant", "content": [{"type": "refusal", "refusal": text}]}
    ),
    "reasoning": lambda text: chat({"role": "assistant", "content": "Ah.", "reasoning": text}),
    "reasoning_content": lambda text: chat(
        {"role": "assistant", "content": "Ah.", "reasoning_content": text}
    ),
    "tool": lambda text: chat({"role": "tool", "tool_call_id": "a", "content": text}),
    "tool parts": lambda text: chat(
        {"role": "tool", "tool_call_id": "a", "content": [part("1:"), part(text)]}
    ),
    "tool JSON": lambda text: chat(
        {"role": "tool", "tool_call_id": "a", "content": json.dumps({"rows": [{"q": text}]})}
    ),
    "function": lambda text: chat({"role": "function", "name": "look", "content": text}),
    "arguments": lambda text: called(arguments=json.dumps({"about": [text]})),
    "function_call": lambda text: chat(
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "look", "arguments": json.dumps({"about": text})},
        }
    ),
    "tool description": lambda text: tool(description=text),
    "tool parameters": lambda text: tool(
        parameters={"type": "object", "properties": {"a": {"anyOf": [{"description": text}]}}}
    ),
    "tool parameters, key": lambda text: tool(
        parameters={"type": "object", "properties": {text: {"type": "string"}}}
    ),
    "format description": lambda text: schema(description=text),
    "format choice": lambda text: schema(enum=["yes", text]),
    "format constant": lambda text: schema(const=text),
    "stop": lambda text: chat(stop=text),
    "stops": lambda text: chat(stop=["END", text]),
    "template argument": lambda text: chat(chat_template_kwargs={"persona": {"is": [text]}}),
}

COMPLETIONS: dict[str, Make] = {
    "string": lambda text: {"prompt": text},
    "list": lambda text: {"prompt": [text]},
    "second of a list": lambda text: {"prompt": ["Bread is", text]},
    "first of a list": lambda text: {"prompt": [text, "Bread is", "Rivers are"]},
    "stop": lambda text: {"prompt": "Bread is", "stop": ["END", text]},
}

MORE_MESSAGES: dict[str, Make] = {
    "only block": lambda text: messages_body([part(text)]),
    "over two blocks": lambda text: messages_body([part(half) for half in halves(text)]),
    "tool_result blocks": lambda text: messages_after(
        [part("I look.")], [part("1:"), part("2:"), part(text)]
    ),
    "tool_result JSON": lambda text: messages_after([part("I look.")], json.dumps([{"q": text}])),
    "tool_use, deep": lambda text: messages_after(
        [{"type": "tool_use", "id": "a", "name": "look", "input": {"a": [{"b": [text]}]}}]
    ),
    "tool_use, key": lambda text: messages_after(
        [{"type": "tool_use", "id": "a", "name": "look", "input": {text: 1}}]
    ),
}

SHAPES: dict[str, dict[str, Make]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/messages": MESSAGES | MORE_MESSAGES,
    "/v1/messages/count_tokens": COUNTED,
    "/v1/responses": RESPONSES,
    "/v1/embeddings": EMBEDDED,
}
PLACES = [(path, name) for path, shapes in SHAPES.items() for name in shapes]


# --- The property ---------------------------------------------------------------------------------

_around = st.sampled_from(["{}", "{}\n", "  {}", "Please: {} Thanks.", "{} Be brief.", "So: {}"])
_more = st.fixed_dictionaries(
    {}, optional={"temperature": st.sampled_from([0, 0.5]), "stream": st.booleans()}
)
_turns = st.lists(st.sampled_from(BENIGN), max_size=2)
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def dressed(path: str, body: dict[str, Any], more: dict[str, Any], turns: list[str]) -> bytes:
    """Put further fields and an ordinary conversation around what a shape made."""
    body = {**body, "model": "m"}
    if path.startswith("/v1/messages/") or path == "/v1/embeddings":
        more = {}
    earlier = [
        one for text in turns for one in (user(text), {"role": "assistant", "content": "I see."})
    ]
    for name in ("messages", "input"):
        if path != "/v1/embeddings" and isinstance(body.get(name), list):
            body[name] = [*earlier, *body[name]]
    return json.dumps({**body, **more}).encode()


@pytest.fixture(scope="module")
def known(judged: Judged) -> list[str]:
    """The questions that are found where they stand alone; how many, is not the matter here."""
    found = []
    for question in QUESTIONS:
        judged.send("/v1/chat/completions", json.dumps(last(question)).encode())
        if judged.treatment() != "pass":
            found.append(question)
    assert len(found) > len(QUESTIONS) // 2
    return found


@pytest.mark.parametrize(("path", "name"), PLACES)
@SETTINGS
@given(data=st.data())
def test_a_forget_question_is_flagged_or_refused(
    judged: Judged, known: list[str], path: str, name: str, data: st.DataObject
) -> None:
    question = data.draw(st.sampled_from(known))
    text = data.draw(_around).format(question)
    body = dressed(path, SHAPES[path][name](text), data.draw(_more), data.draw(_turns))
    status, answer = judged.send(path, body)
    assert judged.treatment() not in ("pass", "undecided"), (body, answer)
    assert not judged.shows(question)
    refused = b"can't be answered here" in answer
    assert status == 200 or (status == 400 and refused), answer


@SETTINGS
@given(data=st.data())
def test_token_ids_of_a_forget_question_are_flagged(
    judged: Judged, known: list[str], prompts: ModelPrompts, data: st.DataObject
) -> None:
    question = data.draw(st.sampled_from(known))
    ids = list(prompts.prompt_tokens(question, add_special_tokens=data.draw(st.booleans())).ids)
    other = list(prompts.prompt_tokens(PLAIN, add_special_tokens=False).ids)
    prompt: Any = ids
    if data.draw(st.booleans()):
        prompt = [other, other]
        prompt.insert(data.draw(st.integers(0, 2)), ids)
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    status, answer = judged.send("/v1/completions", body)
    assert judged.treatment() not in ("pass", "undecided"), answer
    assert status == 200 or b"can't be answered here" in answer
    assert all(str(ids)[1:-1] not in str(json.loads(one)) for one in judged.seen)


@SETTINGS
@given(data=st.data())
def test_tokens_that_a_request_favours_are_flagged(
    judged: Judged, known: list[str], prompts: ModelPrompts, data: st.DataObject
) -> None:
    ids = prompts.prompt_tokens(data.draw(st.sampled_from(known)), add_special_tokens=False).ids
    assume(len(set(ids)) == len(ids))  # a key can't stand twice
    body = {**last(PLAIN), "logit_bias": {str(one): 50 for one in ids}}
    judged.send("/v1/chat/completions", json.dumps(body).encode())
    assert judged.treatment() not in ("pass", "undecided")
    assert all("logit_bias" not in json.loads(one) for one in judged.seen)


@pytest.mark.parametrize("path", SHAPES)
def test_another_question_in_the_same_shapes_passes(judged: Judged, path: str) -> None:
    ended: Counter[str] = Counter()
    for make in SHAPES[path].values():
        status, answer = judged.send(path, dressed(path, make(PLAIN), {}, []))
        assert status == 200, answer
        ended[judged.treatment()] += 1
    assert ended == {"pass": len(SHAPES[path])}
