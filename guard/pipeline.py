"""The guard itself: view, normalise, detect, decide, rewrite (DESIGN section 3).

A `Guard` is immutable and thread-safe; a new bundle version makes a new one. It knows no HTTP, and
reaches detectors and corruptions through the kernel's protocols only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from guard.chat_template import PART_SEPARATOR, content_parts
from guard.embeds import best_dtype, embeds_part
from guard.errors import CannotCorruptError, StageError
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.normalise import Normalised, normalise
from guard.prompts import ContentTokens, ModelPrompts
from guard.request import ParsedRequest, parse_request, replace_contents
from guard.rewrite import (
    Corrupter,
    Corruption,
    all_but_final_mark,
    corrupted_embeddings,
    noise_seed,
)
from guard.types import (
    Decision,
    Detection,
    Detector,
    Route,
    Segment,
    Span,
    TargetHit,
    TargetStatus,
)

ANSWER_PENALTY: Final = 0.6
"""`frequency_penalty` of a rewritten request whose client set no penalty: asked about an unfamiliar
name, a small model under greedy decoding goes round in circles (docs/corruption.md)."""

_PENALTIES: Final = ("frequency_penalty", "presence_penalty", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """What is done when one target is hit.

    Attributes:
        status: `enforced` acts, `detecting` only records.
        corrupter: The target's corruption.
        entity_only: Corrupt what the span finder names; otherwise all of a flagged text.
    """

    status: TargetStatus
    corrupter: Corrupter
    entity_only: bool = True


@dataclass(frozen=True, slots=True)
class Inspection:
    """A parsed request and what was decided about it."""

    request: ParsedRequest
    decision: Decision


@dataclass(frozen=True, slots=True)
class _Seen:
    """One segment with its normalised text and its row in the detection."""

    segment: Segment
    normalised: Normalised
    row: int


class Guard:
    """Decides on requests and rewrites the flagged ones.

    Args:
        detector: Scores texts against all targets.
        targets: Policy of each of the detector's targets.
        key: Keys digests and noise.
        prompts: Tokenizer, template and embedding table of the served model; without it requests
            can be decided but not rewritten, and token-id prompts can't be read.
        ledger: Where flagged decisions are recorded; None records nothing.
        version: Version of the bundle, for the ledger.
    """

    def __init__(
        self,
        detector: Detector,
        targets: Mapping[str, TargetPolicy],
        key: GuardKey,
        prompts: ModelPrompts | None = None,
        ledger: Ledger | None = None,
        version: int = 0,
    ) -> None:
        self.detector = detector
        self.targets = dict(targets)
        self.prompts = prompts
        self.version = version
        self._key = key
        self._ledger = ledger

    # --- Deciding ----------------------------------------------------------------------------

    def inspect(self, endpoint: str, body: bytes) -> Inspection:
        """Parse a request strictly and decide on it.

        Raises:
            RequestError: If the request can't be accepted.
            StageError: If a stage failed; whether that closes or opens is the caller's policy.
        """
        request = parse_request(endpoint, body)
        return Inspection(request, self.decide(request))

    def decide(self, request: ParsedRequest) -> Decision:
        """Decide on one request; see `decide_many`."""
        return self.decide_many([request])[0]

    def decide_many(self, requests: Sequence[ParsedRequest]) -> list[Decision]:
        """Decide on several requests with one pass of the encoder.

        Raises:
            RequestError: If a token-id prompt can't be turned into text.
            StageError: If detection failed.
        """
        views = [request.segments(self._detokenise) for request in requests]
        rows: dict[str, int] = {}
        seen: list[list[_Seen]] = []
        for view in views:
            normalised = [normalise(segment.text) for segment in view]
            seen.append(
                [
                    _Seen(segment, text, rows.setdefault(text.text, len(rows)))
                    for segment, text in zip(view, normalised, strict=True)
                ]
            )
        try:
            detection = self.detector.detect(list(rows))
            return [self._decision(view, detection) for view in seen]
        except Exception as error:
            raise StageError("detect", error) from error

    def _detokenise(self, ids: Sequence[int]) -> str:
        if self.prompts is None:
            raise StageError("view", RuntimeError("token-id prompts need the model's tokenizer"))
        return self.prompts.decode(ids)

    def _decision(self, view: Sequence[_Seen], detection: Detection) -> Decision:
        # Only the columns that were hit: a bundle may hold thousands of targets.
        rows = np.array([seen.row for seen in view], dtype=np.intp)
        columns = np.flatnonzero(detection.flagged[rows].any(axis=0))
        hits = [self._hit(int(column), view, detection) for column in columns]
        hits.sort(key=lambda hit: (hit.p_value, -hit.score, hit.name))
        coverage = _coverage(view, detection)
        return Decision(
            flagged=bool(hits),
            route=_route(hits, view, coverage),
            coverage=coverage,
            targets=tuple(hits),
        )

    def _hit(self, column: int, view: Sequence[_Seen], detection: Detection) -> TargetHit:
        name = self.detector.targets[column]
        flagged = [seen for seen in view if detection.flagged[seen.row, column]]
        best = max((seen.row for seen in flagged), key=lambda row: detection.scores[row, column])
        return TargetHit(
            name=name,
            score=float(detection.scores[best, column]),
            p_value=float(detection.p_values[best, column]),
            weight=float(detection.weights[best, column]),
            spans=tuple(span for seen in flagged for span in self._spans(name, seen)),
            enforced=self.targets[name].status == "enforced",
        )

    def _spans(self, name: str, seen: _Seen) -> list[Span]:
        """Spans in the original text; where the finder names none, all but a final mark."""
        found = (
            self.detector.spans(seen.normalised.text, name)
            if self.targets[name].entity_only
            else []
        )
        if not found:
            return [Span(seen.segment.path, *all_but_final_mark(seen.segment.text))]
        return [Span(seen.segment.path, *seen.normalised.to_original(*span)) for span in found]

    # --- Rewriting -----------------------------------------------------------------------------

    def rewrite(self, inspection: Inspection) -> bytes:
        """Return the request's body with every flagged content replaced by corrupted embeddings.

        Raises:
            CannotCorruptError: If a flagged text has no place for embeddings; refuse the request.
            StageError: If rewriting failed.
        """
        request = inspection.request
        if self.prompts is None:
            raise StageError("rewrite", RuntimeError("no model files to take embeddings from"))
        contents = _contents(request, request.segments(self._detokenise))
        plan = self._plan(inspection.decision, contents)
        all_flagged = True
        if request.endpoint == "/v1/completions":
            # One body can't mix prompts and embeddings in order, so all prompts go as embeddings;
            # those that nobody flagged go clean.
            count = len(request.prompts())
            all_flagged = len(plan) == count
            plan = {index: plan.get(index, []) for index in range(count)}
        try:
            embeds = {index: self._embeds(request, index, found) for index, found in plan.items()}
            return replace_contents(request, embeds, _added(request) if all_flagged else None)
        except CannotCorruptError:
            raise
        except Exception as error:
            raise StageError("rewrite", error) from error

    def _plan(
        self, decision: Decision, contents: Mapping[int, _Content]
    ) -> dict[int, list[Corruption]]:
        """For each message (or prompt) to replace, what every enforced target does to it."""
        plan: dict[int, list[Corruption]] = {}
        for hit in decision.targets:
            if not hit.enforced:
                continue
            spans: dict[int, list[tuple[int, int]]] = {}
            for span in hit.spans:
                index, start, end = _locate(span, contents)
                spans.setdefault(index, []).append((start, end))
            for index, found in spans.items():
                plan.setdefault(index, []).append(
                    Corruption(
                        corrupter=self.targets[hit.name].corrupter,
                        spans=tuple(found),
                        seed=noise_seed(self._key, hit.name, contents[index].text),
                    )
                )
        return plan

    def _embeds(
        self, request: ParsedRequest, index: int, corruptions: Sequence[Corruption]
    ) -> bytes:
        assert self.prompts is not None  # rewrite() saw to it
        tokens = self._tokens(request, index)
        if not tokens.ids:
            raise CannotCorruptError(f"text {index}", "it has no tokens to put embeddings for")
        embeddings = corrupted_embeddings(self.prompts, tokens, corruptions)
        return embeds_part(embeddings, best_dtype(embeddings, self.prompts.table_dtype)).encode()

    def _tokens(self, request: ParsedRequest, index: int) -> ContentTokens:
        assert self.prompts is not None
        if request.endpoint == "/v1/completions":
            return self.prompts.prompt_tokens(request.prompts()[index])
        return self.prompts.content_tokens(
            request.raw["messages"],
            index,
            tools=request.raw.get("tools"),
            **(request.raw.get("chat_template_kwargs") or {}),
        )

    # --- Recording -----------------------------------------------------------------------------

    def record(self, inspection: Inspection) -> None:
        """Write a flagged decision to the ledger: digests and figures, no text."""
        decision = inspection.decision
        if self._ledger is None or not decision.flagged:
            return
        self._ledger.append(
            "decision",
            bundle_version=self.version,
            route=decision.route,
            targets=[
                {
                    "name": hit.name,
                    "score": round(hit.score, 4),
                    "p_value": hit.p_value,
                    "weight": round(hit.weight, 4),
                    "enforced": hit.enforced,
                }
                for hit in decision.targets
            ],
            request_digest=self._key.digest("request", inspection.request.body),
        )


def _added(request: ParsedRequest) -> dict[str, Any]:
    """The penalty of a flagged answer, unless the client set one of its own."""
    if any(request.raw.get(name) is not None for name in _PENALTIES):
        return {}
    return {"frequency_penalty": ANSWER_PENALTY}


@dataclass(frozen=True, slots=True)
class _Content:
    """The text of one message's content (or one prompt), and where each of its parts begins."""

    text: str
    parts: dict[str, int]


