"""OpenAI's `/v1/responses` as a chat completion; nothing is kept between requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from starlette.types import Scope

from guard.errors import RequestError
from guard.request import ImagePolicy, decode_body
from server.dialects.responses_answer import ResponsesAnswer
from server.dialects.responses_schema import (
    HARMLESS,
    REFUSED,
    REFUSED_PARTS,
    CallItem,
    InputImage,
    InputText,
    Item,
    JsonFormat,
    MessageItem,
    NamedToolChoice,
    OutputItem,
    OutputText,
    ReasoningItem,
    RefusalPart,
    ResponsesBody,
    SchemaFormat,
    TextFormat,
    Tool,
)
from server.dialects.strict import check_part, convert, items, refuse
from server.dialects.wrap import AnswerWriter

RESPONSES: Final = "/v1/responses"

Chat = dict[str, Any]


class Responses:
    """The dialect of `/v1/responses`.

    Args:
        images: Whether a user's messages may hold images.
    """

    def __init__(self, images: ImagePolicy = "deny") -> None:
        self._images = images

    def inner_scope(self, scope: Scope) -> Scope:
        """Return the scope as it is."""
        return scope

    def read(self, body: bytes) -> tuple[bytes, AnswerWriter]:
        """Translate a request; see `Dialect.read`."""
        raw = _typed(decode_body(body))
        _check(raw, self._images)
        asked = convert(raw, ResponsesBody, REFUSED)
        chat = {name: value for name, value in _chat(asked).items() if value is not None}
        return msgspec.json.encode(chat), ResponsesAnswer(_echo(asked))

    def error(self, status: int, body: bytes) -> bytes:
        """Return an error as it is: the format is the same."""
        return body


def _typed(raw: Chat) -> Chat:
    """Name the type of messages that leave it out, as OpenAI's clients may."""
    if not isinstance(raw.get("input"), list):
        return raw
    named = [
        {**item, "type": "message"}
        if isinstance(item, dict) and "role" in item and "type" not in item
        else item
        for item in raw["input"]
    ]
    return {**raw, "input": named}


def _check(raw: Chat, images: ImagePolicy) -> None:
    """Say clearly why state, tools of a service, and parts other than text are refused."""
    for name, harmless in HARMLESS.items():
        value = raw.get(name)
        if not any(value is other or (value == other and value != 0) for other in harmless):
            raise refuse(name, REFUSED[name])
    for index, name in enumerate(items(raw.get("include"))):
        if name != "reasoning.encrypted_content":
            raise refuse(f"include[{index}]", "answers hold what they hold; nothing can be added")
    for number, tool in enumerate(items(raw.get("tools"))):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise refuse(f"tools[{number}].type", "only functions are offered as tools")
    for index, item in enumerate(items(raw.get("input"))):
        place = f"input[{index}]"
        check_part(item, place, REFUSED_PARTS)
        _check_reasoning(item, place)
        for name in ("content", "output"):
            parts = item.get(name) if isinstance(item, dict) else None
            for number, part in enumerate(items(parts)):
                if not (images == "pass" and _is_image(item, part)):
                    check_part(part, f"{place}.{name}[{number}]", REFUSED_PARTS)


def _is_image(item: Any, part: Any) -> bool:
    """Say whether a part of an item is a user's image."""
    is_image = isinstance(part, dict) and part.get("type") == "input_image"
    return is_image and item.get("role") == "user"


def _check_reasoning(item: Any, place: str) -> None:
    if isinstance(item, dict) and item.get("encrypted_content") is not None:
        raise refuse(f"{place}.encrypted_content", "the guard can't read it; leave the item out")


# --- Request --------------------------------------------------------------------------------------


def _chat(asked: ResponsesBody) -> Chat:
    usage = {"include_usage": True} if asked.stream else None
    return {
        "model": asked.model,
        "messages": list(_messages(asked)),
        "max_completion_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "tools": [_tool(tool) for tool in asked.tools] if asked.tools else None,
        "tool_choice": _tool_choice(asked) if asked.tools else None,
        "parallel_tool_calls": asked.parallel_tool_calls if asked.tools else None,
        "response_format": _format(asked),
        "reasoning_effort": asked.reasoning.effort if asked.reasoning else None,
        "stream": asked.stream or None,
        "stream_options": usage,
        "user": asked.user,
    }


