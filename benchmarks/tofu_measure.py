"""What one system makes of the TOFU questions: likelihoods of known answers, and its own answers.

Likelihoods are computed on exactly the prompt that the endpoint would send to the engine, under the
adapters that it would send along: the same decision, the same rewritten body, decoded by the
engine's own code. The answers' tokens are clean, as they are when an answer is generated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from benchmarks import forgetting
from benchmarks.served import Answers, Endpoint, messages
from benchmarks.tofu_rows import PairData, Question
from guard.pipeline import Rewritten
from guard.types import AdapterUse, Message, Progress, TokenScores

if TYPE_CHECKING:
    from server.engines.embedded.model import EmbeddedModel
    from server.engines.embedded.prompts import EncodedPrompt
    from server.types import GuardLike

CHAT: Final = "/v1/chat/completions"
BATCH: Final = 64
"""Answers scored between two signs of progress."""


class Encoded(NamedTuple):
    """A question as the engine would get it.

    Attributes:
        prompt: What the model reads.
        adapters: What it is changed by while it does, in the order of their keys.
    """

    prompt: EncodedPrompt
    adapters: tuple[AdapterUse, ...]


@dataclass(frozen=True, slots=True)
class System:
    """A model and what stands before it.

    Attributes:
        name: In reports.
        route: What a flagged request takes: `none`, `corrupt`, `adapt`, `corrupt+adapt`, `prompt`.
        model: The weights.
        guard: Decides and rewrites; None is a bare model.
        system: A system message for every question, for the prompt baseline.
        adapters: What a bare model is changed by for every question.
    """

    name: str
    route: str
    model: EmbeddedModel
    guard: GuardLike | None = None
    system: str | None = None
    adapters: tuple[AdapterUse, ...] = ()

    def sent(self, question: str) -> Rewritten:
        """Return the request that asks a question, as the engine would get it."""
        raw = self._raw(question)
        if self.guard is None:
            return Rewritten(raw, adapters=self.adapters)
        inspection = self.guard.inspect(CHAT, raw)
        if inspection.decision.route == "pass":
            return Rewritten(raw)
        return self.guard.rewrite(inspection)

    def body(self, question: str) -> bytes:
        """Return the body of that request."""
        return self.sent(question).body

    def acts_on(self, question: str) -> bool:
        """Say whether the guard does anything about a question."""
        if self.guard is None:
            return False
        return self.guard.inspect(CHAT, self._raw(question)).decision.route != "pass"

    def encode(self, question: str) -> Encoded:
        """Return what the engine would make of that request."""
        from server.engines.embedded.openai_api import parse_job

        sent = self.sent(question)
        job = parse_job(CHAT, sent.body, self.model.vocab_size)
        adapters = sorted(sent.adapters, key=lambda use: use.key)
        return Encoded(job.encode(self.model.encoder)[0], tuple(adapters))

    def _raw(self, question: str) -> bytes:
        request = {"model": "m", "messages": messages(question, self.system), "temperature": 0}
        return json.dumps(request).encode()


@dataclass(slots=True)
class Likelihoods:
    """Likelihoods of one set of questions; lists have a value for each question.

    Attributes:
        probability: Of the right answer, geometric mean per token.
        paraphrase: Of the right answer in other words.
        ratio: Truth ratio R.
        option: Probability of the right answer among all.
        extraction: Extraction strength.
        exact: Exact memorisation.
        attacks: Membership scores of the right answer by attack.
    """

    probability: list[float] = field(default_factory=list)
    paraphrase: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    option: list[float] = field(default_factory=list)
    extraction: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    attacks: dict[str, list[float]] = field(default_factory=dict)


class Scorer:
    """Scores answers after prompts, each pair once: what passes unflagged is the bare model's.

    Args:
        seen: Scores known already, shared by systems of the same weights.
    """

    def __init__(self, seen: dict[bytes, TokenScores] | None = None) -> None:
        self._seen: dict[bytes, TokenScores] = {} if seen is None else seen

    def scores(
        self, system: System, pairs: Sequence[tuple[str, str]], what: str, progress: Progress
    ) -> list[TokenScores]:
        """Return the scores of each (question, answer)."""
        asked = {question: system.encode(question) for question, _ in pairs}
        digests = {question: _digest(encoded) for question, encoded in asked.items()}
        keys = [_key(digests[question], answer) for question, answer in pairs]
        missing = list({key: i for i, key in enumerate(keys) if key not in self._seen}.values())
        done = 0
        for batch in _batches(missing, [asked[question].adapters for question, _ in pairs]):
            encoded = [asked[pairs[i][0]] for i in batch]
            found = system.model.score_encoded(
                [one.prompt for one in encoded], [pairs[i][1] for i in batch], encoded[0].adapters
            )
            self._seen.update({keys[i]: score for i, score in zip(batch, found, strict=True)})
            done += len(batch)
            progress(what, done, len(missing))
        return [self._seen[key] for key in keys]


def _batches(
    places: Sequence[int], adapters: Sequence[tuple[AdapterUse, ...]]
) -> Iterator[list[int]]:
    """Put together what runs with the same adapters at the same weights."""
    alike: dict[tuple[AdapterUse, ...], list[int]] = {}
    for place in places:
        alike.setdefault(adapters[place], []).append(place)
    for group in alike.values():
        for first in range(0, len(group), BATCH):
            yield group[first : first + BATCH]


def _digest(encoded: Encoded) -> bytes:
    adapters = json.dumps([(use.key, use.weight) for use in encoded.adapters])
    embeds = encoded.prompt.embeds.cpu().numpy().tobytes()
    return hashlib.sha256(adapters.encode() + b"\0" + embeds).digest()


def _key(asked: bytes, answer: str) -> bytes:
    return hashlib.sha256(asked + answer.encode()).digest()


def likelihoods(
    system: System, rows: Sequence[Question], scorer: Scorer, what: str, progress: Progress
) -> Likelihoods:
    """Measure a set of questions."""
    pairs = [
        (row.text, answer) for row in rows for answer in (row.answer, row.paraphrase, *row.wrong)
    ]
    scores = iter(scorer.scores(system, pairs, what, progress))
    found = Likelihoods(attacks={name: [] for name in ATTACKS})
    for row in rows:
        right, other = next(scores), next(scores)
        wrong = [forgetting.answer_probability(next(scores)) for _ in row.wrong]
        _add(found, row, right, forgetting.answer_probability(other), wrong)
    return found


ATTACKS: Final = ("loss", "zlib", "min-k", "min-k++")


def _add(
    found: Likelihoods, row: Question, right: TokenScores, other: float, wrong: list[float]
) -> None:
    probability = forgetting.answer_probability(right)
    found.probability.append(probability)
    found.paraphrase.append(other)
    if wrong:
        found.ratio.append(forgetting.truth_ratio(other, wrong))
        found.option.append(forgetting.option_probability(probability, wrong))
    found.extraction.append(forgetting.extraction_strength(right))
    found.exact.append(forgetting.exact_memorisation(right))
    for name, value in (
        ("loss", forgetting.loss_score(right)),
        ("zlib", forgetting.zlib_score(right, row.answer)),
        ("min-k", forgetting.min_k(right)),
        ("min-k++", forgetting.min_k_plus_plus(right)),
    ):
        found.attacks[name].append(value)


def all_likelihoods(
    system: System, data: PairData, scorer: Scorer, progress: Progress
) -> dict[str, Likelihoods]:
    """Measure all sets: `forget`, `others`, and the kinds to be kept."""
    sets = {"forget": data.forget, "others": data.others, **data.kept}
    return {
        name: likelihoods(system, rows, scorer, f"{system.name}: {name}", progress)
        for name, rows in sets.items()
    }


def greedy(
    endpoint: Endpoint, rows: Sequence[Question], what: str, tokens: int, progress: Progress
) -> list[str]:
    """Return the served greedy answers."""
    asked = endpoint.ask([row.text for row in rows], Answers(tokens), what, progress)
    return [answers[0] for answers in asked]


def base_nlls(base: EmbeddedModel, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return each answer's mean NLL per token under the untouched base, given the plain question.

    Infinite for an empty answer.
    """
    prompts = [(Message("user", question),) for question in questions]
    said = base.score_answers(prompts, answers)
    return [-float(np.mean(row)) if len(row) else float("inf") for row in said]


def as_json(found: dict[str, Likelihoods]) -> dict[str, Any]:
    """Return likelihoods as JSON values."""
    return {
        name: {slot: getattr(one, slot) for slot in Likelihoods.__slots__}
        for name, one in found.items()
    }


def from_json(found: dict[str, Any]) -> dict[str, Likelihoods]:
    """Read `as_json` back."""
    return {name: Likelihoods(**values) for name, values in found.items()}
