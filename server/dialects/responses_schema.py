"""The body of `/v1/responses`, field by field; default deny."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

_INT32: Final = 2**31 - 1
_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Label = Annotated[str, Meta(max_length=1024)]
_Nothing = Annotated[list[Any], Meta(max_length=0)]
_Status = Literal["in_progress", "completed", "incomplete"]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object whose keys are all declared."""


# --- Input ----------------------------------------------------------------------------------------


class InputText(_Strict, tag_field="type", tag="input_text"):
    """Text for the model."""

    text: str


class InputImage(_Strict, tag_field="type", tag="input_image"):
    """An image, refused but with the setting `images: pass`."""

    image_url: str
    detail: Literal["auto", "low", "high"] | None = None


class OutputText(_Strict, tag_field="type", tag="output_text"):
    """Text that the model gave earlier."""

    text: str
    annotations: _Nothing | None = None
    logprobs: _Nothing | None = None


class RefusalPart(_Strict, tag_field="type", tag="refusal"):
    """A refusal that the model gave earlier."""

    refusal: str


class SummaryText(_Strict, tag_field="type", tag="summary_text"):
    """A summary of what the model thought earlier."""

    text: str


class ReasoningText(_Strict, tag_field="type", tag="reasoning_text"):
    """What the model thought earlier."""

    text: str


class MessageItem(_Strict, tag_field="type", tag="message"):
    """What someone says."""

    role: Literal["user", "assistant", "system", "developer"]
    content: (
        str | Annotated[list[InputText | InputImage | OutputText | RefusalPart], Meta(min_length=1)]
    )
    id: str | None = None
    status: _Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(_Strict, tag_field="type", tag="function_call"):
    """A function that the model called earlier."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: _Status | None = None


class OutputItem(_Strict, tag_field="type", tag="function_call_output"):
    """What a function answered."""

    call_id: str
    output: str | Annotated[list[InputText], Meta(min_length=1)]
    id: str | None = None
    status: _Status | None = None


class ReasoningItem(_Strict, tag_field="type", tag="reasoning"):
    """What the model thought earlier, as an answer gave it."""

    summary: list[SummaryText]
    id: str | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    status: _Status | None = None


Item = MessageItem | CallItem | OutputItem | ReasoningItem


# --- Tools and formats ----------------------------------------------------------------------------


class Tool(_Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class NamedToolChoice(_Strict):
    """Forces one function."""

    type: Literal["function"]
    name: str


class TextFormat(_Strict, tag_field="type", tag="text"):
    """Free text."""


class JsonFormat(_Strict, tag_field="type", tag="json_object"):
    """Any JSON object."""


class SchemaFormat(_Strict, tag_field="type", tag="json_schema"):
    """JSON of a given schema."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class Text(_Strict):
    """What kind of text the answer is."""

    format: TextFormat | JsonFormat | SchemaFormat | None = None


class Reasoning(_Strict):
    """How much the model is to think first."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class StreamOptions(_Strict):
    """What a stream holds besides events."""

    include_obfuscation: Literal[False] | None = None


class ResponsesBody(_Strict, kw_only=True):
    """Body of `/v1/responses`; None is the default."""

    model: _Name
    input: str | Annotated[list[Item], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=_INT32)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None
    user: _Label | None = None
    safety_identifier: _Label | None = None
    prompt_cache_key: _Label | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None


_STATE: Final = "nothing is kept between requests; send the whole conversation as input"
_TOOLS: Final = "tools that a service runs are not offered; declare functions"
_OPAQUE: Final = "the guard reads text and can't tell what other parts hold; send input_text"

REFUSED: Final[dict[str, str]] = {
    "previous_response_id": _STATE,
    "conversation": _STATE,
    "background": _STATE,
    "prompt": "no prompt templates are kept here; send the text itself",
    "max_tool_calls": _TOOLS,
    "truncation": "the model would read another text than the guard; shorten the input",
    "top_logprobs": "an answer's likelihoods are not given here",
    "stop": "there is no such field in OpenAI's responses; use /v1/chat/completions",
    "context_management": _STATE,
    "moderation": "the guard decides itself",
    "summary": "reasoning comes as the model wrote it, if it wrote any",
    "verbosity": "ask for it in the instructions",
}
"""Why some well-known fields or values are refused."""

HARMLESS: Final[dict[str, tuple[Any, ...]]] = {
    "background": (None, False),
    "truncation": (None, "disabled"),
    "top_logprobs": (None, 0),
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "max_tool_calls": (None,),
}
"""Values of refused fields that mean their absence."""

REFUSED_PARTS: Final[dict[str, str]] = {
    "input_image": _OPAQUE,
    "input_file": _OPAQUE,
    "input_audio": _OPAQUE,
    "item_reference": _STATE,
    "compaction": _STATE,
    "file_search_call": _TOOLS,
    "web_search_call": _TOOLS,
    "computer_call": _TOOLS,
    "computer_call_output": _TOOLS,
    "code_interpreter_call": _TOOLS,
    "image_generation_call": _TOOLS,
    "local_shell_call": _TOOLS,
    "local_shell_call_output": _TOOLS,
    "custom_tool_call": _TOOLS,
    "custom_tool_call_output": _TOOLS,
    "mcp_call": _TOOLS,
    "mcp_list_tools": _TOOLS,
    "mcp_approval_request": _TOOLS,
    "mcp_approval_response": _TOOLS,
}
"""Why items and parts of these types are refused."""
