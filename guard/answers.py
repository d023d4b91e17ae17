"""The output side of the guard: does an answer tell of a target, and how is it asked for again?

A question that describes without naming passes the input side, and knowledge can come back through
the context. So answers are read as requests are. An answer that touches a target is asked for again
as a continuation of what was already said, from a prompt that is now corrupted too, and more of it
each time.

An answer about a generic name leaves with the asked one in its place (`guard.restore`). It is read
as the engine gave it and as it leaves: a title may tell of a target only beside its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import msgspec

from guard.errors import StageError
from guard.normalise import normalise
from guard.policy import route_of
from guard.request import ParsedRequest
from guard.restore import NameRestorer
from guard.rewrite import StandIn, all_but_final_mark
from guard.schema import AssistantMessage, ChatBody
from guard.types import Detection, Segment, Span, TargetHit, TextHit
from guard.view import readings

if TYPE_CHECKING:
    from guard.pipeline import Guard, Inspection, Rewritten

WINDOW: Final = 600
"""Characters of an answer that are read at one time: what was said stays known for so long."""

_PATH: Final = "answer"
_BUDGETS: Final = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class Said:
    """How far an answer came before it touched a target.

    Attributes:
        choice: Which of the request's answers.
        text: What has been said, as the engine gave it.
        tokens: How many tokens that was.
        attempt: 1 for the first time that the answer is asked for again.
    """

    choice: int
    text: str
    tokens: int
    attempt: int


class AnswerGuard:
    """Judges the answers to one request.

    Args:
        guard: The guard that decided on the request.
        inspection: The request, and what was decided.
    """

    def __init__(self, guard: Guard, inspection: Inspection) -> None:
        self._guard, self._inspection = guard, inspection
        self._treated = {hit.name for hit in inspection.decision.targets if hit.enforced}

    @property
    def watches(self) -> bool:
        """Whether there is a target that an answer could tell of."""
        return any(policy.status == "enforced" for policy in self._guard.targets.values())

    def touched(self, *texts: str) -> tuple[TextHit, ...]:
        """Return the enforced targets that a text of an answer tells of; strongest first.

        Args:
            texts: The text, in each form that counts: as the engine gave it, and as it leaves.

        Of a target that the request itself touches, and that its prompt is already treated for,
        only what the request does not say counts: an answer may repeat the name it was asked about.

        Raises:
            StageError: If reading it failed.
        """
        if not any(text.strip() for text in texts) or not self._guard.targets:
            return ()
        try:
            return self._touched(texts)
        except Exception as error:
            raise StageError("detect", error) from error

    def untouched(self, *texts: str) -> bool:
        """Say if it takes little to tell that a text of an answer tells of nothing.

        False says nothing: `touched` has to be asked, which may take long.

        Args:
            texts: The text, in each form that counts.
        """
        if not any(text.strip() for text in texts) or not self._guard.targets:
            return True
        detect: Callable[[Sequence[str]], Detection | None] | None
        detect = getattr(self._guard.detector, "detect_lightly", None)
        if detect is None:
            return False
        try:
            detection = detect(_readings(texts))
        except Exception:
            return False  # `touched` meets and reports it again
        return detection is not None and not any(detection.hits)

    def _touched(self, texts: Sequence[str]) -> tuple[TextHit, ...]:
        found: dict[str, TextHit] = {}
        read = _readings(texts)
        for reading, hits in zip(read, self._guard.detector.detect(read).hits, strict=True):
            for hit in hits:
                if self._counts(hit.target, reading):
                    best = found.get(hit.target, hit)
                    found[hit.target] = min(best, hit, key=lambda one: (one.p_value, -one.score))
        return tuple(sorted(found.values(), key=lambda one: (one.p_value, -one.score, one.target)))

    def clean_part(self, text: str, stand_ins: Sequence[StandIn] = ()) -> str:
        """Return the longest beginning of a text, in whole sentences, that touches nothing.

        Args:
            text: As the engine gave it.
            stand_ins: Names that are put back before it leaves.
        """
        restorer = NameRestorer(stand_ins)
        clean = left = ""
        for end in _sentence_ends(text):
            leaving = restorer.restore(text[:end])
            new = text[max(0, len(clean) - WINDOW) : end]
            if self.touched(new, leaving[max(0, len(left) - WINDOW) :]):
                break
            clean, left = text[:end], leaving
        return clean

    def count(self, text: str) -> int:
        """Return how many tokens of the served model a text is."""
        prompts = self._guard.prompts
        if prompts is None or not text:
            return 0
        return len(prompts.prompt_tokens(text, add_special_tokens=False).ids)

    def again(self, hits: Sequence[TextHit], said: Said) -> Rewritten:
        """Return the request for the rest of an answer, treated for the targets that it touched.

        The first time all that was last asked is corrupted for them, the second time all that the
        prompt was told; targets whose policy is an adapter alone are corrupted too.

        Raises:
            CannotCorruptError: If the prompt can't be treated.
            StageError: If rewriting failed.
        """
        request = _continued(self._inspection.request, said, self._guard)
        segments = request.segments(self._detokenise)
        spans = tuple(_asked(request, segments, said))
        targets = self._hits(hits, spans)
        names = {hit.name for hit in targets}
        guard = self._guard.strengthened(names)
        route = route_of(targets, guard.targets, segments, 1.0)
        decision = replace(
            self._inspection.decision, flagged=True, route=route, targets=tuple(targets)
        )
        return guard.rewrite(replace(self._inspection, request=request, decision=decision))

    def record(self, hits: Sequence[TextHit], said: Said) -> None:
        """Write to the ledger that an answer was asked for again."""
        self._guard.record_answer(self._inspection, hits, said.attempt)

    # --- Judging -------------------------------------------------------------------------------

    def _counts(self, target: str, reading: str) -> bool:
        if self._guard.targets[target].status != "enforced":
            return False
        # Context that is ignored may be repeated as well.
        if target not in self._treated and self._guard.context != "ignore":
            return True
        places = self._guard.detector.spans(reading, target)
        return any(reading[start:end].casefold() not in self._request for start, end in places)

    @cached_property
    def _request(self) -> str:
        segments = self._inspection.request.segments(self._detokenise)
        texts = [normalise(segment.text).text for segment in segments]
        # A name that was asked for in disguise comes back in it, or without it.
        texts += [reading.text for reading in readings(segments)]
        return "\n".join(dict.fromkeys(texts)).casefold()

    def _detokenise(self, ids: Sequence[int]) -> str:
        assert self._guard.prompts is not None  # else the request would not have been read
        return self._guard.prompts.decode(ids)

    # --- Asking again --------------------------------------------------------------------------

    def _hits(self, hits: Sequence[TextHit], spans: tuple[Span, ...]) -> list[TargetHit]:
        """The request's own hits, and the answer's: those with all that was asked as spans."""
        own = {hit.name: hit for hit in self._inspection.decision.targets if hit.enforced}
        for hit in hits:
            own[hit.target] = TargetHit(
                hit.target, hit.score, hit.p_value, max(1.0, hit.weight), spans, enforced=True
            )
        return sorted(own.values(), key=lambda hit: (hit.p_value, -hit.score, hit.name))


def _readings(texts: Sequence[str]) -> list[str]:
    """All that may be read in a text's forms, each once."""
    read = (reading.text for text in texts for reading in readings([Segment(_PATH, text)]))
    return list(dict.fromkeys(read))


