"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens` as one chat completion each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec
from starlette.types import Scope

from guard.errors import RequestError
from guard.request import ImagePolicy, decode_body
from server.dialects.chat import read_failure
from server.dialects.messages_answer import CountAnswer, MessagesAnswer
from server.dialects.messages_schema import (
    REFUSED,
    REFUSED_BLOCKS,
    AssistantTurn,
    CountBody,
    ImageBlock,
    MessagesBody,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from server.dialects.strict import check_part, convert, items, refuse
from server.dialects.wrap import AnswerWriter

MESSAGES: Final = "/v1/messages"
COUNT_TOKENS: Final = "/v1/messages/count_tokens"

_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_ERRORS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

Chat = dict[str, Any]
B = TypeVar("B", bound=CountBody)


class Messages:
    """The dialect of `/v1/messages`.

    Args:
        images: Whether a user's turns may hold images.
    """

    def __init__(self, images: ImagePolicy = "deny") -> None:
        self._images = images

    def inner_scope(self, scope: Scope) -> Scope:
        """Take the key out of `x-api-key`, where Anthropic's clients put it."""
        headers = list(scope["headers"])
        names = dict(headers)
        if b"x-api-key" not in names or b"authorization" in names:
            return scope
        key = (b"authorization", b"Bearer " + names[b"x-api-key"])
        return {**scope, "headers": [*headers, key]}

    def read(self, body: bytes) -> tuple[bytes, AnswerWriter]:
        """Translate a request; see `Dialect.read`."""
        asked = _convert(body, MessagesBody, self._images)
        chat = _chat(asked) | _sampling(asked)
        writer = MessagesAnswer(asked.stop_sequences or ())
        return msgspec.json.encode(chat), writer

    def error(self, status: int, body: bytes) -> bytes:
        """Return an error in Anthropic's format."""
        failure = read_failure(body)
        overloaded = failure.code == "overloaded"
        default = "invalid_request_error" if status < 500 else "api_error"
        kind = "overloaded_error" if overloaded else _ERRORS.get(status, default)
        error = {"type": kind, "message": failure.message}
        return msgspec.json.encode({"type": "error", "error": error})


class CountTokens(Messages):
    """The dialect of `/v1/messages/count_tokens`: the engine counts, and answers one token."""

    def read(self, body: bytes) -> tuple[bytes, AnswerWriter]:
        """Translate a request; see `Dialect.read`."""
        chat = _chat(_convert(body, CountBody, self._images)) | {"max_tokens": 1}
        return msgspec.json.encode(chat), CountAnswer()


def _convert(body: bytes, schema: type[B], images: ImagePolicy) -> B:
    raw = decode_body(body)
    _check_blocks(raw, images)
    asked = convert(raw, schema, REFUSED)
    if isinstance(asked.messages[-1], AssistantTurn):
        message = "an answer can't be continued: the last message must be the user's"
        raise RequestError(message, code="invalid_value", param="messages")
    if asked.tool_choice is not None and not asked.tools:
        raise refuse("tool_choice", "there are no tools to choose from")
    return asked


def _check_blocks(raw: Chat, images: ImagePolicy) -> None:
    """Say clearly why blocks other than text are refused."""
    for number, part in enumerate(items(raw.get("system"))):
        check_part(part, f"system[{number}]", REFUSED_BLOCKS)
    for index, turn in enumerate(items(raw.get("messages"))):
        content = turn.get("content") if isinstance(turn, dict) else None
        for number, part in enumerate(items(content)):
            place = f"messages[{index}].content[{number}]"
            if not (images == "pass" and _is_image(turn, part)):
                check_part(part, place, REFUSED_BLOCKS)
            inner = part.get("content") if isinstance(part, dict) else None
            for at, item in enumerate(items(inner)):
                check_part(item, f"{place}.content[{at}]", REFUSED_BLOCKS)
    for number, tool in enumerate(items(raw.get("tools"))):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise refuse(f"tools[{number}].type", "tools that a service runs are not offered")


def _is_image(turn: Any, part: Any) -> bool:
    """Say whether a block of a turn is a user's image."""
    return isinstance(part, dict) and part.get("type") == "image" and turn.get("role") == "user"


# --- Request --------------------------------------------------------------------------------------


def _chat(asked: CountBody) -> Chat:
    """Return what makes up the prompt."""
    chat: Chat = {"model": asked.model, "messages": list(_messages(asked))}
    if asked.tools:
        chat["tools"] = [_tool(tool) for tool in asked.tools]
    if asked.tool_choice is not None:
        chat |= _tool_choice(asked.tool_choice)
    if asked.thinking is not None:
        chat["chat_template_kwargs"] = {"enable_thinking": asked.thinking.type != "disabled"}
    if (config := asked.output_config) is not None:
        if config.effort is not None:
            chat["reasoning_effort"] = config.effort
        if config.format is not None:
            schema = {"name": "answer", "schema": config.format.schema}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    return chat


def _sampling(asked: MessagesBody) -> Chat:
    found: Chat = {
        "max_tokens": asked.max_tokens,
        "stop": asked.stop_sequences or None,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "user": asked.metadata.user_id if asked.metadata else None,
    }
    chat: Chat = {name: value for name, value in found.items() if value is not None}
    if asked.stream:
        usage = {"include_usage": True, "continuous_usage_stats": True}
        chat |= {"stream": True, "stream_options": usage}
    return chat


def _messages(asked: CountBody) -> Iterator[Chat]:
    if asked.system:
        yield {"role": "system", "content": _content(asked.system)}
    for turn in asked.messages:
        yield from _user(turn) if isinstance(turn, UserTurn) else _assistant(turn)


def _user(turn: UserTurn) -> Iterator[Chat]:
    """Yield the tools' answers, which must follow their calls, then what the user says."""
    if isinstance(turn.content, str):
        yield {"role": "user", "content": turn.content}
        return
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            yield _tool_result(block)
    said = [block for block in turn.content if not isinstance(block, ToolResultBlock)]
    if said:
        yield {"role": "user", "content": _content(said)}


def _tool_result(block: ToolResultBlock) -> Chat:
    content = _content(block.content or "")
    if block.is_error:
        mark = "Error: "
        content = (
            mark + content
            if isinstance(content, str)
            else [{"type": "text", "text": mark}, *content]
        )
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _assistant(turn: AssistantTurn) -> Iterator[Chat]:
    if isinstance(turn.content, str):
        yield {"role": "assistant", "content": turn.content}
        return
    texts = [block for block in turn.content if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in turn.content if isinstance(block, ThinkingBlock)]
    calls = [_call(block) for block in turn.content if isinstance(block, ToolUseBlock)]
    message: Chat = {"role": "assistant", "content": _content(texts) if texts else None}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    yield message


def _call(block: ToolUseBlock) -> Chat:
    function = {"name": block.name, "arguments": msgspec.json.encode(block.input).decode()}
    return {"id": block.id, "type": "function", "function": function}


def _content(content: str | Sequence[TextBlock | ImageBlock]) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": block.text} if isinstance(block, TextBlock) else _image(block)
        for block in content
    ]


def _image(block: ImageBlock) -> Chat:
    url = f"data:{block.source.media_type};base64,{block.source.data}"
    return {"type": "image_url", "image_url": {"url": url}}


def _tool(tool: Tool) -> Chat:
    function: Chat = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> Chat:
    if (choice.type == "tool") != (choice.name is not None):
        raise refuse("tool_choice.name", "it goes with the type 'tool', and with no other")
    named = {"type": "function", "function": {"name": choice.name}}
    chat: Chat = {"tool_choice": _CHOICES.get(choice.type, named)}
    if choice.disable_parallel_tool_use is not None:
        chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return chat
