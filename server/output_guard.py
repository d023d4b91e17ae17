"""Reads answers before they leave, whole or streamed (DESIGN section 3, step 7).

An answer is read as the engine gave it and as it leaves, with the asked names put back; it is
counted, cut and continued in the engine's text alone.

A stream is held back by a few tokens. What leaves was read together with what follows it. An answer
that touches a target is asked for again as a continuation of what has left (`guard.answers`), twice
at most; then it ends as if the model had stopped. Reasoning and calls of tools, which no engine can
continue, are held whole. Events keep their bytes, their number and their order; those of a
continuation get the identity of the answer that they continue.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import msgspec

from guard.answers import WINDOW, AnswerGuard, Said
from guard.errors import CannotCorruptError, EngineError
from guard.pipeline import Rewritten
from guard.restore import NameRestorer
from guard.rewrite import StandIn
from guard.types import TextHit
from server.answer_texts import Piece, end_choice, join_logprobs, pieces_of, read_choice
from server.engines.base import EngineResponse
from server.light import is_light
from server.observe import CheckOutcome, Observation

T = TypeVar("T")

ATTEMPTS: Final = 2
"""Times that an answer is asked for again before it ends."""

_NAME_EVENTS: Final = 16
"""Events that are held back beyond the hold-back so that no name is cut in two."""

_NAME_CHARS: Final = 200
"""Longest part of a text that is looked at for the beginning of a name."""

_END: Final = b"\n\n"
_DONE: Final = b"data: [DONE]"


class Surroundings(Protocol):
    """What the output guard needs of the proxy, for one request."""

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Run a call of the guard in a thread of its own."""
        ...

    async def ask(self, rewritten: Rewritten) -> EngineResponse:
        """Send a request to the engine; a status other than 200 raises."""
        ...

    async def note(self, hits: Sequence[TextHit], said: Said) -> None:
        """Take note that an answer touched targets: ledger and metrics."""
        ...


@dataclass(slots=True)
class OutputGuard:
    """Checks the answers of one request.

    Attributes:
        answers: Judges texts, and makes the request for the rest of an answer.
        around: The proxy.
        hold_back: Tokens of a stream that are held back at most.
        read_timeout_s: For a whole answer to come.
        wants_usage: Whether a stream is to end with its usage, which only its end tells.
        stand_ins: Names to be put back into the answer after the check; grows with continuations.
        observation: Takes note of checks and of what is held back.
    """

    answers: AnswerGuard
    around: Surroundings
    hold_back: int
    read_timeout_s: float = 600.0
    wants_usage: bool = False
    stand_ins: list[StandIn] = field(default_factory=list)
    observation: Observation | None = None
    _restorer: NameRestorer = field(default_factory=lambda: NameRestorer(()))
    _known: int = 0

    async def checked(self, response: EngineResponse) -> EngineResponse:
        """Return a 2xx answer that touches no target but in what the request says itself."""
        streamed = any(
            name.lower() == "content-type" and value.startswith("text/event-stream")
            for name, value in response.headers
        )
        if streamed:
            return EngineResponse(
                response.status, response.headers, _Stream(self, response).events()
            )
        body = await self.read(response)
        checked = await _Whole(self).checked(body)
        headers = [
            (name, str(len(checked)) if name.lower() == "content-length" else value)
            for name, value in response.headers
        ]
        return EngineResponse(response.status, headers, _once(checked))

    async def read(self, response: EngineResponse) -> bytes:
        """Read a whole answer."""
        try:
            async with asyncio.timeout(self.read_timeout_s):
                return await response.read()
        finally:
            await response.aclose()

    async def touched(self, text: str, leaving: str) -> tuple[TextHit, ...]:
        """Read a text of an answer, as the engine gave it and as it leaves."""
        if not text:
            return ()
        forms = (text,) if leaving == text else (text, leaving)
        if all(is_light(form.encode("utf-8", "replace")) for form in forms) and self._is_untouched(
            forms
        ):
            self._checked("clean")
            return ()
        hits = await self.around.work(self.answers.touched, *forms)
        self._checked("hit" if hits else "suspected")
        return hits

    def _checked(self, outcome: CheckOutcome) -> None:
        if self.observation is not None:
            self.observation.checked(outcome)

    def _is_untouched(self, forms: Sequence[str]) -> bool:
        """Say if that is plain without a thread, which costs more than most checks."""
        untouched: Callable[..., bool] | None = getattr(self.answers, "untouched", None)
        return untouched is not None and untouched(*forms)

    def leaving(self, text: str, said: str = "") -> str:
        """Return a text as it leaves, after what was said before it."""
        return self._names().continued(said, text) if self.stand_ins else text

    def is_open(self, text: str) -> bool:
        """Say if a text ends in what may be a part of a name that is put back."""
        return bool(self.stand_ins) and self._names().is_open(text[-_NAME_CHARS:])

    def _names(self) -> NameRestorer:
        if self._known != len(self.stand_ins):
            self._known, self._restorer = len(self.stand_ins), NameRestorer(self.stand_ins)
        return self._restorer

    async def again(self, hits: Sequence[TextHit], said: Said) -> EngineResponse | None:
        """Ask for the rest of an answer; None if it can only end here."""
        await self.around.note(hits, said)
        if said.attempt > ATTEMPTS:
            return None
        try:
            rewritten = await self.around.work(self.answers.again, hits, said)
        except CannotCorruptError:
            return None
        self.stand_ins.extend(one for one in rewritten.stand_ins if one not in self.stand_ins)
        return await self.around.ask(rewritten)


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