def _sentence_ends(text: str) -> Iterator[int]:
    """Places after each sentence or line; the last is the text's end."""
    for place in range(1, len(text)):
        if text[place].isspace() and text[place - 1] in ".!?…\n":
            yield place
    yield len(text)


def _continued(request: ParsedRequest, said: Said, guard: Guard) -> ParsedRequest:
    """The same request for one answer, that goes on where the answer stands."""
    raw = {name: value for name, value in request.raw.items() if value is not None}
    raw |= {name: max(1, raw[name] - said.tokens) for name in _BUDGETS if name in raw}
    raw["n"] = 1
    raw.pop("best_of", None)
    content: Any
    if isinstance(request.content, ChatBody):
        content = request.content
        if said.text:
            raw.pop("response_format", None)  # its grammar would begin once more
            raw["messages"] = [*raw["messages"], {"role": "assistant", "content": said.text}]
            raw |= {"continue_final_message": True, "add_generation_prompt": False}
            message = AssistantMessage(content=said.text)
            content = msgspec.structs.replace(content, messages=[*content.messages, message])
    else:
        prompt = _prompt(request, said.choice, guard)
        raw["prompt"] = prompt + said.text
        content = msgspec.structs.replace(request.content, prompt=raw["prompt"])
    body = msgspec.json.encode(raw)
    return replace(request, body=body, raw=raw, content=content)


def _prompt(request: ParsedRequest, choice: int, guard: Guard) -> str:
    prompts = request.prompts()
    prompt = prompts[choice // max(1, request.raw.get("n") or 1)]
    if isinstance(prompt, str):
        return prompt
    assert guard.prompts is not None  # else the request would not have been read
    return guard.prompts.decode(prompt)


def _asked(request: ParsedRequest, segments: Sequence[Segment], said: Said) -> Iterator[Span]:
    """What is corrupted: of a prompt all but the answer; of a chat what was asked, then all."""
    if not isinstance(request.content, ChatBody):
        for segment in segments:
            if segment.message is not None:
                prompt = segment.text.removesuffix(said.text)
                yield Span(segment.path, *all_but_final_mark(prompt))
        return
    messages: Sequence[Mapping[str, Any]] = request.raw["messages"]
    count = len(messages) - bool(said.text)
    users = [i for i in range(count) if messages[i]["role"] == "user"]
    chosen = set(users[-1:] if said.attempt == 1 and users else range(count))
    for segment in segments:
        if segment.message in chosen:
            yield Span(segment.path, *all_but_final_mark(segment.text))
