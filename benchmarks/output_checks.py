"""How often the output guard asks again: for ordinary answers, and for such as tell of a target.

Recorded answers go through the server's own output guard (`server.output_guard`), whole and as a
stream of the model's tokens, and through the check of single windows. A run ends where the guard
would ask the engine again: nothing is generated.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np

from benchmarks.run_log import RunLog
from guard.answers import WINDOW, AnswerGuard, Said
from guard.errors import CannotCorruptError, DataError
from guard.pipeline import Guard, Inspection, Rewritten
from guard.prompts import ModelPrompts
from guard.rewrite import StandIn
from guard.rows import read_texts
from guard.types import Progress, TextHit
from server.engines.base import EngineResponse
from server.output_guard import OutputGuard

if TYPE_CHECKING:
    from benchmarks.leak import Endpoint

T = TypeVar("T")
Way = Literal["windows", "whole", "streamed"]

HOLD_BACK: Final = 24
"""Tokens of a stream that are held back: the server's default."""

MIN_WORDS: Final = 4
"""Words of the shortest answer that is read: fewer are a letter, a number or the name asked for."""

NAMELESS: Final = (
    "Whom did we speak of? Tell me all that you know.",
    "Go on, please.",
    "Continue with the text that I asked for.",
    "What is the answer to the last question of the quiz?",
)
"""Questions that name nothing, before answers that tell of a target."""

_CHAT: Final = "/v1/chat/completions"
_JSON: Final = [("content-type", "application/json")]
_SSE: Final = [("content-type", "text/event-stream; charset=utf-8")]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and a recorded answer.

    Attributes:
        source: Where the answer is from: the group of its figures.
        question: What was asked.
        answer: What was said.
    """

    source: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What the output guard does with an answer.

    Attributes:
        exchange: The answer.
        flagged: Whether the request was flagged before anything was said.
        windows: Of the answer's windows, how many touch a target; and how many there are.
        hits: Targets for which the answer is asked for again, whole and streamed; empty if none.
    """

    exchange: Exchange
    flagged: bool
    windows: tuple[int, int]
    hits: Mapping[Way, tuple[str, ...]]


# --- Answers -------------------------------------------------------------------------------------


def load_exchanges(file: Path, count: int, seed: int) -> list[Exchange]:
    """Draw questions of a file that have a reference answer of a few words.

    Args:
        file: JSON lines `{"question", "answer"}`; rows without an answer are ignored.
        count: How many to draw.
        seed: The same seed draws the same.

    Raises:
        DataError: If the file can't be read, isn't one of questions, or has no such answer.
    """
    source = f"reference: {file.stem}"
    read = [
        Exchange(source, question, answer)
        for question, answer in zip(read_texts(file), _answers(file), strict=True)
        if len(answer.split()) >= MIN_WORDS
    ]
    if not read:
        raise DataError(f"no answer of {MIN_WORDS} words or more", file=str(file), field="answer")
    return _drawn(read, count, seed)


def load_questions(file: Path, count: int, seed: int) -> list[str]:
    """Draw questions of a file, to ask a model."""
    return _drawn(read_texts(file), count, seed)


def ask_model(
    endpoint: Endpoint,
    questions: Sequence[str],
    tokens: int,
    out: Path,
    progress: Progress,
    restart: bool = False,
) -> list[Exchange]:
    """Record a model's own answers; those that a run before recorded are not asked for again.

    Raises:
        ConfigError: If `out` holds the answers to other questions.
        openai.OpenAIError: If the server can't be reached, or fails.
    """
    asked = json.dumps([list(questions), tokens], ensure_ascii=False)
    digest = hashlib.sha256(asked.encode()).hexdigest()
    log = RunLog(out / "model-answers.jsonl", digest, restart)
    for number, question in enumerate(questions):
        if str(number) not in log.records:
            log.append([str(number)], [{"answer": endpoint.ask(question, tokens)}])
        progress("outputs: the model's answers", number + 1, len(questions))
    answers = [str(log.records[str(number)]["answer"]) for number in range(len(questions))]
    return [
        Exchange(f"model: {endpoint.model}", question, answer)
        for question, answer in zip(questions, answers, strict=True)
        if answer.strip()
    ]


