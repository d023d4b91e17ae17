"""The guard itself: view, normalise, detect, decide, rewrite (DESIGN section 3).

A `Guard` is immutable and thread-safe; a new bundle version makes a new one. It knows no HTTP, and
reaches detectors and corruptions through the kernel's protocols only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from guard.answers import AnswerGuard
from guard.contents import Content, contents_of, has_place, locate
from guard.context import ContextPolicy, in_context, touches_context, without_context
from guard.embeds import best_dtype, embeds_part
from guard.errors import CannotCorruptError, StageError
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.policy import TargetPolicy, route_of
from guard.prompts import ContentTokens, ModelPrompts
from guard.request import ImagePolicy, ParsedRequest, parse_request, replace_contents, unsteered
from guard.rewrite import (
    CorruptedText,
    Corruption,
    StandIn,
    corrupted_embeddings,
    noise_seed,
)
from guard.traced import Place, merged
from guard.types import (
    AdapterUse,
    Decision,
    Detection,
    Detector,
    Segment,
    Span,
    TargetHit,
    TargetRoute,
    TextHit,
)
from guard.view import Reading, plain_readings, readings, source_span

ANSWER_PENALTY: Final = 0.3
"""`frequency_penalty` of a rewritten request whose client set no penalty: asked about an unfamiliar
name, a small model under greedy decoding goes round in circles (docs/corruptions.md)."""

_PENALTIES: Final = ("frequency_penalty", "presence_penalty", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Inspection:
    """A parsed request and what was decided about it."""

    request: ParsedRequest
    decision: Decision


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A request that the model may read.

    Attributes:
        body: To be sent to the engine.
        stand_ins: Generic names that stand in it for asked ones, to be put back in the answer.
        adapters: What the model is to be changed by while it answers, the strongest hit's first.
    """

    body: bytes
    stand_ins: tuple[StandIn, ...] = ()
    adapters: tuple[AdapterUse, ...] = ()


@dataclass(frozen=True, slots=True)
class _View:
    """All that a model would read of one request, and what of it is context.

    Attributes:
        segments: Its texts.
        roles: The role of each chat message.
        is_context: Says of a segment's path whether it is context.
        readings: What detection looks at.
    """

    segments: tuple[Segment, ...]
    roles: tuple[str, ...]
    is_context: Callable[[str], bool]
    readings: list[Reading]


class _Found(NamedTuple):
    """A reading that touches a target, and how."""

    reading: Reading
    hit: TextHit