# --- Whole answers -------------------------------------------------------------------------------


class _Whole:
    """One answer that comes in one piece."""

    def __init__(self, guard: OutputGuard) -> None:
        self._guard = guard
        self._attempts: Counter[int] = Counter()

    async def checked(self, body: bytes) -> bytes:
        """Return the answer as it may leave; its own bytes if nothing was touched."""
        answer = _decoded(body)
        places = range(len(answer.get("choices") or []))
        changed, names = False, -1
        # All names are put back in all choices: those that a choice brings are read in the others.
        while names != len(self._guard.stand_ins):
            names = len(self._guard.stand_ins)
            for place in places:
                changed |= await self._choice(answer, place)
        return msgspec.json.encode(answer) if changed else body

    async def _choice(self, answer: dict[str, Any], place: int) -> bool:
        changed = False
        while hits := await self._hits(answer["choices"][place]):
            changed = True
            self._attempts[place] += 1
            if not await self._again(answer, place, hits):
                break
        return changed

    async def _hits(self, choice: dict[str, Any]) -> tuple[TextHit, ...]:
        guard = self._guard
        text, held = read_choice(choice)
        found = await guard.touched(held, guard.leaving(held))
        return found or await guard.touched(text, guard.leaving(text))

    async def _again(self, answer: dict[str, Any], place: int, hits: tuple[TextHit, ...]) -> bool:
        """Ask for the rest of a choice, and say True; or end it."""
        guard, choice = self._guard, answer["choices"][place]
        text, held = read_choice(choice)
        names = tuple(guard.stand_ins)
        clean = "" if held else await guard.around.work(guard.answers.clean_part, text, names)
        kept = await guard.around.work(guard.answers.count, clean)
        said = Said(choice.get("index", place), clean, kept, self._attempts[place])
        response = await guard.again(hits, said)
        if response is None:
            end_choice(choice, clean)
            await self._count(answer, text, kept, 0)
            return False
        await self._continue(answer, place, response, said, text)
        return True

    async def _continue(
        self, answer: dict[str, Any], place: int, response: EngineResponse, said: Said, text: str
    ) -> None:
        rest = _decoded(await self._guard.read(response))
        old, new = answer["choices"][place], rest["choices"][0]
        new["index"] = old.get("index", place)
        if "message" in new:
            new["message"]["content"] = said.text + (new["message"].get("content") or "")
        else:
            new["text"] = said.text + new["text"]
        new["logprobs"] = join_logprobs(old.get("logprobs"), new.get("logprobs"), len(said.text))
        answer["choices"][place] = new
        tokens = (rest.get("usage") or {}).get("completion_tokens", 0)
        await self._count(answer, text, said.tokens, tokens)

    async def _count(self, answer: dict[str, Any], text: str, kept: int, new: int) -> None:
        """Let usage count the answer that leaves instead of the one that was read."""
        usage = answer.get("usage")
        if not usage:
            return
        if len(answer["choices"]) == 1:
            usage["completion_tokens"] = kept + new
        else:
            dropped = await self._guard.around.work(self._guard.answers.count, text)
            usage["completion_tokens"] = max(0, usage["completion_tokens"] - dropped + kept + new)
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]


