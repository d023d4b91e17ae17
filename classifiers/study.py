"""One target while it is learned: its parts on all rows, and without each fold of them.

Everything that calibrates is held out: benign and retain texts are scored by heads of folds that
share no cluster with them and with the weights of a lexicon made without them; forget rows by
prototypes, heads and lexicons of the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from classifiers.augment import neighbour, variants
from classifiers.background import (
    FOLDS,
    Background,
    Segments,
    WordIndex,
    fold_moments,
    naming_windows,
    segment_texts,
    text_means,
)
from classifiers.encoder import OnnxEncoder
from classifiers.evidence import Fusion, fuse, gather
from classifiers.folds import cluster_folds
from classifiers.forgetset import ForgetSet
from classifiers.lexical_reading import FEATURES as LEXICAL
from classifiers.lexicon import Lexicon
from classifiers.lexicon_index import LexiconIndex
from classifiers.space import unit
from classifiers.spans import EntityFinder, Place, entity_places
from classifiers.terms import MIN_WEIGHT, Words, term_candidates
from classifiers.termtable import TermTable
from classifiers.topic import Moments, apply, fit_ridge
from guard.types import BoolArray, FloatArray, IntArray, Progress


@dataclass(slots=True)
class Neighbours:
    """Retain texts, ready for learning; shared by targets that have the same.

    Attributes:
        texts: Normalised texts to keep.
        segments: Their windows in the shared space.
        folds: Fold of each text.
        names: True for windows that name somebody, shape (windows,).
    """

    texts: list[str]
    segments: Segments
    folds: IntArray
    names: BoolArray
    index: WordIndex = field(init=False)
    moments: list[Moments] = field(init=False)

    def __post_init__(self) -> None:
        self.index = WordIndex(self.texts)
        self.moments = fold_moments(self.segments, self.folds)

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        encoder: OnnxEncoder,
        background: Background,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Neighbours:
        """Encode retain texts (normalised)."""
        kept = list(dict.fromkeys(text for text in texts if text.strip()))
        segments = segment_texts(kept, encoder, background.space, progress)
        points = text_means(segments, len(kept))
        folds = cluster_folds(points, FOLDS, np.random.default_rng(seed))
        return cls(kept, segments, folds, naming_windows(kept, segments, encoder))


@dataclass(frozen=True, slots=True)
class Tools:
    """What all targets are learned with.

    Attributes:
        background: General text.
        encoder: The bundle's encoder.
        neighbours: Retain texts; None if there are none.
        effort: Variants of each forget row that are tried, 0 to 5; fewer is faster.
        entities: Marks names in forget rows beside the lexicon; None leaves it to the lexicon.
    """

    background: Background
    encoder: OnnxEncoder
    neighbours: Neighbours | None = None
    effort: int = 5
    entities: EntityFinder | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """Evidence of the windows of some texts.

    Attributes:
        evidence: Shape (windows, 8).
        owners: Text of each window, shape (windows,).
        texts: Number of texts.
    """

    evidence: FloatArray
    owners: IntArray
    texts: int

    def scores(self, fusion: Fusion) -> FloatArray:
        """Return each text's best score, shape (texts,)."""
        out = np.full(self.texts, -np.inf, np.float32)
        np.maximum.at(out, self.owners, fuse(self.evidence, fusion))
        return out


ALONE = 4
"""Variants of a row that hold nothing else; the next stands among other texts."""