def _messages(asked: ResponsesBody) -> Iterator[Chat]:
    if asked.instructions:
        yield {"role": "system", "content": asked.instructions}
    if isinstance(asked.input, str):
        yield {"role": "user", "content": asked.input}
        return
    turn = _Turn()
    for index, item in enumerate(asked.input):
        if not turn.takes(item):
            yield from turn.end()
        if isinstance(item, OutputItem):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
        elif isinstance(item, MessageItem) and item.role != "assistant":
            _check_said(item, index)
            yield {"role": item.role, "content": _content(item.content)}
        else:
            turn.add(item)
    yield from turn.end()


class _Turn:
    """Items of one turn of the assistant: it thinks, speaks, and calls functions."""

    def __init__(self) -> None:
        self._message: Chat = {}

    def takes(self, item: Item) -> bool:
        """Return True if an item goes on with this turn."""
        if isinstance(item, CallItem):
            return True
        if isinstance(item, ReasoningItem):
            return not self._message.keys() - {"reasoning_content"}
        spoken = {"content", "tool_calls"}
        is_answer = isinstance(item, MessageItem) and item.role == "assistant"
        return is_answer and self._message.keys().isdisjoint(spoken)

    def add(self, item: Item) -> None:
        """Take an item."""
        if isinstance(item, ReasoningItem):
            parts = [*item.summary, *(item.content or ())]
            before = [text] if (text := self._message.get("reasoning_content")) else []
            self._message["reasoning_content"] = "\n".join([*before, *(p.text for p in parts)])
        elif isinstance(item, CallItem):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            self._message.setdefault("tool_calls", []).append(call)
        elif isinstance(item, MessageItem):
            self._message["content"] = _content(item.content)

    def end(self) -> Iterator[Chat]:
        """Yield the turn's message, if there was one."""
        if self._message:
            yield {"role": "assistant", "content": None, **self._message}
            self._message = {}


def _check_said(item: MessageItem, index: int) -> None:
    for number, part in enumerate(item.content if isinstance(item.content, list) else ()):
        if isinstance(part, RefusalPart):
            param = f"input[{index}].content[{number}].type"
            message = f"'{param}': only the assistant refuses"
            raise RequestError(message, code="invalid_value", param=param)


def _content(content: str | Sequence[InputText | InputImage | OutputText | RefusalPart]) -> Any:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: InputText | InputImage | OutputText | RefusalPart) -> Chat:
    match part:
        case RefusalPart():
            return {"type": "refusal", "refusal": part.refusal}
        case InputImage():
            detail = {} if part.detail is None else {"detail": part.detail}
            return {"type": "image_url", "image_url": {"url": part.image_url, **detail}}
    return {"type": "text", "text": part.text}


def _tool(tool: Tool) -> Chat:
    fields = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    function = {name: value for name, value in fields.items() if value is not None}
    return {"type": "function", "function": function}


def _tool_choice(asked: ResponsesBody) -> Any:
    if isinstance(asked.tool_choice, NamedToolChoice):
        return {"type": "function", "function": {"name": asked.tool_choice.name}}
    return asked.tool_choice


def _format(asked: ResponsesBody) -> Chat | None:
    format_ = asked.text.format if asked.text else None
    if isinstance(format_, SchemaFormat):
        fields = {
            "name": format_.name,
            "description": format_.description,
            "schema": format_.schema,
            "strict": format_.strict,
        }
        schema = {name: value for name, value in fields.items() if value is not None}
        return {"type": "json_schema", "json_schema": schema}
    return {"type": "json_object"} if isinstance(format_, JsonFormat) else None


# --- Answer ---------------------------------------------------------------------------------------


def _echo(asked: ResponsesBody) -> Chat:
    """Return the fields of a request that its answer repeats, with what was not asked for."""
    format_ = (asked.text and asked.text.format) or TextFormat()
    return {
        "background": False,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": asked.reasoning.effort if asked.reasoning else None,
            "summary": None,
        },
        "service_tier": "default",
        "store": False,
        "temperature": asked.temperature,
        "text": {"format": format_},
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_logprobs": 0,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "user": asked.user,
    }