NOTHING: Final = Decision(flagged=False, route="pass", coverage=1.0, targets=(), margin=-math.inf)
"""The decision where there is no target."""


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
        context: What is done about targets that results of tools and earlier turns touch.
        holds: Kept for as long as the guard lives: the bundle whose adapters engines read.
        images: Whether requests may hold images, which nobody judges, beside their texts.
    """

    def __init__(
        self,
        detector: Detector,
        targets: Mapping[str, TargetPolicy],
        key: GuardKey,
        prompts: ModelPrompts | None = None,
        ledger: Ledger | None = None,
        version: int = 0,
        holds: object = None,
        context: ContextPolicy = "corrupt",
        images: ImagePolicy = "deny",
    ) -> None:
        self.detector = detector
        self.targets = dict(targets)
        self.prompts = prompts
        self.version = version
        self.context, self.images = context, images
        self._key = key
        self._ledger = ledger
        self._holds = holds

    @property
    def adapters(self) -> tuple[AdapterUse, ...]:
        """The adapters that requests may be answered with, for the engine to make ready."""
        return tuple(
            policy.adapter
            for policy in self.targets.values()
            if policy.status == "enforced" and policy.adapts and policy.adapter is not None
        )

    def routed(self, route: TargetRoute) -> Guard:
        """Return the same guard with one route for all targets, to compare routes.

        Raises:
            ConfigError: A target has no adapter, and the route needs one.
        """
        return self._with(
            {name: replace(policy, route=route) for name, policy in self.targets.items()}
        )

    def _with(self, targets: Mapping[str, TargetPolicy]) -> Guard:
        return Guard(
            self.detector,
            targets,
            self._key,
            self.prompts,
            self._ledger,
            self.version,
            self._holds,
            self.context,
            self.images,
        )

    # --- Deciding ----------------------------------------------------------------------------

    def inspect(self, endpoint: str, body: bytes) -> Inspection:
        """Parse a request strictly and decide on it.

        Raises:
            RequestError: If the request can't be accepted.
            StageError: If a stage failed; whether that closes or opens is the caller's policy.
        """
        request = parse_request(endpoint, body, self.images)
        return Inspection(request, self.decide(request))

    def begin(self, endpoint: str, body: bytes) -> Inspection | Callable[[], Inspection]:
        """Do what `inspect` does as far as it takes little.

        Returns:
            The inspection, or what makes it and may take long: for a thread to call.

        Raises:
            RequestError: If the request can't be accepted.
            StageError: If a stage failed.
        """
        request = parse_request(endpoint, body, self.images)
        if not self.targets:
            if request.has_token_ids:
                request.segments(self._detokenise)  # raises where `inspect` would
            return Inspection(request, NOTHING)
        view = self._view(request)
        decision = self._light_decision(view)
        if decision is not None:
            return Inspection(request, decision)
        return lambda: Inspection(request, self._decide_views([view])[0])

    def decide(self, request: ParsedRequest) -> Decision:
        """Decide on one request; see `decide_many`."""
        return self.decide_many([request])[0]

    def decide_many(self, requests: Sequence[ParsedRequest]) -> list[Decision]:
        """Decide on several requests with one pass of the encoder.

        Raises:
            RequestError: If a token-id prompt can't be turned into text.
            StageError: If detection failed.
        """
        return self._decide_views([self._view(request) for request in requests])

    def _light_decision(self, view: _View) -> Decision | None:
        """Decide if the detector can say in passing what it finds, and that is nothing."""
        detect: Callable[[Sequence[str]], Detection | None] | None
        detect = getattr(self.detector, "detect_lightly", None)
        if detect is None:
            return None
        rows = _rows([view])
        try:
            detection = detect(list(rows))
            if detection is None or any(detection.hits):
                return None
            return self._decision(view, rows, detection)
        except Exception as error:
            raise StageError("detect", error) from error

    def _decide_views(self, views: Sequence[_View]) -> list[Decision]:
        rows = _rows(views)
        try:
            detection = self.detector.detect(list(rows))
            return [self._decision(view, rows, detection) for view in views]
        except Exception as error:
            raise StageError("detect", error) from error

    def _view(self, request: ParsedRequest) -> _View:
        segments = request.segments(self._detokenise)
        messages = request.raw.get("messages", ())
        roles = tuple(message["role"] for message in messages)
        try:
            # Where there is nothing to find, no other readings are looked for either.
            found = readings(segments, roles) if self.targets else plain_readings(segments)
            return _View(segments, roles, in_context(messages), found)
        except Exception as error:
            raise StageError("view", error) from error

    def _detokenise(self, ids: Sequence[int]) -> str:
        if self.prompts is None:
            raise StageError("view", RuntimeError("token-id prompts need the model's tokenizer"))
        return self.prompts.decode(ids)

    def _decision(self, view: _View, rows: Mapping[str, int], detection: Detection) -> Decision:
        found: dict[str, list[_Found]] = {}
        for reading in view.readings:
            for hit in detection.hits[rows[reading.text]]:
                found.setdefault(hit.target, []).append(_Found(reading, hit))
        hits = [self._hit(name, some, view) for name, some in found.items()]
        hits.sort(key=lambda hit: (hit.p_value, -hit.score, hit.name))
        places = [rows[reading.text] for reading in view.readings]
        shares, margins = detection.coverage.tolist(), detection.margins.tolist()
        coverage = _coverage(view, [shares[place] for place in places])
        if self.context == "ignore":
            hits = without_context(hits, view.is_context)
        route = route_of(hits, self.targets, view.segments, coverage)
        if self.context == "refuse" and touches_context(hits, view.is_context):
            route = "block" if route == "block" else "refuse"
        return Decision(
            flagged=bool(hits),
            route=route,
            coverage=coverage,
            targets=tuple(hits),
            margin=max((margins[place] for place in places), default=-math.inf),
        )

    def _hit(self, name: str, found: Sequence[_Found], view: _View) -> TargetHit:
        best = min((one.hit for one in found), key=lambda hit: (hit.p_value, -hit.score))
        return TargetHit(
            name=name,
            score=max(one.hit.score for one in found),
            p_value=best.p_value,
            weight=max(one.hit.weight for one in found),
            spans=tuple(_in_order(self._spans(name, found, view), view.segments)),
            enforced=self.targets[name].status == "enforced",
        )

    def _spans(self, name: str, found: Sequence[_Found], view: _View) -> list[Span]:
        """Spans as sent: of segments flagged by themselves, then of what only shows in several."""
        spans: list[Span] = []
        joint = []
        for one in found:
            entity = self._entity(name, one.reading)
            if one.reading.is_own:
                spans += entity or one.reading.changed()
            else:
                joint.append((not entity, one.hit.p_value, -one.hit.score, one.reading, entity))
        flagged = {span.path for span in spans}
        for *_, reading, entity in sorted(joint, key=lambda item: item[:3]):
            if flagged.isdisjoint(source.segment.path for source in reading.sources):
                new = entity or _without_entity(reading, view.roles)
                spans += new
                flagged |= {span.path for span in new}
        return spans

    def _entity(self, name: str, reading: Reading) -> list[Span]:
        """What the finder names in a reading, as sent."""
        if not self.targets[name].entity_only:
            return []
        found = self.detector.spans(reading.text, name)
        return [span for place in found for span in reading.spans(*place)]

    # --- Rewriting -----------------------------------------------------------------------------

    def rewrite(self, inspection: Inspection) -> Rewritten:
        """Replace flagged contents by corrupted embeddings, and name the adapters to answer with.

        What each enforced target does is its policy's to say. A request that only adapters act on
        keeps its bytes.

        Raises:
            CannotCorruptError: If a flagged text has no place for embeddings, or a target is to
                be refused; refuse the request.
            StageError: If rewriting failed.
        """
        request, route = inspection.request, inspection.decision.route
        if self._refuses(inspection.decision):
            raise CannotCorruptError("the request", "a target that it touches refuses")
        adapters = self._adapters(inspection.decision)
        if route == "adapt" or self._left_to_adapters(inspection, adapters):
            return Rewritten(unsteered(request), adapters=adapters)
        if self.prompts is None:
            raise StageError("rewrite", RuntimeError("no model files to take embeddings from"))
        contents = contents_of(request, request.segments(self._detokenise))
        plan = self._plan(inspection.decision, contents)
        all_flagged = True
        if request.endpoint == "/v1/completions":
            # One body can't mix prompts and embeddings in order, so all prompts go as embeddings;
            # those that nobody flagged go clean.
            count = len(request.prompts())
            all_flagged = len(plan) == count
            plan = {index: plan.get(index, []) for index in range(count)}
        try:
            texts = {
                index: self._corrupted(request, index, contents, found)
                for index, found in plan.items()
            }
            embeds = {index: self._encoded(text) for index, text in texts.items()}
            body = replace_contents(request, embeds, _added(request) if all_flagged else None)
            names = tuple(name for text in texts.values() for name in text.stand_ins)
            return Rewritten(body, names, adapters)
        except CannotCorruptError:
            raise
        except Exception as error:
            raise StageError("rewrite", error) from error

    def _left_to_adapters(self, inspection: Inspection, adapters: Sequence[AdapterUse]) -> bool:
        """Say if a request holds images: then adapters answer it alone, one for each target.

        Raises:
            CannotCorruptError: If it holds images and a target has no adapter that acts.
        """
        if not inspection.request.has_images:
            return False
        if len(adapters) < sum(hit.enforced for hit in inspection.decision.targets):
            raise CannotCorruptError("the request", "embeddings can't stand beside images")
        return True

    def _refuses(self, decision: Decision) -> bool:
        return any(hit.enforced and self.targets[hit.name].refuses for hit in decision.targets)

    def _adapters(self, decision: Decision) -> tuple[AdapterUse, ...]:
        """The adapters of the enforced hits, each at its hit's soft weight (O3's w(x))."""
        return tuple(
            replace(policy.adapter, weight=hit.weight)
            for hit in decision.targets
            if hit.enforced
            and hit.weight > 0  # O3's code has flagged texts that weigh nothing
            and (policy := self.targets[hit.name]).adapts
            and policy.adapter is not None
        )

    def _plan(
        self, decision: Decision, contents: Mapping[int, Content]
    ) -> dict[int, list[Corruption]]:
        """For each message (or prompt) to replace, what every enforced target does to it."""
        plan: dict[int, list[Corruption]] = {}
        for hit in decision.targets:
            if not hit.enforced or not self.targets[hit.name].corrupts:
                continue
            spans: dict[int, list[tuple[int, int]]] = {}
            for span in hit.spans:
                if self.targets[hit.name].adapts and not has_place(span, contents):
                    continue  # there the adapter acts alone
                index, start, end = locate(span, contents)
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

    def _corrupted(
        self,
        request: ParsedRequest,
        index: int,
        contents: Mapping[int, Content],
        corruptions: Sequence[Corruption],
    ) -> CorruptedText:
        assert self.prompts is not None  # rewrite() saw to it
        text = contents[index].text if index in contents else ""
        tokens = self._tokens(request, index)
        if not tokens.ids:
            raise CannotCorruptError(f"text {index}", "it has no tokens to put embeddings for")
        return corrupted_embeddings(self.prompts, tokens, text, corruptions)

    def _encoded(self, text: CorruptedText) -> bytes:
        assert self.prompts is not None  # rewrite() saw to it
        dtype = best_dtype(text.embeddings, self.prompts.table_dtype)
        return embeds_part(text.embeddings, dtype).encode()

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

    # --- Answers -------------------------------------------------------------------------------

    def answers(self, inspection: Inspection) -> AnswerGuard:
        """Return what judges the answers to a request."""
        return AnswerGuard(self, inspection)

    def strengthened(self, names: AbstractSet[str]) -> Guard:
        """Return the same guard, in which adapters of some targets don't act alone."""
        targets = {
            name: replace(policy, route="corrupt+adapt")
            if name in names and policy.route == "adapt"
            else policy
            for name, policy in self.targets.items()
        }
        return self._with(targets)

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

    def record_answer(self, inspection: Inspection, hits: Sequence[TextHit], attempt: int) -> None:
        """Write to the ledger that an answer touched targets and was asked for again, or ended."""
        if self._ledger is None:
            return
        self._ledger.append(
            "answer",
            bundle_version=self.version,
            attempt=attempt,
            targets=[
                {"name": hit.target, "score": round(hit.score, 4), "p_value": hit.p_value}
                for hit in hits
            ],
            request_digest=self._key.digest("request", inspection.request.body),
        )


