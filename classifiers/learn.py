"""Learn one target's detector: prototypes, topic head, lexicon, quotations, calibration.

Nothing here looks at a benchmark; see `classifiers.study` for what is held out and how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from classifiers.augment import ForgetRow
from classifiers.background import Background
from classifiers.calibrate import (
    LEAST_SCORE,
    TAIL_SHARE,
    cautious_budget,
    fit_tail,
    fit_target,
    tail_quantile,
)
from classifiers.encoder import OnnxEncoder
from classifiers.evidence import Fusion
from classifiers.evidence import terms as fused_terms
from classifiers.figures import HeldOut, held_out_report
from classifiers.forgetset import ForgetSet, take_apart
from classifiers.fusion import FUSION
from classifiers.lexicon import STRONG, Lexicon
from classifiers.logistic import fit_fusion
from classifiers.prototypes import MAX_PROTOTYPES, condense
from classifiers.span_fit import learn_span_head
from classifiers.spans import EntityFinder
from classifiers.study import Held, Neighbours, Study, Tools
from classifiers.target import TargetArtifact
from classifiers.terms import STOP_WORDS, Words
from classifiers.termtable import TermTable
from classifiers.verbatim import GramHasher, HashArray, forget_grams
from guard.types import Progress

Kind = Literal["entity", "topic"]
"""`entity`: a person, a book, a company; names decide. `topic`: a field of knowledge; what a text
is about decides, and the terms given add to it."""

FRAME_RANK = 1250
"""Words more frequent than this make up the frames of questions."""


@dataclass(frozen=True, slots=True)
class LearnedDetector:
    """A learned target.

    Attributes:
        artifact: What goes into the bundle.
        report: Counts and held-out rates with 95 % intervals; numbers only, no text.
    """

    artifact: TargetArtifact
    report: dict[str, Any]


class TargetLearner:
    """Learns targets on one background.

    Args:
        background: General text.
        encoder: The bundle's encoder.
        hasher: Hashes quotations under the guard's key.
        normalise: What serving does to a text before it is read.
        neighbours: Retain texts; None if there are none.
        fusion: How evidence is weighed.
        effort: Variants of each forget row that are tried, 0 to 5; fewer is faster. Up to 1 no span
            head is learned.
        entities: Marks names in forget rows for the span head (`classifiers.span_ner`); optional.
    """

    def __init__(
        self,
        background: Background,
        encoder: OnnxEncoder,
        hasher: GramHasher,
        normalise: Callable[[str], str],
        neighbours: Neighbours | None = None,
        fusion: Fusion = FUSION,
        effort: int = 5,
        entities: EntityFinder | None = None,
    ) -> None:
        self.tools = Tools(background, encoder, neighbours, effort, entities)
        self.hasher, self.normalise, self.fusion = hasher, normalise, fusion
        self._common: HashArray | None = None

    def learn(
        self,
        name: str,
        forget: Sequence[ForgetRow],
        seed: int = 0,
        terms: Sequence[str] = (),
        progress: Progress | None = None,
        kind: Kind = "entity",
        budget: float = 1e-3,
    ) -> LearnedDetector:
        """Learn one target.

        Args:
            name: The target's name.
            forget: Rows to forget; a single sentence is enough to begin with.
            seed: The same seed and data give the same artifact.
            terms: Names, titles or technical terms that stand for the target.
            progress: Called as `progress(step, done, total)`.
            kind: What the target is.
            budget: Share of benign requests that a topic may flag alone.

        Raises:
            DataError: If there is nothing to learn from.
        """
        report = progress or (lambda what, done, total: None)
        forgotten = take_apart(forget, terms, self.normalise)
        study = self._study(forgotten, seed, kind)
        report("detector: rows", 1, 3)
        evidence, texts = study.background_evidence(), self.tools.background.texts
        owners = self.tools.background.segments.owners
        benign = Held(evidence, owners, len(texts))
        naming = sorted(set(owners[evidence[:, 3] >= STRONG].tolist()))
        plain, varied = study.plain(), study.varied()
        report("detector: evidence", 2, 3)
        own = _fit_topic(plain, benign, budget) if kind == "topic" else None
        fusion = own or self.fusion
        held_out = HeldOut(plain.scores(fusion), varied.scores(fusion), study.can_hold_out)
        retain = self._retain(study).scores(fusion)
        scores = benign.scores(fusion)
        grams = self._grams(forgotten, study.lexicon)
        # A topic has no entity: of a text that is flagged for it, everything is corrupted.
        entity = kind == "entity"
        span_head = learn_span_head(self.tools, forgotten, study.names) if entity else None
        artifact = TargetArtifact(
            name=name,
            head=study.head / np.float32(study.spread),
            prototypes=condense(study.prototypes, MAX_PROTOTYPES),
            lexicon=study.lexicon,
            grams=grams,
            calibration=fit_target(scores, naming, held_out.all, retain, len(texts)),
            encoder_hash=self.tools.encoder.source_hash,
            fusion=own,
            span_head=span_head,
        )
        report("detector: calibration", 3, 3)
        counts: dict[str, int | str] = {
            "kind": kind,
            "forget_rows": len(forget),
            "retain_texts": len(retain),
            "benign_texts": len(texts),
            "lexicon_terms": len(study.lexicon.weights),
            "prototypes": len(artifact.prototypes),
            "grams": len(grams),
        }
        figures = held_out_report(counts, held_out, scores, retain, artifact.calibration)
        return LearnedDetector(artifact, figures)

    def study(self, forget: Sequence[ForgetRow], seed: int = 0) -> Study:
        """Return everything known of an entity before evidence is fused; fits the fusion."""
        return self._study(take_apart(forget, (), self.normalise), seed, "entity")

    def _study(self, forgotten: ForgetSet, seed: int, kind: Kind) -> Study:
        table = self._count(forgotten)
        lexicon = table.lexicon()
        if kind == "topic":
            # Names in examples of a topic are anybody's: the terms given are its lexicon.
            weights = {t: w for t, w in lexicon.weights.items() if t in table.given}
            nobody: frozenset[Words] = frozenset()
            lexicon = Lexicon(weights, nobody, lexicon.others, nobody, nobody)
        rng = np.random.default_rng(seed)
        return Study(self.tools, forgotten, table, rng, lexicon, kind == "topic")

    def _count(self, forgotten: ForgetSet) -> TermTable:
        others = [self.tools.background.index]
        if self.tools.neighbours is not None:
            others.append(self.tools.neighbours.index)
        rank = self.tools.encoder.word_rank
        return TermTable.count(forgotten.documents, others, rank, forgotten.terms)

    def _retain(self, study: Study) -> Held:
        kept = self.tools.neighbours
        if kept is None:
            return Held(study.retain_evidence(), np.zeros(0, np.int64), 0)
        return Held(study.retain_evidence(), kept.segments.owners, len(kept.texts))

    def _grams(self, forgotten: ForgetSet, lexicon: Lexicon) -> HashArray:
        # A question's frame is anybody's; its names, rare words and dates are the target's.
        rank = self.tools.encoder.word_rank
        known = {
            word
            for term in lexicon.weights
            for word in term
            if rank(word) is None or (term in lexicon.primary and word not in STOP_WORDS)
        }
        return forget_grams(
            forgotten.questions,
            forgotten.passages[: forgotten.answers],
            forgotten.passages[forgotten.answers :],
            self.hasher,
            known,
            lambda word: (place := rank(word)) is not None and place < FRAME_RANK,
            self._common_grams(),
        )

    def _common_grams(self) -> HashArray:
        if self._common is None:
            indexes = [self.tools.background.index]
            if self.tools.neighbours is not None:
                indexes.append(self.tools.neighbours.index)
            parts = [
                self.hasher.grams([word for word, _, _ in words])
                for index in indexes
                for words in index.words
            ]
            self._common = np.unique(np.concatenate(parts))
        return self._common


def _fit_topic(forget: Held, benign: Held, budget: float) -> Fusion:
    """Fit a topic's own fusion on held-out evidence, on the scale that thresholds stand on.

    A topic has the rows to do so, and no name that decides. Their variants take no part: what a
    variant shares with rows is its frame, and closeness to a row would count for too much. The
    intercept is moved so that the
    share `budget` of benign texts reaches `LEAST_SCORE`.
    """
    points = [fused_terms(forget.evidence), fused_terms(benign.evidence)]
    labels = np.repeat([True, False], [len(part) for part in points])
    weights = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum()).astype(np.float32)
    fusion = fit_fusion(np.concatenate(points), labels, weights, FUSION)
    scores = benign.scores(fusion)
    count = len(scores)
    tail = fit_tail(scores, TAIL_SHARE, count)
    reached = tail_quantile(scores, cautious_budget(budget, count), tail)
    return replace(fusion, bias=fusion.bias + LEAST_SCORE - reached)