def _contents(request: ParsedRequest, view: Sequence[Segment]) -> dict[int, _Content]:
    """Everything that an embeddings part can replace, by index of message or prompt."""
    if request.endpoint == "/v1/completions":
        return {
            segment.message: _Content(segment.text, {segment.path: 0})
            for segment in view
            if segment.message is not None
        }
    return {
        index: _joined(f"messages/{index}/content", message)
        for index, message in enumerate(request.raw["messages"])
    }


def _joined(path: str, message: Mapping[str, Any]) -> _Content:
    """Join the parts as vLLM does; a part that is a string has the content's own path."""
    content = message.get("content")
    texts = content_parts(message)
    if not isinstance(content, list):
        return _Content("".join(texts), {path: 0})
    starts: dict[str, int] = {}
    at = 0
    for number, (part, text) in enumerate(zip(content, texts, strict=True)):
        starts[f"{path}/{number}/{part['type']}"] = at
        at += len(text) + len(PART_SEPARATOR)
    return _Content(PART_SEPARATOR.join(texts), starts)


def _locate(span: Span, contents: Mapping[int, _Content]) -> tuple[int, int, int]:
    """Message index, and the span's place in that message's joined text."""
    for index, content in contents.items():
        if span.path in content.parts:
            base = content.parts[span.path]
            return index, base + span.start, base + span.end
    raise CannotCorruptError(span.path, "no embeddings can take the place of this field")


def _coverage(view: Sequence[_Seen], detection: Detection) -> float:
    lengths = np.array([len(seen.segment.text) for seen in view], dtype=np.float64)
    if not lengths.sum():
        return 1.0
    covered = detection.coverage[[seen.row for seen in view]]
    return float((covered * lengths).sum() / lengths.sum())


def _route(hits: Sequence[TargetHit], view: Sequence[_Seen], coverage: float) -> Route:
    """Block what was not read whole; refuse what can't be corrupted; corrupt the rest."""
    if coverage < 1.0:
        return "block"
    places = {seen.segment.path: seen.segment.message for seen in view}
    spans = [span for hit in hits if hit.enforced for span in hit.spans]
    if not spans:
        return "pass"
    return "refuse" if any(places[span.path] is None for span in spans) else "corrupt"
