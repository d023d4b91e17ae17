"""The texts of an answer's choices, whole or in a stream's events, as chat and text completions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

_REASONING: Final = ("reasoning_content", "reasoning", "refusal")


@dataclass(frozen=True, slots=True)
class Piece:
    """One choice's part of one event.

    Attributes:
        choice: Index of the choice.
        event: The event's bytes, without the empty line at its end.
        body: The event, decoded, with this choice alone.
        text: What it says.
        held: Reasoning, and what calls of tools say: texts that no engine can continue.
        last: True if it ends the choice.
        came_at: When it came, by `time.perf_counter`.
    """

    choice: int
    event: bytes
    body: dict[str, Any]
    text: str
    held: str
    last: bool
    came_at: float = field(default_factory=time.perf_counter, compare=False)


def pieces_of(body: dict[str, Any], event: bytes | None = None) -> Iterator[Piece]:
    """Yield the parts of an event, an event for each of its choices.

    Args:
        body: The event, decoded.
        event: Its bytes, if they may leave as they are.
    """
    choices = body["choices"]
    for place, choice in enumerate(choices):
        own = {**body, "choices": [choice]}
        raw = event if event is not None and len(choices) == 1 else None
        text, held = read_choice(choice)
        yield Piece(
            choice=choice.get("index", place),
            event=raw or b"data: " + msgspec.json.encode(own),
            body=own,
            text=text,
            held=held,
            last=choice.get("finish_reason") is not None,
        )


def read_choice(choice: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a choice says, and its reasoning and calls as one text."""
    if "text" in choice:
        return choice["text"] or "", ""
    message = choice.get("message") or choice.get("delta") or {}
    held = [message[name] for name in _REASONING if isinstance(message.get(name), str)]
    calls = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    if message.get("function_call"):
        calls.append(message["function_call"])
    held += [call[name] for call in calls for name in ("name", "arguments") if call.get(name)]
    separator = "" if "delta" in choice else "\n"
    return message.get("content") or "", separator.join(held)


def end_choice(choice: dict[str, Any], text: str) -> None:
    """Let a choice say no more than `text`, and end as if the model had stopped."""
    choice["finish_reason"] = "stop"
    if "stop_reason" in choice:
        choice["stop_reason"] = None
    if "text" in choice:
        choice["text"] = text
    message = choice.get("message")
    if message is not None:
        message["content"] = text
        message |= {name: None for name in _REASONING if name in message}
        message |= {"tool_calls": []} if message.get("tool_calls") else {}
        message |= {"function_call": None} if message.get("function_call") else {}
        choice["logprobs"] = join_logprobs(choice.get("logprobs"), None, len(text))
    elif "delta" in choice:
        choice["delta"] = {"content": text}
        choice["logprobs"] = None
    else:
        choice["logprobs"] = join_logprobs(choice.get("logprobs"), None, len(text))


def join_logprobs(old: Any, new: Any, kept: int) -> Any:
    """Return the logprobs of an answer whose first characters are another's.

    Args:
        old: Of the answer that begins it; None if none were asked for.
        new: Of the answer that ends it.
        kept: Characters of the first that are kept.
    """
    if not isinstance(old, dict):
        return old
    fresh = new if isinstance(new, dict) else {}
    if "tokens" in old:
        count = _within([str(token) for token in old["tokens"]], kept)
        joined = {
            name: [*values[:count], *(fresh.get(name) or ())]
            for name, values in old.items()
            if isinstance(values, list)
        }
        late = [kept + offset for offset in fresh.get("text_offset") or ()]
        return old | joined | {"text_offset": [*(old.get("text_offset") or [])[:count], *late]}
    content = old.get("content") or []
    count = _within([entry["token"] for entry in content], kept)
    return old | {"content": [*content[:count], *(fresh.get("content") or ())]}


def _within(tokens: list[str], length: int) -> int:
    """Return how many tokens lie within the first characters."""
    at = 0
    for count, token in enumerate(tokens):
        at += len(token)
        if at > length:
            return count
    return len(tokens)
