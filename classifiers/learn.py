"""Learn one target's detector: lexicon, prompt classifier, calibration.

Everything that calibrates is held out: folds share no source row, and each fold's texts are seen
through a lexicon that was made without them. The final head is then fitted on all folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.augment import (
    ForgetRow,
    Sample,
    forget_samples,
    negative_samples,
    synthetic_neighbour,
)
from classifiers.calibrate import fit_calibration
from classifiers.detector import TargetArtifact
from classifiers.eco import PENALTY, LinearHead, class_weights, fit_logistic, stack
from classifiers.encoder import OnnxEncoder, TextFeatures
from classifiers.figures import HeldOut, held_out_report
from classifiers.folds import cluster_folds
from classifiers.lexicon import FEATURES, Lexicon, entity_floor
from classifiers.terms import (
    TermCounts,
    Words,
    build_weights,
    count_known,
    count_terms,
    find_names,
    split_words,
    term_candidates,
)
from guard.errors import DataError
from guard.types import BoolArray, FloatArray, Progress

FOLDS = 4
MIN_FORGET = 8
MIN_BENIGN = 200
RETAIN_FRAMES = 1
FRAMED_BENIGN_SHARE = 0.15
MIN_OVERLAP = 0.5
"""Share of a question that a window must see to count as a positive."""

ENCODE_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class LearnedDetector:
    """A learned target.

    Attributes:
        artifact: What goes into the bundle.
        report: Counts, threshold, held-out rates with 95 % intervals; numbers only, no text.
    """

    artifact: TargetArtifact
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: str
    answer: str | None


@dataclass(slots=True)
class _Table:
    """Window-level training data; row i of each array speaks of the same window."""

    inputs: FloatArray
    labels: NDArray[np.int64]
    folds: NDArray[np.int64]
    samples: NDArray[np.int64]
    importance: FloatArray
    trains: BoolArray


class _Encode:
    """Encodes each distinct text once while a target is learned, and reports how far it is."""

    def __init__(self, encoder: OnnxEncoder, report: Progress) -> None:
        self._encoder, self._report = encoder, report
        self._known: dict[str, TextFeatures] = {}

    def __call__(self, texts: Sequence[str]) -> list[TextFeatures]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for first in range(0, len(new), ENCODE_AT_ONCE):
            part = new[first : first + ENCODE_AT_ONCE]
            self._known.update(zip(part, self._encoder.encode(part), strict=True))
            self._report("detector: encoding", first + len(part), len(new))
        return [self._known[text] for text in texts]

    def topics(self, texts: Sequence[str]) -> FloatArray:
        """Return each text's mean last-layer state, shape (texts, hidden)."""
        width = self._encoder.hidden
        rows = [text.features[:, -width:].mean(axis=0) for text in self(texts)]
        return np.stack(rows) if rows else np.zeros((0, width), np.float32)


@dataclass(slots=True)
class _Material:
    """The cleaned texts of one target, and their folds."""

    forget: list[_Row]
    retain: list[str]
    benign: list[str]
    forget_folds: NDArray[np.int64] = field(init=False)
    retain_folds: NDArray[np.int64] = field(init=False)
    benign_folds: NDArray[np.int64] = field(init=False)

    def deal(self, encode: _Encode, rng: np.random.Generator) -> None:
        """Deal every row into a fold: forget rows at random, others by whole clusters.

        A benign set has many texts of a kind; were they dealt one by one, each held-out text would
        have siblings among the training texts, and the calibration would promise too much for the
        traffic to come.
        """
        self.forget_folds = rng.permutation(np.arange(len(self.forget)) % FOLDS)
        self.retain_folds = cluster_folds(encode.topics(self.retain), FOLDS, rng)
        self.benign_folds = cluster_folds(encode.topics(self.benign), FOLDS, rng)