class Study:
    """One target while it is learned: its parts on all rows, and without each fold of them."""

    def __init__(
        self,
        tools: Tools,
        forget: ForgetSet,
        table: TermTable,
        rng: np.random.Generator,
        lexicon: Lexicon,
        topic: bool = False,
    ) -> None:
        self._tools, self._forget, self._table, self._rng = tools, forget, table, rng
        self._topic = topic
        self.lexicon = lexicon
        self._index = LexiconIndex([self.lexicon], tools.encoder.is_common)
        documents = len(forget.documents)
        self._folds = rng.permutation(np.arange(documents) % FOLDS)
        owners = np.array(forget.owners, np.int64)
        self._rows = segment_texts(forget.texts, tools.encoder, tools.background.space)
        self._row_folds = self._folds[owners[self._rows.owners]]
        self._variants, self._variant_folds = self._make_variants(owners)
        self._varied = segment_texts(self._variants, tools.encoder, tools.background.space)
        self._aside, self._aside_folds = self._make_neighbours(owners)
        self.prototypes = unit(self._rows.rows)
        self.head = self._fit(None)
        self._heads = [self._fit(fold) for fold in range(FOLDS)]
        self.spread = self._spread()

    # --- Material ------------------------------------------------------------------------------

    def _make_variants(self, owners: IntArray) -> tuple[list[str], IntArray]:
        texts: list[str] = []
        folds: list[int] = []
        mates = self._tools.background.texts
        for number, text in enumerate(self._forget.asked):
            made = variants(text, mates, self._rng)[: self._tools.effort]
            made = made[:ALONE] if self._topic else made
            texts += made
            folds += [int(self._folds[owners[number]])] * len(made)
        return texts, np.array(folds, np.int64)

    def _make_neighbours(self, owners: IntArray) -> tuple[Segments, IntArray]:
        texts: list[str] = []
        folds: list[int] = []
        # A topic's question with other names in it is still about the topic.
        asked = [] if self._topic else self._forget.asked
        for number, text in enumerate(asked):
            made = neighbour(text, self.names(text), self._rng)
            if made is not None:
                texts.append(made)
                folds.append(int(self._folds[owners[number]]))
        tools = self._tools
        segments = segment_texts(texts, tools.encoder, tools.background.space)
        return segments, np.array(folds, np.int64)[segments.owners]

    def names(self, text: str) -> list[Place]:
        """Return the places of the target's names and titles in a text."""
        return entity_places(self._index.read(text), 0)

    # --- Heads ---------------------------------------------------------------------------------

    def _fit(self, without: int | None) -> FloatArray:
        tools = self._tools

        def kept(folds: IntArray) -> BoolArray:
            everything = without is None or len(self._forget.documents) < FOLDS
            return np.ones(len(folds), np.bool_) if everything else folds != without

        varied = self._variant_folds[self._varied.owners]
        rows = self._rows.rows[kept(self._row_folds)]
        if not self._topic:
            # A topic's head would learn the frames: they are what its rows have in common.
            rows = np.concatenate([rows, self._varied.rows[kept(varied)]])
        negatives = [_others(tools.background.moments, without)]
        if tools.neighbours is not None:
            negatives.append(_others(tools.neighbours.moments, without))
        negatives.append(Moments.of(self._aside.rows[kept(self._aside_folds)]))
        return fit_ridge(Moments.of(rows), negatives)

    def _spread(self) -> float:
        background = self._tools.background
        folds = background.folds[background.segments.owners]
        scores = self._held_out_topic(background.segments.rows, folds)
        return max(float(scores.std()), 1e-3)

    def _held_out_topic(self, rows: FloatArray, folds: IntArray) -> FloatArray:
        out = np.empty(len(rows), np.float32)
        for fold in range(FOLDS):
            mine = folds == fold
            out[mine] = apply(self._heads[fold], rows[mine])
        return out

    # --- Evidence ------------------------------------------------------------------------------

    def evidence(self, segments: Segments, lexical: FloatArray) -> FloatArray:
        """Return the evidence of texts that took no part in learning."""
        return gather(segments.rows, self.prototypes, self.head, self.spread, lexical)

    def lexical(self, texts: Sequence[str], segments: Segments) -> FloatArray:
        """Return the lexicon's numbers for the windows of other texts."""
        weights = [None] * len(texts)
        return _lexical(texts, segments, self._index, weights)

    def background_evidence(self) -> FloatArray:
        """Return the held-out evidence of each benign window."""
        background = self._tools.background
        return self._others_evidence(
            0, background.texts, background.segments, background.folds, background.names
        )

    def retain_evidence(self) -> FloatArray:
        """Return the held-out evidence of each retain window; none without retain texts."""
        kept = self._tools.neighbours
        if kept is None:
            return np.zeros((0, 2 + LEXICAL), np.float32)
        return self._others_evidence(1, kept.texts, kept.segments, kept.folds, kept.names)

    def _others_evidence(
        self, kind: int, texts: list[str], segments: Segments, folds: IntArray, names: BoolArray
    ) -> FloatArray:
        lexical = np.zeros((len(segments.owners), LEXICAL), np.float32)
        lexical[:, 4] = names
        index = self._word_index(kind)
        holders = self._holders(kind, index)
        bounds = np.searchsorted(segments.owners, [(n, n + 1) for n in holders]).reshape(-1, 2)
        for number, (first, last) in zip(holders, bounds, strict=True):
            windows = [(int(a), int(b)) for a, b in segments.places[first:last]]
            reading = self._index.read(texts[number], index.prepared(number))
            terms = {match.term for match in reading.matches}
            weights = {term: self._table.weight(term, without=kind) for term in terms}
            lexical[first:last] = reading.features(0, windows, weights)
        out = gather(
            segments.rows, self.prototypes, self.head, self.spread, lexical, segments.units
        )
        out[:, 1] = self._held_out_topic(segments.rows, folds[segments.owners]) / self.spread
        return out

    def _word_index(self, kind: int) -> WordIndex:
        neighbours = self._tools.neighbours
        if kind == 0 or neighbours is None:
            return self._tools.background.index
        return neighbours.index

    def _holders(self, kind: int, index: WordIndex) -> list[int]:
        """Return the texts of a kind that hold a term, or a word that looks like one."""
        found = {n for holders in self._table.kinds[kind][1].values() for n in holders}
        words = {word for term in self.lexicon.weights for word in term}
        alike = {near for word in words for near in index.similar(word)}
        return sorted(found | {n for word in alike for n in index.holders((word,))})

    def plain(self) -> Held:
        """Return the held-out evidence of the forget rows as they are."""
        folds = self._folds[np.array(self._forget.owners, np.int64)]
        return self._held_out(self._forget.texts, self._rows, folds)

    def varied(self) -> Held:
        """Return the held-out evidence of their variants."""
        return self._held_out(self._variants, self._varied, self._variant_folds)

    @property
    def can_hold_out(self) -> bool:
        """False where there are too few rows to leave any out.

        Then variants are scored by what was learned from their own row, and the report says so.
        """
        return len(self._forget.documents) >= FOLDS

    def _held_out(self, texts: Sequence[str], segments: Segments, folds: IntArray) -> Held:
        hold_out = self.can_hold_out
        weights = [self._weights_without(fold) if hold_out else None for fold in range(FOLDS)]
        lexical = _lexical(texts, segments, self._index, [weights[fold] for fold in folds])
        out = gather(
            segments.rows, self.prototypes, self.head, self.spread, lexical, segments.units
        )
        if hold_out:
            window_folds = folds[segments.owners]
            out[:, 1] = self._held_out_topic(segments.rows, window_folds) / self.spread
            cosines = segments.units @ self.prototypes.T
            cosines[window_folds[:, None] == self._row_folds[None, :]] = -1.0
            out[:, 0] = cosines.max(axis=1)
        return Held(out, segments.owners, len(texts))

    def _weights_without(self, fold: int) -> dict[Words, float]:
        gone: dict[Words, int] = {}
        for number in np.flatnonzero(self._folds == fold):
            for term in term_candidates(self._forget.documents[int(number)]):
                gone[term] = gone.get(term, 0) + 1
        weights = dict(self.lexicon.weights)
        for term in set(gone) & set(weights):
            left = self._table.counts[term] - gone[term]
            weight = self._table.weight(term, count=left) if left > 0 else 0.0
            weights[term] = weight if weight >= MIN_WEIGHT else 0.0
        return {**weights, **dict.fromkeys(self._unheard(fold), 0.0)} if self._topic else weights

    def _unheard(self, fold: int) -> list[Words]:
        """Return the terms of a topic that a fold does without: every other one.

        Who wrote the terms wrote the rows too; of real questions fewer hold one.
        """
        return [term for n, term in enumerate(sorted(self.lexicon.weights)) if (n + fold) % 2]


def _others(moments: Sequence[Moments], without: int | None) -> Moments:
    return Moments.sum([part for fold, part in enumerate(moments) if fold != without])


def _lexical(
    texts: Sequence[str],
    segments: Segments,
    index: LexiconIndex,
    weights: Sequence[dict[Words, float] | None],
) -> FloatArray:
    bounds = np.searchsorted(segments.owners, np.arange(len(texts) + 1))
    out = np.zeros((len(segments.owners), LEXICAL), np.float32)
    for number, text in enumerate(texts):
        first, last = int(bounds[number]), int(bounds[number + 1])
        windows = [(int(a), int(b)) for a, b in segments.places[first:last]]
        out[first:last] = index.read(text).features(0, windows, weights[number])
    return out
