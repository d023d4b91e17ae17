"""The prompts of OpenAI requests: messages, text, tokens and embeddings; no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from guard.embeds import decode_embeds_part
from guard.errors import RequestError
from guard.schema import TEMPLATE_ARGUMENTS
from guard.types import FloatArray

if TYPE_CHECKING:
    from server.engines.embedded.prompts import EncodedPrompt, PromptEncoder

Encode = Callable[["PromptEncoder"], "EncodedPrompt"]
"""Encodes one prompt when given the model's encoder."""

RESERVED: Final = "<prompt_embeds>"
MAX_EMBEDS_BYTES: Final = 64 * 2**20
"""Size of one embeddings part at most, decoded; 8,192 tokens of 2,048 floats."""


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    turn: Mapping[str, bool] | None = None,
) -> Encode:
    """Read a chat request's messages.

    Args:
        messages: As the client sent them.
        tools: Tool definitions for the template.
        options: `chat_template_kwargs`.
        turn: `continue_final_message` and `add_generation_prompt`.

    Raises:
        RequestError: A message can't be read, or text holds the reserved placeholder.
    """
    embeds: list[FloatArray] = []
    read = [_message(m, f"messages[{i}]", embeds) for i, m in enumerate(messages)]
    # Whatever else the template may print must not look like a place for embeddings.
    others = [{**m, "content": None} for m in messages]
    _refuse_reserved([others, tools, options], "messages")
    taken = sorted(TEMPLATE_ARGUMENTS & options.keys())
    if taken:
        raise RequestError(
            f"chat_template_kwargs must not hold {', '.join(taken)}", param="chat_template_kwargs"
        )
    return lambda encoder: encoder.chat(read, embeds, tools, {**options, **(turn or {})})


def _message(message: Mapping[str, Any], where: str, embeds: list[FloatArray]) -> dict[str, Any]:
    """Return a message for the encoder, in parts; its embeddings are added to `embeds`."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError("a message needs a role", param=f"{where}.role")
    if content is None:
        content = []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError("content must be text or a list of parts", param=f"{where}.content")
    texts = [_part(p, f"{where}.content[{i}]", embeds) for i, p in enumerate(parts)]
    result = {**message, "content": [{"type": "text", "text": text} for text in texts]}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        result["tool_calls"] = [_tool_call(call, f"{where}.tool_calls") for call in calls]
    return result


def _part(part: object, where: str, embeds: list[FloatArray]) -> str:
    """Return the text that a part puts into the prompt."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("text", "refusal", "prompt_embeds"):
        raise RequestError(
            f"content part type {kind!r} is not supported (allowed: text, refusal, prompt_embeds)",
            param=where,
        )
    value = part.get("data" if kind == "prompt_embeds" else kind)
    if not isinstance(value, str):
        raise RequestError(f"a {kind} part needs its value as a string", param=where)
    if kind == "prompt_embeds":
        embeds.append(decode_embeds_part(value, MAX_EMBEDS_BYTES))
        return RESERVED
    _refuse_reserved(value, where)
    return value


def _tool_call(call: object, where: str) -> object:
    """Turn a call's arguments from JSON text into an object, which is what templates print."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise RequestError("a tool call needs a function", param=where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError("a tool call's arguments must be JSON", param=where) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _refuse_reserved(value: object, where: str) -> None:
    stack: list[object] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str) and RESERVED in item:
            raise RequestError(
                f"Text content may not contain the reserved placeholder {RESERVED!r}.", param=where
            )
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item


def completion_prompts(
    prompt: str | list[Any] | None, embeds: str | list[str] | None
) -> tuple[Encode, ...]:
    """Read a completion request's `prompt` or `prompt_embeds`.

    Raises:
        RequestError: There is none, or both, or one can't be read.
    """
    if bool(embeds) == (prompt not in (None, "", [])):
        raise RequestError("give either prompt or prompt_embeds, not empty", param="prompt")
    if embeds:
        items = [embeds] if isinstance(embeds, str) else embeds
        return tuple(_embeds_prompt(item) for item in items)
    if isinstance(prompt, str):
        return (_text_prompt(prompt),)
    if isinstance(prompt, list) and all(type(item) is int for item in prompt):
        return (_token_prompt(prompt),)
    return tuple(_listed_prompt(item, i) for i, item in enumerate(prompt or []))


def _listed_prompt(item: object, index: int) -> Encode:
    if isinstance(item, str) and item:
        return _text_prompt(item)
    if isinstance(item, list) and item and all(type(token) is int for token in item):
        return _token_prompt(item)
    raise RequestError(
        "a prompt in a list must be text or a list of token ids, not empty and not mixed",
        param=f"prompt[{index}]",
    )


def _text_prompt(text: str) -> Encode:
    _refuse_reserved(text, "prompt")
    return lambda encoder: encoder.text(text)


def _token_prompt(ids: list[int]) -> Encode:
    return lambda encoder: encoder.tokens(ids)


def _embeds_prompt(encoded: str) -> Encode:
    array = decode_embeds_part(encoded, MAX_EMBEDS_BYTES)
    return lambda encoder: encoder.embeddings(array)
