"""An engine's chat completion, whole or streamed, as blocks of thinking, text and tool calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

import msgspec

from guard.errors import EngineError

A = TypeVar("A")
_EVENT_END: Final = b"\n\n"


class Function(msgspec.Struct):
    """A called function, or a piece of it."""

    name: str | None = None
    arguments: str | None = None


class Call(msgspec.Struct):
    """A tool call, or a piece of one."""

    function: Function
    id: str | None = None
    index: int | None = None


class Said(msgspec.Struct):
    """A message, or a piece of one."""

    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class Choice(msgspec.Struct):
    """One of the answers; dialects ask for one only."""

    message: Said | None = None
    delta: Said | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Usage(msgspec.Struct):
    """Tokens of prompt and answer."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class Failure(msgspec.Struct):
    """What an engine says of its failure."""

    message: str = "the model failed to answer; try again later"
    code: str | int | None = None


class Answer(msgspec.Struct):
    """A whole answer or one event of a stream; what dialects don't use is left unread."""

    id: str = ""
    model: str = ""
    created: int = 0
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Failure | None = None


class _Refusal(msgspec.Struct):
    error: Failure | None = None
    message: str | None = None


def read_answer(data: bytes) -> Answer:
    """Decode an answer or an event.

    Raises:
        EngineError: If it is not what an engine says.
    """
    try:
        return msgspec.json.decode(data, type=Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EngineError("the engine's answer can't be read") from error


def read_failure(body: bytes) -> Failure:
    """Return what an error's body says, whoever wrote it."""
    try:
        found = msgspec.json.decode(body, type=_Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Failure("the model refused the request")
    return found.error or Failure(found.message or "the model refused the request")


class EventReader:
    """Splits a stream into the data of its events, wherever its pieces were cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of every event that ends in this piece; comments have none."""
        whole = (self._rest + chunk).replace(b"\r\n", b"\n")
        *events, self._rest = whole.split(_EVENT_END)
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines)


@dataclass(slots=True)
class Block:
    """A stretch of one kind in an answer.

    Attributes:
        kind: What it is.
        index: Its place in the answer.
        call_id: Id of a tool call.
        name: The called function.
        pieces: Its text so far.
    """

    kind: Literal["thinking", "text", "tool"]
    index: int
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it says so far."""
        return "".join(self.pieces)


Step = tuple[Literal["open", "add", "close"], Block, str]


class Blocks:
    """Arranges pieces of a message in blocks, one after another."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._calls: dict[int, Block] = {}

    def feed(self, said: Said) -> Iterator[Step]:
        """Yield what a piece of the message does to the blocks."""
        for kind, text in (
            ("thinking", said.reasoning or said.reasoning_content),
            ("text", said.content),
            ("text", said.refusal),
        ):
            if text:
                yield from self._text("thinking" if kind == "thinking" else "text", text)
        for place, call in enumerate(said.tool_calls or ()):
            yield from self._call(place if call.index is None else call.index, call)

    def end(self) -> Iterator[Step]:
        """Yield the end of the last block."""
        if self._open is not None:
            yield "close", self._open, ""
            self._open = None

    def _text(self, kind: Literal["thinking", "text"], text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self._start(Block(kind, len(self.all)))
        yield from self._add(text)

    def _call(self, place: int, call: Call) -> Iterator[Step]:
        block = self._calls.get(place)
        if block is None:
            name = call.function.name or ""
            block = Block("tool", len(self.all), call.id or f"call_{place}", name)
            self._calls[place] = block
            yield from self._start(block)
        elif block is not self._open and call.function.arguments:
            raise EngineError("the engine went back to a tool call that had ended")
        if call.function.arguments:
            yield from self._add(call.function.arguments)

    def _start(self, block: Block) -> Iterator[Step]:
        yield from self.end()
        self.all.append(block)
        self._open = block
        yield "open", block, ""

    def _add(self, text: str) -> Iterator[Step]:
        if self._open is not None:
            self._open.pieces.append(text)
            yield "add", self._open, text
