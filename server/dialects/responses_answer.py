"""Writes OpenAI's responses and their events from an engine's chat completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from guard.errors import EngineError
from server.dialects.chat import (
    Answer,
    Block,
    Blocks,
    EventReader,
    Said,
    Step,
    Usage,
    read_answer,
)

_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
_BROKEN: Final = "the model failed to answer; try again later"
_PREFIX: Final = {"text": "msg", "tool": "fc", "thinking": "rs"}

Fields = dict[str, Any]


class ResponsesAnswer:
    """The answer to one request for a response.

    Args:
        echo: What it repeats of the request.
    """

    def __init__(self, echo: Mapping[str, Any]) -> None:
        self._echo = dict(echo)
        self._reader = EventReader()
        self._blocks = Blocks()
        self._usage: Usage | None = None
        self._answer = Answer()
        self._finish_reason: str | None = None
        self._begun = False
        self._over = False
        self._number = 0

    def whole(self, body: bytes) -> bytes:
        """Return the response."""
        answer = read_answer(body)
        if not answer.choices:
            raise EngineError("the engine's answer holds no choice")
        choice = answer.choices[0]
        for _ in self._blocks.feed(choice.message or Said()):
            pass
        self._answer, self._usage = answer, answer.usage or Usage()
        self._finish_reason = choice.finish_reason
        return msgspec.json.encode(self._response(self._status()))

    def feed(self, chunk: bytes) -> bytes:
        """Return the events that a piece of the stream gives."""
        return b"".join(event for data in self._reader.feed(chunk) for event in self._data(data))

    def end(self) -> bytes:
        """Return a failure if the stream did not come to its end."""
        if self._over:
            return b""
        return b"".join(self._finish()) if self._finish_reason else self._fail(_BROKEN)

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
            self._begun, self._answer = True, answer
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))
        for choice in answer.choices[:1]:
            yield from self._steps(self._blocks.feed(choice.delta or Said()))
            self._finish_reason = choice.finish_reason or self._finish_reason

    def _finish(self) -> Iterator[bytes]:
        self._over = True
        self._finish_reason = self._finish_reason or "stop"
        yield from self._steps(self._blocks.end())
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _fail(self, message: str) -> bytes:
        self._over = True
        error = {"code": "server_error", "message": message}
        response = self._response("failed") | {"error": error}
        return self._event("response.failed", response=response)

    # --- Events of blocks ---

    def _steps(self, steps: Iterator[Step]) -> Iterator[bytes]:
        for what, block, text in steps:
            if what == "open":
                yield from self._opened(block)
            elif what == "add":
                yield self._added(block, text)
            else:
                yield from self._closed(block)

    def _opened(self, block: Block) -> Iterator[bytes]:
        item = self._item(block, "in_progress", opening=True)
        yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "tool":
            place = self._place(block)
            yield self._event("response.content_part.added", **place, part=_part(block, ""))

    def _added(self, block: Block, text: str) -> bytes:
        place = self._place(block)
        match block.kind:
            case "tool":
                return self._event("response.function_call_arguments.delta", **place, delta=text)
            case "thinking":
                return self._event("response.reasoning_text.delta", **place, delta=text)
        return self._event("response.output_text.delta", **place, delta=text, logprobs=[])

    def _closed(self, block: Block) -> Iterator[bytes]:
        place, text = self._place(block), block.text
        match block.kind:
            case "tool":
                said = {"arguments": text, "name": block.name}
                yield self._event("response.function_call_arguments.done", **place, **said)
            case "thinking":
                yield self._event("response.reasoning_text.done", **place, text=text)
            case "text":
                yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        if block.kind != "tool":
            yield self._event("response.content_part.done", **place, part=_part(block, text))
        status = self._item_status(block) if self._finish_reason else "completed"
        item = self._item(block, status)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        data = msgspec.json.encode({"type": kind, "sequence_number": number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    # --- Objects ---

    def _response(self, status: str) -> Fields:
        ended = status in ("completed", "incomplete")
        reason = _INCOMPLETE.get(self._finish_reason or "") if ended else None
        return {
            "id": f"resp_{self._suffix()}",
            "object": "response",
            "created_at": self._answer.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": reason} if reason else None,
            "model": self._answer.model,
            "output": [self._item(block, self._item_status(block)) for block in self._blocks.all],
            "usage": _counts(self._usage or Usage()) if ended else None,
            **self._echo,
        }

    def _item(self, block: Block, status: str, *, opening: bool = False) -> Fields:
        item: Fields = {"id": self._id(block), "type": "message", "status": status}
        if block.kind == "tool":
            call = {"call_id": block.call_id, "name": block.name}
            return item | call | {"type": "function_call", "arguments": block.text}
        content = [] if opening else [_part(block, block.text)]
        if block.kind == "thinking":
            return item | {"type": "reasoning", "summary": [], "content": content}
        return item | {"role": "assistant", "content": content}

    def _status(self) -> str:
        return "incomplete" if self._finish_reason in _INCOMPLETE else "completed"

    def _item_status(self, block: Block) -> str:
        """Return an item's status: only the last one was cut short."""
        if block is not self._blocks.all[-1]:
            return "completed"
        return self._status() if self._finish_reason else "incomplete"

    def _place(self, block: Block) -> Fields:
        place = {"item_id": self._id(block), "output_index": block.index}
        return place if block.kind == "tool" else place | {"content_index": 0}

    def _id(self, block: Block) -> str:
        return f"{_PREFIX[block.kind]}_{self._suffix()}{block.index:04d}"

    def _suffix(self) -> str:
        return self._answer.id.removeprefix("chatcmpl-")


def _part(block: Block, text: str) -> Fields:
    if block.kind == "thinking":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _counts(usage: Usage) -> Fields:
    completion = usage.completion_tokens or 0
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + completion,
    }
