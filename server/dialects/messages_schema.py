"""The bodies of `/v1/messages` and `/v1/messages/count_tokens`, field by field; default deny."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

_INT32: Final = 2**31 - 1
_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Nothing = Annotated[list[Any], Meta(max_length=0)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object whose keys are all declared."""


class CacheControl(_Strict):
    """A hint for Anthropic's prompt cache; dropped."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(_Strict, tag_field="type", tag="text"):
    """Text."""

    text: str
    cache_control: CacheControl | None = None
    citations: _Nothing | None = None


class ThinkingBlock(_Strict, tag_field="type", tag="thinking"):
    """What the assistant thought earlier; its signature says nothing to other models."""

    thinking: str
    signature: str | None = None


class ToolUseBlock(_Strict, tag_field="type", tag="tool_use"):
    """A tool that the assistant called earlier."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(_Strict, tag_field="type", tag="tool_result"):
    """What a tool answered."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ImageSource(_Strict, tag_field="type", tag="base64"):
    """An image itself; nothing is fetched for a client."""

    media_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"]
    data: str


class ImageBlock(_Strict, tag_field="type", tag="image"):
    """An image, refused but with the setting `images: pass`."""

    source: ImageSource
    cache_control: CacheControl | None = None


class UserTurn(_Strict, tag_field="role", tag="user"):
    """What the user and tools say."""

    content: str | Annotated[list[TextBlock | ImageBlock | ToolResultBlock], Meta(min_length=1)]


class AssistantTurn(_Strict, tag_field="role", tag="assistant"):
    """An earlier answer."""

    content: str | Annotated[list[TextBlock | ThinkingBlock | ToolUseBlock], Meta(min_length=1)]


class Tool(_Strict):
    """A function that the model may call."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(_Strict):
    """Whether tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_Strict):
    """Whether the model is asked to think first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=_INT32)] | None = None


class AnswerFormat(_Strict):
    """JSON of a given schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(_Strict):
    """How the answer is to be made."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: AnswerFormat | None = None


class Metadata(_Strict):
    """Who asks."""

    user_id: Annotated[str, Meta(max_length=1024)] | None = None


class CountBody(_Strict, kw_only=True):
    """Body of `/v1/messages/count_tokens`: what makes up a prompt."""

    model: _Name
    messages: Annotated[list[UserTurn | AssistantTurn], Meta(min_length=1, max_length=4096)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], Meta(max_length=512)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesBody(CountBody, kw_only=True):
    """Body of `/v1/messages`."""

    max_tokens: Annotated[int, Meta(ge=1, le=_INT32)]
    stop_sequences: Annotated[list[str], Meta(max_length=32)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=1, le=_INT32)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


_TOOLS: Final = "tools that a service runs are not offered; declare functions"
_STATE: Final = "nothing is kept between requests; send all in messages"
_OPAQUE: Final = "the guard reads text and can't tell what other blocks hold; send text blocks"

REFUSED: Final[dict[str, str]] = {
    "container": _STATE,
    "context_management": _STATE,
    "mcp_servers": _TOOLS,
    "allowed_callers": _TOOLS,
    "defer_loading": _TOOLS,
    "input_examples": "put examples into the description",
    "prefill": "an answer can't be begun for the model",
    "display": "thinking comes as the model wrote it, if it wrote any",
    "inference_geo": "the model runs where it runs",
    "speed": "there is one speed",
}
"""Why some well-known fields are refused; all others are refused for being undeclared."""

REFUSED_BLOCKS: Final[dict[str, str]] = {
    "image": _OPAQUE,
    "document": _OPAQUE,
    "search_result": _OPAQUE,
    "container_upload": _STATE,
    "redacted_thinking": "the guard can't read it; leave such blocks out of earlier turns",
    "server_tool_use": _TOOLS,
    "web_search_tool_result": _TOOLS,
    "web_fetch_tool_result": _TOOLS,
    "code_execution_tool_result": _TOOLS,
    "mcp_tool_use": _TOOLS,
    "mcp_tool_result": _TOOLS,
    "tool_reference": _TOOLS,
}
"""Why blocks of these types are refused."""
