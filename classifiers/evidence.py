"""What speaks for a target in one window of a text, and how much of it is enough.

Of eight numbers per window and target, seven are fused by one logistic function that is the same
for every target and every bundle; the last caps it. It was fitted on generated targets
(`classifiers.fit_fusion`), which no benchmark holds: a forget set of one sentence leaves nothing to
fit a fusion of its own on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from classifiers.lexical_reading import FEATURES as LEXICAL
from classifiers.lexicon import STRONG
from classifiers.space import unit
from classifiers.topic import apply
from guard.types import FloatArray

NAMES = ("cosine", "topic", "single", "full", "sum", "strong", "foreign", "beside")
"""Columns of evidence: cosine to the nearest forget row in the shared space; topic head's score in
standard deviations of benign text; and the lexicon's six (`LexicalReading.features`)."""

QUOTED_LOGIT = 30.0
"""Score of a text that quotes the forget set word for word."""

TOPIC_MOST = 6.0
"""A topic can't be closer than this, in standard deviations of benign text."""

NAMED_LOGIT = 8.0
"""Least score of a window that names the target in full, whatever its topic: nobody can be let
through who names the target. Calibration sees it too, so the budget still holds."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """Weights of evidence and of its products, and the intercept; see `docs/detection.md`."""

    weights: tuple[float, ...]
    bias: float


SIGNS = (1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1)
"""Of each term's weight: more of a thing that speaks for the target never speaks against it."""


def terms(evidence: FloatArray) -> FloatArray:
    """Return evidence and the products that the fusion weighs, shape (rows, terms).

    A closeness that is expected among neighbours says little until it is high, hence the hinges;
    a term says more where the topic fits too, hence the products.
    """
    cosine, topic = evidence[:, 0], np.clip(evidence[:, 1], -2.0, TOPIC_MOST)
    single, full, total, strong, foreign = (evidence[:, n] for n in range(2, 7))  # `beside` caps
    lexical = (total > 0).astype(np.float32)
    columns = [
        cosine,
        np.maximum(cosine - 0.5, 0.0),
        np.maximum(cosine - 0.75, 0.0),
        topic,
        single / 10.0,
        full / 10.0,
        total,
        strong,
        foreign,
        foreign * cosine,
        lexical * cosine,
        lexical * topic,
        (full > 0) * cosine,
    ]
    return np.stack(columns, axis=1).astype(np.float32)


NEAR_ROW, BESIDE_LOGIT = 0.8, 4.0
"""Cosine to a forget row from which a window is about what that row says, and the most that a
window scores below it if all that points at the target is known beside it: a person's employer has
a life of its own. Less than flags a text where nothing is known of the target's neighbours."""

PARTLY, PART_LOGIT = 4.8, 5.0
"""Weight of a rare part of the target's name, and the least score of a window that holds it: enough
in a small bundle, and left to the budget in one of thousands of people."""


def fuse(evidence: FloatArray, fusion: Fusion) -> FloatArray:
    """Return the log-odds of each row of evidence, shape (rows, 8) -> (rows,)."""
    logits = terms(evidence) @ np.array(fusion.weights, np.float32) + np.float32(fusion.bias)
    beside = (evidence[:, 7] > 0) & (evidence[:, 0] < NEAR_ROW)
    logits = np.where(beside, np.minimum(logits, BESIDE_LOGIT), logits)
    full = evidence[:, 3]
    floor = np.select([full >= STRONG, full >= PARTLY], [NAMED_LOGIT, PART_LOGIT], -np.inf)
    return np.asarray(np.maximum(logits, floor), np.float32)


def most(single: float, full: float, total: float, strong: int, fusion: Fusion) -> float:
    """Return the highest log-odds that a text with these terms can reach, whatever its topic."""
    return float(most_of_each([(single, full, total, strong)], fusion)[0])


def most_of_each(pointers: Sequence[tuple[float, float, float, int]], fusion: Fusion) -> FloatArray:
    """Return `most` of several at once, shape (pointers,): a common name points at many targets."""
    evidence = np.array(
        [
            (1.0, TOPIC_MOST, single, full, math.log1p(total), min(strong, 3), 0.0, 0.0)
            for single, full, total, strong in pointers
        ],
        np.float32,
    ).reshape(-1, 2 + LEXICAL)
    named = evidence[:, 3] >= STRONG
    return np.asarray(
        np.where(named, NAMED_LOGIT + QUOTED_LOGIT, fuse(evidence, fusion)), np.float32
    )


def gather(
    rows: FloatArray,
    prototypes: FloatArray,
    head: FloatArray,
    spread: float,
    lexical: FloatArray,
    units: FloatArray | None = None,
) -> FloatArray:
    """Put one target's evidence together, shape (windows, 8).

    Args:
        rows: Windows in the shared space, shape (windows, dimensions).
        prototypes: The target's rows at length 1, shape (prototypes, dimensions).
        head: Its topic head, shape (dimensions + 1,).
        spread: Standard deviation of the head's score over benign windows.
        lexical: The lexicon's numbers, shape (windows, 6).
        units: The rows at length 1, if they are known.
    """
    out = np.empty((len(rows), 2 + LEXICAL), np.float32)
    out[:, 0] = nearest(unit(rows) if units is None else units, prototypes)
    out[:, 1] = apply(head, rows) / spread
    out[:, 2:] = lexical
    return out


def nearest(units: FloatArray, prototypes: FloatArray) -> FloatArray:
    """Return the highest cosine of each direction to a prototype, shape (rows,); -1 without any."""
    if not len(prototypes):
        return np.full(len(units), -1.0, np.float32)
    return np.asarray((units @ prototypes.T).max(axis=1), np.float32)
