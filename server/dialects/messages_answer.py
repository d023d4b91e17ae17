"""Writes Anthropic's messages and events from an engine's chat completion."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

import msgspec

from guard.errors import EngineError
from server.dialects.chat import (
    Answer,
    Block,
    Blocks,
    Choice,
    EventReader,
    Said,
    Step,
    Usage,
    read_answer,
)

_REASONS: Final = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_BROKEN: Final = "the model failed to answer; try again later"

Fields = dict[str, Any]


class MessagesAnswer:
    """The answer to one request for a message.

    Args:
        stop_sequences: Those of the request.
    """

    def __init__(self, stop_sequences: Collection[str]) -> None:
        self._stops = frozenset(stop_sequences)
        self._reader = EventReader()
        self._blocks = Blocks()
        self._usage = Usage()
        self._ending = Choice()
        self._begun = False
        self._over = False

    def whole(self, body: bytes) -> bytes:
        """Return the message."""
        answer = read_answer(body)
        if not answer.choices:
            raise EngineError("the engine's answer holds no choice")
        choice = answer.choices[0]
        for _ in self._blocks.feed(choice.message or Said()):
            pass
        self._usage = answer.usage or self._usage
        content = [_finished(block) for block in self._blocks.all]
        message = self._head(answer) | self._stop(choice) | {"content": content}
        return msgspec.json.encode(message)

    def feed(self, chunk: bytes) -> bytes:
        """Return the events that a piece of the stream gives."""
        return b"".join(event for data in self._reader.feed(chunk) for event in self._data(data))

    def end(self) -> bytes:
        """Return an error if the stream did not come to its end."""
        if self._over:
            return b""
        return b"".join(self._finish()) if self._ending.finish_reason else self._fail(_BROKEN)

    def _data(self, data: bytes) -> Iterator[bytes]:
        if self._over:
            return
        if data == b"[DONE]":
            yield from self._finish()
            return
        answer = read_answer(data)
        if answer.error is not None:
            yield self._fail(answer.error.message)
            return
        self._usage = answer.usage or self._usage
        if not self._begun:
            self._begun = True
            yield _event("message_start", message=self._head(answer) | {"content": []})
        for choice in answer.choices[:1]:
            yield from self._steps(self._blocks.feed(choice.delta or Said()))
            self._ending = choice if choice.finish_reason else self._ending

    def _steps(self, steps: Iterator[Step]) -> Iterator[bytes]:
        for what, block, text in steps:
            if what == "open":
                yield _event("content_block_start", index=block.index, content_block=_opened(block))
            elif what == "add":
                yield _event("content_block_delta", index=block.index, delta=_delta(block, text))
            else:
                yield _event("content_block_stop", index=block.index)

    def _finish(self) -> Iterator[bytes]:
        self._over = True
        yield from self._steps(self._blocks.end())
        yield _event("message_delta", delta=self._stop(self._ending), usage=self._counts())
        yield _event("message_stop")

    def _fail(self, message: str) -> bytes:
        self._over = True
        return _event("error", error={"type": "api_error", "message": message})

    def _head(self, answer: Answer) -> Fields:
        return {
            "id": "msg_" + answer.id.removeprefix("chatcmpl-"),
            "type": "message",
            "role": "assistant",
            "model": answer.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._counts(),
        }

    def _counts(self) -> Fields:
        return {
            "input_tokens": self._usage.prompt_tokens,
            "cache_creation_input_tokens": None,
            "cache_read_input_tokens": None,
            "output_tokens": self._usage.completion_tokens or 0,
        }

    def _stop(self, choice: Choice) -> Fields:
        reason = _REASONS.get(choice.finish_reason or "", "end_turn")
        sequence = None
        if reason == "end_turn" and choice.stop_reason in self._stops:
            reason, sequence = "stop_sequence", choice.stop_reason
        if reason == "end_turn" and any(block.kind == "tool" for block in self._blocks.all):
            reason = "tool_use"  # a tool that was forced ends as if by itself
        return {"stop_reason": reason, "stop_sequence": sequence}


class CountAnswer:
    """The answer to one request to count tokens."""

    def whole(self, body: bytes) -> bytes:
        """Return the count."""
        usage = read_answer(body).usage
        if usage is None:
            raise EngineError("the engine did not count the tokens")
        return msgspec.json.encode({"input_tokens": usage.prompt_tokens})

    def feed(self, chunk: bytes) -> bytes:
        """Return nothing: such a request is never streamed."""
        return b""

    def end(self) -> bytes:
        """Return nothing."""
        return b""


def _event(kind: str, **fields: Any) -> bytes:
    data = msgspec.json.encode({"type": kind, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _opened(block: Block) -> Fields:
    match block.kind:
        case "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "tool":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
    return {"type": "text", "text": "", "citations": None}


def _delta(block: Block, text: str) -> Fields:
    match block.kind:
        case "thinking":
            return {"type": "thinking_delta", "thinking": text}
        case "tool":
            return {"type": "input_json_delta", "partial_json": text}
    return {"type": "text_delta", "text": text}


def _finished(block: Block) -> Fields:
    fields = _opened(block)
    if block.kind == "tool":
        return fields | {"input": _input(block.text)}
    return fields | {block.kind: block.text}


def _input(arguments: str) -> Fields:
    """Return a call's arguments; those of a call that was cut short stay text."""
    if not arguments:
        return {}
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {"unparsed_arguments": arguments}