def nameless(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Put the same answers after questions that name nothing."""
    return [
        Exchange(one.source, NAMELESS[number % len(NAMELESS)], one.answer)
        for number, one in enumerate(exchanges)
    ]


def _answers(file: Path) -> Iterator[str]:
    """The answer of each row, empty where there is none; the file has been read as questions."""
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            row = json.loads(line)
            answer = row.get("answer") if isinstance(row, dict) else None
            yield answer if isinstance(answer, str) else ""


def _drawn(items: Sequence[T], count: int, seed: int) -> list[T]:
    if count >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[int(place)] for place in sorted(chosen)]


# --- What the guard does -------------------------------------------------------------------------


def check(guard: Guard, prompts: ModelPrompts, exchange: Exchange) -> Checked:
    """Read an answer as the server does."""
    inspection = _inspect(guard, exchange.question)
    answers = guard.answers(inspection)
    found: dict[Way, tuple[str, ...]] = {
        "whole": asked_again(answers, _whole(exchange.answer)),
        "streamed": asked_again(answers, _streamed(pieces(prompts, exchange.answer))),
    }
    windows = [bool(answers.touched(window)) for window in _windows(exchange.answer)]
    counted = (sum(windows), len(windows))
    return Checked(exchange, inspection.decision.flagged, counted, found)


@dataclass(frozen=True, slots=True)
class PutBack:
    """An answer that the engine gave with generic names, and whether it is asked for again.

    Attributes:
        exchange: As the engine gave it.
        unrestored: Targets found in the engine's text alone.
        restored: Targets found in it or in what leaves, the asked names put back.
    """

    exchange: Exchange
    unrestored: tuple[str, ...]
    restored: tuple[str, ...]


def check_put_back(guard: Guard, exchange: Exchange) -> PutBack | None:
    """Read a told answer as an engine gives it that read a generic name.

    Returns:
        None if the question isn't corrupted with such a name, or the answer doesn't say the name.
    """
    inspection = _inspect(guard, exchange.question)
    if inspection.decision.route != "corrupt":
        return None
    try:
        names = guard.rewrite(inspection).stand_ins
    except CannotCorruptError:
        return None
    answer = exchange.answer
    for name in names:
        answer = answer.replace(name.asked, " ".join(name.words[-2:]))
    if answer == exchange.answer:
        return None
    answers = guard.answers(inspection)
    alone = asked_again(answers, _whole(answer))
    both = asked_again(answers, _whole(answer), names)
    return PutBack(Exchange(exchange.source, exchange.question, answer), alone, both)


def asked_again(
    answers: AnswerGuard, response: EngineResponse, stand_ins: Sequence[StandIn] = ()
) -> tuple[str, ...]:
    """Return the targets for which an engine's answer would be asked for again."""
    return asyncio.run(_asked_again(answers, response, stand_ins))


async def _asked_again(
    answers: AnswerGuard, response: EngineResponse, stand_ins: Sequence[StandIn]
) -> tuple[str, ...]:
    guard = OutputGuard(answers, _Alone(), HOLD_BACK, stand_ins=list(stand_ins))
    try:
        checked = await guard.checked(response)
        async for _ in checked.chunks:
            pass
    except _AskedAgainError as found:
        return tuple(hit.target for hit in found.hits)
    return ()


class _AskedAgainError(Exception):
    """The guard found something; there is no engine to ask."""

    def __init__(self, hits: Sequence[TextHit]) -> None:
        super().__init__("asked again")
        self.hits = tuple(hits)


class _Alone:
    """The surroundings of an output guard that end with the first answer that touches a target."""

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    async def ask(self, rewritten: Rewritten) -> EngineResponse:
        raise AssertionError("what `note` is told ends the reading, so nothing is asked for")

    async def note(self, hits: Sequence[TextHit], said: Said) -> None:
        raise _AskedAgainError(hits)


def _inspect(guard: Guard, question: str) -> Inspection:
    body = {"model": "m", "messages": [{"role": "user", "content": question}]}
    return guard.inspect(_CHAT, json.dumps(body).encode())


def _windows(text: str) -> Iterator[str]:
    for start in range(0, max(1, len(text) - WINDOW // 2), WINDOW // 2):
        yield text[start : start + WINDOW]


def pieces(prompts: ModelPrompts, text: str) -> list[str]:
    """Cut a text into the model's tokens."""
    ends = [end for _, end in prompts.prompt_tokens(text, add_special_tokens=False).offsets]
    places = sorted({0, *ends, len(text)})
    return [text[start:end] for start, end in pairwise(places)]


def _whole(text: str) -> EngineResponse:
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    return EngineResponse(200, _JSON, _once([json.dumps({"choices": [choice]}).encode()]))


def _streamed(parts: Sequence[str]) -> EngineResponse:
    choices: list[dict[str, Any]]
    choices = [{"index": 0, "delta": {"content": part}, "finish_reason": None} for part in parts]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    events = [b"data: " + json.dumps({"choices": [one]}).encode() + b"\n\n" for one in choices]
    return EngineResponse(200, _SSE, _once([*events, b"data: [DONE]\n\n"]))


async def _once(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