def _rows(views: Sequence[_View]) -> dict[str, int]:
    """Number the texts of all readings, each text once."""
    rows: dict[str, int] = {}
    for view in views:
        for reading in view.readings:
            rows.setdefault(reading.text, len(rows))
    return rows


def _added(request: ParsedRequest) -> dict[str, Any]:
    """The penalty of a flagged answer, unless the client set one of its own."""
    if any(request.raw.get(name) is not None for name in _PENALTIES):
        return {}
    return {"frequency_penalty": ANSWER_PENALTY}


def _without_entity(reading: Reading, roles: Sequence[str]) -> list[Span]:
    """What is corrupted of a conversation in which the finder names nothing: what the user said."""
    if reading.stretches:
        return reading.changed()
    contents = [source for source in reading.sources if source.segment.message is not None]
    users = [source for source in contents if roles[source.segment.message or 0] == "user"]
    return [source_span(source) for source in users or contents or reading.sources]


def _in_order(spans: Sequence[Span], segments: Sequence[Segment]) -> Iterator[Span]:
    """Yield spans in the order of the body; those of one segment sorted and disjoint."""
    places: dict[str, list[Place]] = {}
    for span in spans:
        places.setdefault(span.path, []).append((span.start, span.end))
    for segment in segments:
        for start, end in merged(places.pop(segment.path, ())):
            yield Span(segment.path, start, end)


def _coverage(view: _View, covered: Sequence[float]) -> float:
    """Share of the segments' characters that were scored; less if another reading was not."""
    total = scored = 0.0
    least = 1.0
    for reading, share in zip(view.readings, covered, strict=True):
        length = len(reading.sources[0].segment.text) if reading.kind == "segment" else 0
        if length:
            total += length
            scored += share * length
        else:
            least = min(least, share)
    if not total:
        return 1.0
    unread = sum(reading.unread for reading in view.readings)
    return min(scored / (total + unread), least)
