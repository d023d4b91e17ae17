"""The request bodies that the guard understands, field by field.

Default deny: a field that is not declared here is refused at every depth, because the engine might
read what the guard never saw. `guard.fields` says what becomes of each, and why others are refused.
What is declared as free JSON (`Any`) is read whole by `guard.segments`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Bias = dict[
    Annotated[str, Meta(pattern=r"^[0-9]{1,10}$")], Annotated[float, Meta(ge=-100, le=100)]
]
_Stop = str | Annotated[list[str], Meta(max_length=32)]
_Nothing = Annotated[list[Any], Meta(max_length=0)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object whose keys are all declared."""


# --- Messages ------------------------------------------------------------------------------------


class TextPart(_Strict, tag_field="type", tag="text"):
    """A text part of a message's content."""

    text: str


class RefusalPart(_Strict, tag_field="type", tag="refusal"):
    """A refusal that the assistant gave earlier."""

    refusal: str


class ImageUrl(_Strict):
    """An image itself, as a `data:` URL; `guard.request` refuses others."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict, tag_field="type", tag="image_url"):
    """An image, which `guard.request` refuses but with the setting `images: pass`."""

    image_url: ImageUrl


class FunctionCall(_Strict):
    """Which function the assistant called, with arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """One tool call of an earlier assistant message."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: _Token | None = None


_Parts = Annotated[list[TextPart], Meta(min_length=1)]


class SystemMessage(_Strict, tag_field="role", tag="system"):
    """Instructions."""

    content: str | _Parts
    name: str | None = None


class DeveloperMessage(_Strict, tag_field="role", tag="developer"):
    """Instructions, by their newer name."""

    content: str | _Parts
    name: str | None = None


class UserMessage(_Strict, tag_field="role", tag="user"):
    """What the user says."""

    content: str | Annotated[list[TextPart | ImagePart], Meta(min_length=1)]
    name: str | None = None


class ToolMessage(_Strict, tag_field="role", tag="tool"):
    """A tool's result."""

    content: str | _Parts
    tool_call_id: str | None = None
    name: str | None = None


class FunctionMessage(_Strict, tag_field="role", tag="function"):
    """A function's result, the form before tools."""

    name: str
    content: str | _Parts | None = None


class AssistantMessage(_Strict, tag_field="role", tag="assistant"):
    """An earlier answer, or the start of the next one.

    `annotations` and `audio` are declared because clients echo the empty ones of an answer.
    """

    content: str | Annotated[list[TextPart | RefusalPart], Meta(min_length=1)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    annotations: _Nothing | None = None
    audio: None = None


Message = (
    SystemMessage
    | DeveloperMessage
    | UserMessage
    | ToolMessage
    | FunctionMessage
    | AssistantMessage
)


# --- Tools and answer formats --------------------------------------------------------------------


class Function(_Strict):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool; functions only."""

    function: Function
    type: Literal["function"] = "function"


class FunctionName(_Strict):
    """Names a function."""

    name: str


class NamedToolChoice(_Strict):
    """Forces one function."""

    function: FunctionName
    type: Literal["function"] = "function"


class TextFormat(_Strict, tag_field="type", tag="text"):
    """Free text."""


class JsonFormat(_Strict, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(_Strict):
    """A JSON schema and its name."""

    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class SchemaFormat(_Strict, tag_field="type", tag="json_schema"):
    """JSON of a given schema."""

    json_schema: JsonSchema


class StreamOptions(_Strict):
    """What a stream reports besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# --- Bodies --------------------------------------------------------------------------------------


class _Body(_Strict, kw_only=True):
    """What both endpoints share; None is the engine's default."""

    model: _Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=4096)] | None = None
    ignore_eos: bool | None = None
    stop: _Stop | None = None
    stop_token_ids: Annotated[list[_Token], Meta(max_length=256)] | None = None
    seed: _Int64 | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[_Bias, Meta(max_length=1024)] | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None
    user: Annotated[str, Meta(max_length=1024)] | None = None


class ChatBody(_Body, kw_only=True):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    chat_template_kwargs: dict[Annotated[str, Meta(max_length=64)], Any] | None = None
    metadata: dict[str, str] | None = None


class CompletionBody(_Body, kw_only=True):
    """Body of `/v1/completions`."""

    # msgspec allows one array type in a union; `guard.request` refuses mixed lists.
    prompt: str | Annotated[list[str | _Token | list[_Token]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=16)] | None = None


BODIES: Final[dict[str, type[ChatBody] | type[CompletionBody]]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}

TEMPLATE_ARGUMENTS: Final = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
        "documents", "max_length", "messages", "padding", "return_dict", "return_tensors",
        "tokenize", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
"""Keys of `chat_template_kwargs` that would replace what the guard has read."""

TEMPLATE_SWITCHES: Final = frozenset({"enable_thinking", "reasoning_effort", "thinking"})
"""Keys of `chat_template_kwargs` that are well known and carry no text."""

SCHEMA_WORDS: Final = frozenset(
    {
        "$defs", "$id", "$ref", "$schema", "additionalProperties", "allOf", "anyOf", "array",
        "boolean", "const", "default", "definitions", "description", "enum", "examples",
        "exclusiveMaximum", "exclusiveMinimum", "format", "integer", "items", "maxItems",
        "maxLength", "maximum", "minItems", "minLength", "minimum", "multipleOf", "not", "null",
        "nullable", "number", "object", "oneOf", "pattern", "prefixItems", "properties",
        "propertyNames", "required", "string", "title", "type", "uniqueItems",
    }
)  # fmt: skip
"""Words of JSON schema itself: they carry nothing of a client's and would only dilute the rest."""
