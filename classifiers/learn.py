"""Learn one target's detector: lexicon, prompt classifier, calibration.

Everything that calibrates is held out: folds share no source row, and each fold's texts are seen
through a lexicon that was made without them. The final head is then fitted on all folds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from classifiers.calibrate import Calibration, fit_calibration, wilson_interval
from classifiers.detector import TargetArtifact
from classifiers.eco import LinearHead, Standardiser, class_weights, fit_head
from classifiers.encoder import OnnxEncoder
from classifiers.lexicon import (
    FEATURES,
    Lexicon,
    Words,
    build_lexicon,
    count_known,
    count_terms,
    find_names,
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
FULL = FOLDS
"""Index of the lexicon that is made of all rows."""


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


@dataclass(slots=True)
class _Material:
    """The cleaned texts of one target, and their folds."""

    forget: list[_Row]
    retain: list[str]
    benign: list[str]
    forget_folds: NDArray[np.int64] = field(init=False)
    retain_folds: NDArray[np.int64] = field(init=False)
    benign_folds: NDArray[np.int64] = field(init=False)

    def deal(self, rng: np.random.Generator) -> None:
        """Deal every row into a fold, equally many to each."""
        self.forget_folds = rng.permutation(np.arange(len(self.forget)) % FOLDS)
        self.retain_folds = rng.permutation(np.arange(len(self.retain)) % FOLDS)
        self.benign_folds = rng.permutation(np.arange(len(self.benign)) % FOLDS)


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
    material.deal(rng)
    report("detector: names", 0, 1)
    lexicons = _lexicons(material, encoder)
    report("detector: names", 1, 1)
    samples, folds = _samples(material, lexicons[FULL], rng)
    table = _encode(samples, folds, lexicons, encoder, report)
    head, held_out = _cross_fit(table, len(samples), report)
    scored = _Scored.collect(samples, held_out)
    calibration = fit_calibration(scored.benign, scored.forget, fpr_budget, scored.retain)
    artifact = TargetArtifact(name, head, calibration, lexicons[FULL], encoder.source_hash)
    figures = _report(material, lexicons[FULL], scored, calibration, fpr_budget)
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


def _lexicons(material: _Material, encoder: OnnxEncoder) -> list[Lexicon]:
    """Make a lexicon without each fold, and last the one of all rows."""
    texts = [f"{row.prompt}\n{row.answer or ''}" for row in material.forget]
    names = find_names(texts)
    mine = [term_candidates(text) for text in texts]
    terms: set[Words] = set().union(*mine)
    others = count_known([*material.retain, *material.benign], terms)
    other_folds = np.concatenate([material.retain_folds, material.benign_folds])
    forget_all, others_all = count_terms(mine), count_terms(others)
    found = []
    for fold in range(FOLDS + 1):
        forget_part = count_terms(_of_fold(mine, material.forget_folds, fold))
        other_part = count_terms(_of_fold(others, other_folds, fold))
        weights = build_lexicon(
            forget_all - forget_part,
            others_all - other_part,
            names.__contains__,
            encoder.word_rank,
        )
        found.append(Lexicon(weights, encoder.is_common))
    return found


def _of_fold(
    items: Sequence[set[Words]], folds: NDArray[np.int64], fold: int
) -> Iterator[set[Words]]:
    return (item for item, place in zip(items, folds, strict=True) if place == fold)


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


def _encode(
    samples: Sequence[Sample],
    folds: NDArray[np.int64],
    lexicons: Sequence[Lexicon],
    encoder: OnnxEncoder,
    report: Progress,
) -> _Table:
    inputs, places, importance, trains = [], [], [], []
    for first in range(0, len(samples), ENCODE_AT_ONCE):
        part = samples[first : first + ENCODE_AT_ONCE]
        encoded = encoder.encode([sample.text for sample in part])
        for number, (sample, text) in enumerate(zip(part, encoded, strict=True), start=first):
            names = lexicons[int(folds[number])].features(sample.text, text.windows)
            seen = _overlaps(sample, text.windows)
            inputs.append(np.concatenate([text.features, names], axis=1))
            places.extend([number] * len(text.windows))
            trains.extend(seen)
            importance.extend([1.0 / np.sqrt(max(1, sum(seen)))] * len(text.windows))
        report("detector: encoding", min(first + len(part), len(samples)), len(samples))
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
    standardiser = Standardiser.fit(table.inputs[table.trains], FEATURES)
    table.inputs -= standardiser.mean
    table.inputs /= standardiser.scale
    head = _fit(table, table.trains, standardiser, None)
    report("detector: fitting", 1, FOLDS + 1)
    held_out = np.full(samples, -np.inf, np.float32)
    for fold in range(FOLDS):
        other = _fit(table, table.trains & (table.folds != fold), standardiser, head)
        mine = table.folds == fold
        scores = table.inputs[mine] @ other.weight + np.float32(other.bias)
        np.maximum.at(held_out, table.samples[mine], scores)
        report("detector: fitting", fold + 2, FOLDS + 1)
    return head, held_out


def _fit(
    table: _Table, chosen: BoolArray, standardiser: Standardiser, start: LinearHead | None
) -> LinearHead:
    labels = table.labels[chosen]
    weights = class_weights(labels, table.importance[chosen])
    return fit_head(table.inputs[chosen], labels, weights, standardiser, start=start)


@dataclass(frozen=True, slots=True)
class _Scored:
    """Held-out scores by kind of sample; benign and retain texts plain, as they would come in."""

    forget: FloatArray
    variants: FloatArray
    retain: FloatArray
    benign: FloatArray
    neighbours: FloatArray

    @classmethod
    def collect(cls, samples: Sequence[Sample], scores: FloatArray) -> _Scored:
        kinds = np.array([sample.kind for sample in samples])
        return cls(
            *(scores[kinds == k] for k in ("plain", "variant", "retain", "benign", "neighbour"))
        )


def _report(
    material: _Material,
    lexicon: Lexicon,
    scored: _Scored,
    calibration: Calibration,
    budget: float,
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "method": "eco",
        "forget_rows": len(material.forget),
        "retain_texts": len(material.retain),
        "benign_texts": len(material.benign),
        "lexicon_terms": len(lexicon.weights),
        "fpr_budget": budget,
        "folds": FOLDS,
        "threshold": calibration.threshold,
        "median_forget": calibration.median_forget,
    }
    rates = {
        "recall": scored.forget,
        "recall_variants": scored.variants,
        "fpr_benign": scored.benign,
        "fpr_retain": scored.retain,
        "fpr_synthetic_neighbours": scored.neighbours,
    }
    for key, scores in rates.items():
        hits = int((scores >= calibration.threshold).sum())
        low, high = wilson_interval(hits, len(scores))
        figures[key] = {
            "hits": hits,
            "n": len(scores),
            "rate": hits / len(scores) if len(scores) else None,
            "interval95": [low, high],
        }
    return figures