# --- Streams -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Choice:
    """One of a stream's answers.

    Attributes:
        said: Text that has left, as the engine gave it.
        left: The end of it, as it left.
        tokens: Events that have left and said something or ended it.
        before: How many of them had when the answer was asked for again.
        queue: What is held back, in order.
        attempts: Times that it was asked for again.
        hits: What it touched, until it is asked for again.
        ended: True once its last event has left.
        last: The last event that was seen, to end it like one.
    """

    said: str = ""
    left: str = ""
    tokens: int = 0
    before: int = 0
    queue: list[Piece] = field(default_factory=list)
    attempts: int = 0
    hits: tuple[TextHit, ...] = ()
    ended: bool = False
    last: dict[str, Any] = field(default_factory=dict)

    def begin_again(self) -> tuple[TextHit, ...]:
        """Make ready for a continuation; return why there is one."""
        hits, self.hits = self.hits, ()
        self.attempts += 1
        self.before = self.tokens
        return hits


class _Stream:
    """One streamed answer."""

    def __init__(self, guard: OutputGuard, response: EngineResponse) -> None:
        self._guard, self._response = guard, response
        self._choices: dict[int, _Choice] = {}
        self._head: dict[str, Any] = {}
        self._tail: list[bytes] = []

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of the answer as they may leave."""
        try:
            async for event in self._first():
                yield event
            while waiting := [k for k, choice in self._choices.items() if choice.hits]:
                async for event in self._again(waiting[0]):
                    yield event
        finally:
            await self._response.aclose()
        for event in self._tail or ([_DONE] if self._is_cut() else []):
            yield self._counted(event) + _END

    async def _first(self) -> AsyncIterator[bytes]:
        async for event in _split(self._response):
            body = _json_of(event)
            if body is not None and body.get("choices"):
                self._head = self._head or {k: body.get(k) for k in ("id", "created", "model")}
                for piece in pieces_of(body, event):
                    if out := b"".join(await self._take(piece)):
                        yield out  # in one piece: each takes a system call
                if self._is_waste():
                    return
            elif event == _DONE or (body is not None and "usage" in body):
                self._tail.append(event)  # they come last, and count what has left
            else:
                yield event + _END
        for choice in self._choices.values():
            if out := b"".join(await self._flush(choice)):
                yield out

    def _is_waste(self) -> bool:
        """True where all that the engine still sends would be dropped."""
        if self._guard.wants_usage or len(self._choices) > 1:
            return False
        return any(choice.hits for choice in self._choices.values())

    async def _take(self, piece: Piece) -> list[bytes]:
        """Take the next part of a choice; return the events that may leave now."""
        choice = self._choices.setdefault(piece.choice, _Choice())
        choice.last = piece.body
        if choice.hits or choice.ended:
            return []
        choice.queue.append(piece)
        if not (piece.text or piece.held or piece.last):
            return self._release(choice, 1) if len(choice.queue) == 1 else []
        if piece.last:
            out = await self._flush(choice)
            choice.ended = not choice.hits
            return out
        holds = any(one.held for one in choice.queue)
        if piece.held or not (holds or len(choice.queue) >= self._guard.hold_back):
            return []
        if await self._touches(choice):
            return []
        return self._release(choice, self._cut(choice))

    async def _flush(self, choice: _Choice) -> list[bytes]:
        """Read and release all that is held back."""
        if not choice.queue or choice.hits or await self._touches(choice):
            return []
        return self._release(choice, len(choice.queue))

    async def _touches(self, choice: _Choice) -> bool:
        """Read what is held back, with what was said before it; drop it if it touches a target."""
        held = "".join(piece.held for piece in choice.queue)
        text = "".join(piece.text for piece in choice.queue)
        guard = self._guard
        choice.hits = await guard.touched(held, guard.leaving(held))
        if not choice.hits and text:
            leaving = choice.left[-WINDOW:] + guard.leaving(text, choice.said)
            choice.hits = await guard.touched(choice.said[-WINDOW:] + text, leaving)
        if choice.hits:
            choice.queue.clear()
        return bool(choice.hits)

    def _cut(self, choice: _Choice) -> int:
        """Return how many events may go: all but the last few; none of what is held whole stays.

        No name that is put back is cut in two: what left would be a part of it, and a continuation
        would be asked to go on from there.
        """
        size = len(choice.queue)
        after = next((n for n, one in enumerate(reversed(choice.queue)) if one.held), size)
        most = size - min(self._guard.hold_back // 2, after)
        if size > self._guard.hold_back + _NAME_EVENTS:
            return most
        for count in range(most, size - after - 1, -1):
            text = "".join(piece.text for piece in choice.queue[:count])
            if not self._guard.is_open(choice.said[-_NAME_CHARS:] + text):
                return count
        return most

    def _release(self, choice: _Choice, count: int) -> list[bytes]:
        """Let events go, oldest first."""
        gone, choice.queue = choice.queue[:count], choice.queue[count:]
        if (observation := self._guard.observation) is not None:
            observation.released(gone, len(gone) + len(choice.queue))
        text = "".join(piece.text for piece in gone)
        choice.left = (choice.left + self._guard.leaving(text, choice.said))[-WINDOW:]
        choice.said += text
        choice.tokens += sum(bool(piece.text or piece.held or piece.last) for piece in gone)
        return [piece.event + _END for piece in gone]

    # --- Continuations -------------------------------------------------------------------------

    async def _again(self, number: int) -> AsyncIterator[bytes]:
        """Ask for the rest of a choice that touched something, or end it."""
        choice = self._choices[number]
        hits = choice.begin_again()
        said = Said(number, choice.said, choice.tokens, choice.attempts)
        response = await self._guard.again(hits, said)
        if response is None:
            choice.ended = True
            choice.tokens += 1
            yield b"data: " + msgspec.json.encode(self._ended(choice)) + _END
            return
        await self._response.aclose()
        self._response = response
        async for event in _split(response):
            body = _json_of(event)
            if body is not None and "error" in body:
                raise EngineError("the engine failed in the middle of an answer")
            if body is None or not body.get("choices"):
                continue
            for piece in pieces_of(self._adopted(body, number, choice)):
                says = piece.text or piece.held or piece.last  # the answer has been open for long
                if says and (out := b"".join(await self._take(piece))):
                    yield out
            if choice.hits:
                return
        if out := b"".join(await self._flush(choice)):
            yield out

    def _adopted(self, body: dict[str, Any], number: int, choice: _Choice) -> dict[str, Any]:
        """Give an event of a continuation the identity of the answer."""
        body |= self._head
        for one in body["choices"]:
            one["index"] = number
        if usage := body.get("usage"):
            done = usage["completion_tokens"] + choice.before
            asked = usage["total_tokens"] - done
            body["usage"] = {**usage, "completion_tokens": done, "prompt_tokens": asked}
        return body

    def _ended(self, choice: _Choice) -> dict[str, Any]:
        body = {**choice.last, **self._head}
        own = dict(body["choices"][0])
        end_choice(own, "")
        return {**body, "choices": [own]}

    def _is_cut(self) -> bool:
        return any(choice.attempts for choice in self._choices.values())

    def _counted(self, event: bytes) -> bytes:
        """Let the usage event count what has left, where that is not what the engine sent."""
        body = _json_of(event)
        if body is None or not body.get("usage") or not self._is_cut():
            return event
        usage = body["usage"]
        usage["completion_tokens"] = sum(choice.tokens for choice in self._choices.values())
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        return b"data: " + msgspec.json.encode(body)


async def _split(response: EngineResponse) -> AsyncIterator[bytes]:
    """Yield the events of a stream without the empty lines between them."""
    rest = b""
    async for chunk in response.chunks:
        *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(_END)
        for event in events:
            yield event
    if rest.strip():
        yield rest


def _json_of(event: bytes) -> dict[str, Any] | None:
    """Decode an event; None for comments and `[DONE]`."""
    data = event.removeprefix(b"data:").strip()
    if not (event.startswith(b"data:") and data.startswith(b"{")):
        return None
    return _decoded(data)


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        # What can't be read can't be checked, and does not leave.
        raise EngineError("the engine's answer is not a JSON object") from error
