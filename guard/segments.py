"""The texts of a parsed request, with their places: the view of `docs/architecture.md`.

Free JSON (tool parameters, answer schemas, template arguments) becomes one segment per object, its
keys and values a line each: a schema has hundreds of short strings, and read together they also
show what was split over several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from guard.schema import (
    SCHEMA_WORDS,
    TEMPLATE_SWITCHES,
    AssistantMessage,
    ChatBody,
    CompletionBody,
    FunctionCall,
    Message,
    NamedToolChoice,
    RefusalPart,
    SchemaFormat,
    TextPart,
    ToolMessage,
)
from guard.types import Segment

DetokeniseField = Callable[[Sequence[int], str], str]
"""Turns token ids of a field (named for errors) into text."""


def strings(value: Any) -> Iterator[str]:
    """Yield every string of a JSON value, keys included, in the order of the document."""
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            stack.extend(reversed(item))
        elif isinstance(item, dict):
            for key, inner in reversed(item.items()):
                stack += (inner, key)


def chat_segments(body: ChatBody, detokenise: DetokeniseField) -> Iterator[Segment]:
    """Yield the texts of a chat request."""
    for index, message in enumerate(body.messages):
        yield from _message(index, message)
    for index, tool in enumerate(body.tools or ()):
        path = f"tools/{index}/function"
        yield Segment(f"{path}/name", tool.function.name)
        yield from _text(f"{path}/description", tool.function.description)
        yield from _free(f"{path}/parameters", tool.function.parameters, SCHEMA_WORDS)
    if isinstance(body.tool_choice, NamedToolChoice):
        yield Segment("tool_choice/function/name", body.tool_choice.function.name)
    yield from _free("chat_template_kwargs", body.chat_template_kwargs, TEMPLATE_SWITCHES)
    yield from _common(body, detokenise)


def prompt_segments(body: CompletionBody, detokenise: DetokeniseField) -> Iterator[Segment]:
    """Yield the texts of a completion request."""
    prompt: Any = body.prompt
    batch = isinstance(prompt, list) and not isinstance(prompt[0], int)
    for index, item in enumerate(prompt if batch else [prompt]):
        path = f"prompt/{index}" if batch else "prompt"
        yield Segment(path, item if isinstance(item, str) else detokenise(item, "prompt"), index)
    yield from _common(body, detokenise)


def _message(index: int, message: Message) -> Iterator[Segment]:
    path = f"messages/{index}"
    content = message.content
    if isinstance(content, str):
        yield Segment(f"{path}/content", content, index)
    for number, part in enumerate(content if isinstance(content, list) else ()):
        place = f"{path}/content/{number}"
        if isinstance(part, TextPart):
            yield Segment(f"{place}/text", part.text, index)
        elif isinstance(part, RefusalPart):
            yield Segment(f"{place}/refusal", part.refusal, index)
    yield from _text(f"{path}/name", message.name)
    if isinstance(message, ToolMessage):
        yield from _text(f"{path}/tool_call_id", message.tool_call_id)
    if isinstance(message, AssistantMessage):
        yield from _assistant(path, message)


def _assistant(path: str, message: AssistantMessage) -> Iterator[Segment]:
    yield from _text(f"{path}/refusal", message.refusal)
    yield from _text(f"{path}/reasoning", message.reasoning)
    yield from _text(f"{path}/reasoning_content", message.reasoning_content)
    for number, call in enumerate(message.tool_calls or ()):
        # Some templates print the id.
        yield Segment(f"{path}/tool_calls/{number}/id", call.id)
        yield from _call(f"{path}/tool_calls/{number}/function", call.function)
    if message.function_call is not None:
        yield from _call(f"{path}/function_call", message.function_call)


def _call(path: str, call: FunctionCall) -> Iterator[Segment]:
    yield Segment(f"{path}/name", call.name)
    yield Segment(f"{path}/arguments", call.arguments)


def _common(body: ChatBody | CompletionBody, detokenise: DetokeniseField) -> Iterator[Segment]:
    if isinstance(body.response_format, SchemaFormat):
        schema = body.response_format.json_schema
        path = "response_format/json_schema"
        yield Segment(f"{path}/name", schema.name)
        yield from _text(f"{path}/description", schema.description)
        yield from _free(f"{path}/schema", schema.schema, SCHEMA_WORDS)
    if isinstance(body.stop, str):
        yield Segment("stop", body.stop)
    else:
        for index, text in enumerate(body.stop or ()):
            yield Segment(f"stop/{index}", text)
    # Tokens that an answer is pushed towards are words put into its mouth.
    if favoured := [int(key) for key, bias in (body.logit_bias or {}).items() if bias > 0]:
        yield Segment("logit_bias", detokenise(favoured, "logit_bias"))


def _text(path: str, text: str | None) -> Iterator[Segment]:
    if text is not None:
        yield Segment(path, text)


def _free(path: str, value: Any, known: frozenset[str]) -> Iterator[Segment]:
    lines = [text for text in strings(value) if text not in known]
    if lines:
        yield Segment(path, "\n".join(lines))