def learn_detector(
    name: str,
    forget: Sequence[ForgetRow],
    retain: Sequence[str],
    benign: Sequence[str],
    encoder: OnnxEncoder,
    normalise: Callable[[str], str],
    seed: int = 0,
    fpr_budget: float = 1e-3,
    progress: Progress | None = None,
) -> LearnedDetector:
    """Learn lexicon, classifier and calibration of one target.

    Args:
        name: The target's name.
        forget: Rows to forget.
        retain: Neighbouring texts to keep; may be empty.
        benign: General prompts.
        encoder: The bundle's encoder.
        normalise: What serving does to a text before it is encoded.
        seed: The same seed and data give the same artifact.
        fpr_budget: Share of benign requests that may be flagged.
        progress: Called as `progress(step, done, total)`.

    Raises:
        DataError: If there are too few texts, or the budget is not a share.
    """
    report = progress or (lambda what, done, total: None)
    rng = np.random.default_rng(seed)
    material = _clean(forget, retain, benign, normalise)
    encode = _Encode(encoder, report)
    material.deal(encode, rng)
    lexicons = _lexicons(material, encoder)
    report("detector: names", 1, 1)
    samples, folds = _samples(material, lexicons.full, rng)
    table = _tabulate(samples, folds, lexicons, encode)
    head, held_out = _cross_fit(table, len(samples), report)
    scored = HeldOut.collect(samples, held_out)
    calibration = fit_calibration(scored.benign, scored.forget, fpr_budget, scored.retain)
    artifact = TargetArtifact(name, head, calibration, lexicons.full, encoder.source_hash)
    counts = {
        "forget_rows": len(material.forget),
        "retain_texts": len(material.retain),
        "benign_texts": len(material.benign),
        "lexicon_terms": len(lexicons.full.weights),
        "folds": FOLDS,
    }
    figures = held_out_report(counts, scored, calibration, fpr_budget)
    return LearnedDetector(artifact, figures)


def _clean(
    forget: Sequence[ForgetRow],
    retain: Sequence[str],
    benign: Sequence[str],
    normalise: Callable[[str], str],
) -> _Material:
    rows = {
        normalise(row.prompt).strip(): normalise(row.answer).strip() if row.answer else None
        for row in forget
        if row.prompt.strip()
    }
    kept = _distinct(retain, normalise, set(rows))
    general = _distinct(benign, normalise, {*rows, *kept})
    if len(rows) < MIN_FORGET:
        raise DataError(f"{len(rows)} distinct forget rows; at least {MIN_FORGET} are needed")
    if len(general) < MIN_BENIGN:
        raise DataError(f"{len(general)} distinct benign texts; at least {MIN_BENIGN} are needed")
    return _Material([_Row(prompt, answer) for prompt, answer in rows.items()], kept, general)


def _distinct(texts: Sequence[str], normalise: Callable[[str], str], taken: set[str]) -> list[str]:
    found = dict.fromkeys(normalise(text).strip() for text in texts)
    return [text for text in found if text and text not in taken]


@dataclass(frozen=True, slots=True)
class _Lexicons:
    """Lexicons that were made without a fold's texts.

    Attributes:
        named: Per fold, without its benign and retain texts; all forget rows' names are known.
        unseen: Per fold, without its forget rows too.
        full: Made of everything; what goes into the bundle.
    """

    named: list[Lexicon]
    unseen: list[Lexicon]
    full: Lexicon

    def of(self, sample: Sample, fold: int) -> Lexicon:
        return (self.named if sample.named else self.unseen)[fold]


def _lexicons(material: _Material, encoder: OnnxEncoder) -> _Lexicons:
    texts = [f"{row.prompt}\n{row.answer or ''}" for row in material.forget]
    names = find_names(texts)
    mine = [term_candidates(text) for text in texts]
    terms: set[Words] = set().union(*mine)
    kinds = [
        _Background.of(texts_of_kind, folds, terms)
        for texts_of_kind, folds in (
            (material.retain, material.retain_folds),
            (material.benign, material.benign_folds),
        )
    ]

    def make(rows: Sequence[set[Words]], fold: int | None) -> Lexicon:
        counts = [kind.without(fold) for kind in kinds]
        weights = build_weights(count_terms(rows), counts, names.__contains__, encoder.word_rank)
        words = set().union(*(kind.words_without(fold) for kind in kinds))
        return Lexicon(weights, encoder.is_common).without(words)

    named = [make(mine, fold) for fold in range(FOLDS)]
    unseen = [
        make([row for row, at in zip(mine, material.forget_folds, strict=True) if at != fold], fold)
        for fold in range(FOLDS)
    ]
    return _Lexicons(named, unseen, make(mine, None))


@dataclass(frozen=True, slots=True)
class _Background:
    """One kind of other texts: which terms and words each fold of it holds."""

    counts: list[TermCounts]
    words: list[set[str]]

    @classmethod
    def of(cls, texts: Sequence[str], folds: NDArray[np.int64], terms: set[Words]) -> _Background:
        found = count_known(texts, terms)
        counts, words = [], []
        for fold in range(FOLDS):
            mine = np.flatnonzero(folds == fold)
            counts.append(count_terms(found[int(n)] for n in mine))
            words.append({word for n in mine for word, _, _ in split_words(texts[int(n)])})
        return cls(counts, words)

    def without(self, fold: int | None) -> TermCounts:
        total = TermCounts()
        for number, part in enumerate(self.counts):
            if number != fold:
                total += part
        return total

    def words_without(self, fold: int | None) -> set[str]:
        return set().union(*(w for number, w in enumerate(self.words) if number != fold))


def _samples(
    material: _Material, lexicon: Lexicon, rng: np.random.Generator
) -> tuple[list[Sample], NDArray[np.int64]]:
    samples: list[Sample] = []
    folds: list[int] = []

    def add(found: Sequence[Sample], fold: int) -> None:
        samples.extend(found)
        folds.extend([fold] * len(found))

    for number, row in enumerate(material.forget):
        fold = int(material.forget_folds[number])
        mates = [material.benign[n] for n in np.flatnonzero(material.benign_folds == fold)]
        add(forget_samples(row, number, mates, rng), fold)
        for text in (row.prompt, f"{row.prompt}\n{row.answer or ''}"):
            other = synthetic_neighbour(text, lexicon, rng)
            if other:
                add(negative_samples(other, number, "neighbour", rng), fold)
    for number, text in enumerate(material.retain):
        found = negative_samples(text, number, "retain", rng, RETAIN_FRAMES)
        add(found, int(material.retain_folds[number]))
    for number, text in enumerate(material.benign):
        frames = int(rng.random() < FRAMED_BENIGN_SHARE)
        found = negative_samples(text, number, "benign", rng, frames)
        add(found, int(material.benign_folds[number]))
    return samples, np.array(folds, np.int64)


def _tabulate(
    samples: Sequence[Sample],
    folds: NDArray[np.int64],
    lexicons: _Lexicons,
    encode: _Encode,
) -> _Table:
    inputs, places, importance, trains = [], [], [], []
    encoded = encode([sample.text for sample in samples])
    for number, (sample, text) in enumerate(zip(samples, encoded, strict=True)):
        names = lexicons.of(sample, int(folds[number])).features(sample.text, text.windows)
        seen = _overlaps(sample, text.windows)
        inputs.append(np.concatenate([text.features, names], axis=1))
        places.extend([number] * len(text.windows))
        trains.extend(seen)
        importance.extend([1.0 / np.sqrt(max(1, sum(seen)))] * len(text.windows))
    owners = np.array(places, np.int64)
    labels = np.array([sample.label for sample in samples], np.int64)
    return _Table(
        np.concatenate(inputs),
        labels[owners],
        folds[owners],
        owners,
        np.array(importance, np.float32),
        np.array(trains, np.bool_),
    )


def _overlaps(sample: Sample, windows: Sequence[tuple[int, int]]) -> list[bool]:
    """Tell which windows see enough of the part that the label speaks of."""
    shared = [max(0, min(sample.end, end) - max(sample.start, start)) for start, end in windows]
    if not sample.label:
        return [True] * len(windows)
    needed = min(MIN_OVERLAP * (sample.end - sample.start), max(shared))
    sizes = [end - start for start, end in windows]
    return [part >= needed or part >= 0.8 * size for part, size in zip(shared, sizes, strict=True)]


def _cross_fit(table: _Table, samples: int, report: Progress) -> tuple[LinearHead, FloatArray]:
    """Fit a head without each fold, and one on all; returns it and the samples' held-out scores."""
    features = table.inputs[:, :-FEATURES]
    names = table.inputs[:, -FEATURES:].copy()
    mean = features[table.trains].mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = np.maximum(features[table.trains].std(axis=0, dtype=np.float64), 1e-3)
    scale = scale.astype(np.float32)
    features -= mean
    features /= scale
    weight, bias = _fit(table, features, table.trains, None)
    report("detector: fitting", 1, FOLDS + 1)
    held_out = np.zeros(len(features), np.float32)
    for fold in range(FOLDS):
        others = table.trains & (table.folds != fold)
        slope, offset = _fit(table, features, others, (weight, bias))
        mine = table.folds == fold
        held_out[mine] = features[mine] @ slope + np.float32(offset)
        report("detector: fitting", fold + 2, FOLDS + 1)
    topic = LinearHead(weight, bias, mean, scale)
    labels, chosen = table.labels, table.trains
    weights = class_weights(labels[chosen], table.importance[chosen])
    head = stack(topic, held_out[chosen], names[chosen], labels[chosen], weights)
    share = head.weight[: len(weight)] @ weight / max(float(weight @ weight), 1e-12)
    scores = share * (held_out - bias) + names @ head.weight[len(weight) :] + head.bias
    scores = entity_floor(scores, names)
    best = np.full(samples, -np.inf, np.float32)
    np.maximum.at(best, table.samples, scores.astype(np.float32))
    return head, best


def _fit(
    table: _Table,
    features: FloatArray,
    chosen: BoolArray,
    start: tuple[FloatArray, float] | None,
) -> tuple[FloatArray, float]:
    labels = table.labels[chosen]
    weights = class_weights(labels, table.importance[chosen])
    return fit_logistic(features[chosen], labels, weights, PENALTY, start)
