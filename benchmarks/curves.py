"""ROC curves and what is read off them, with intervals that stay honest at 0 and at 1.

Scores are higher the closer a text is to the forget set; positives are the texts to flag.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from benchmarks.report import Row
from classifiers.calibrate import wilson_interval
from guard.types import FloatArray

Scorer = Callable[[Sequence[str]], FloatArray]
"""Scores texts, shape (texts,); higher is closer to the forget set."""

Interval = tuple[float, float]

FPR_POINTS: Final = (0.001, 0.005, 0.01)
RESAMPLES: Final = 1000
Z95: Final = 1.959964


def roc(positives: FloatArray, negatives: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the ROC curve: false and true positive rates, from (0, 0) to (1, 1)."""
    scores = np.concatenate([positives, negatives])
    order = np.argsort(-scores, kind="stable")
    is_positive = np.arange(len(scores))[order] < len(positives)
    # Equal scores are flagged together: the curve has points only where the score changes.
    ranked = scores[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    tpr = np.cumsum(is_positive)[ends] / len(positives)
    fpr = np.cumsum(~is_positive)[ends] / len(negatives)
    return np.append(0.0, fpr).astype(np.float32), np.append(0.0, tpr).astype(np.float32)


def auroc(positives: FloatArray, negatives: FloatArray) -> float:
    """Return the chance that a positive scores above a negative; ties count half."""
    below, level = _placements(positives, negatives)
    return float(np.mean(below + 0.5 * level) / len(negatives))


def auroc_interval(positives: FloatArray, negatives: FloatArray) -> Interval:
    """Return the 95 % interval of `auroc`.

    DeLong, DeLong and Clarke-Pearson (1988), on the logit scale, which keeps it within (0, 1).
    Where their variance vanishes, as for a perfect ranking, the score interval of Newcombe (2006,
    "Confidence intervals for an effect size measure based on the Mann-Whitney statistic", method
    5) takes its place: [1, 1] would claim what no sample can show.
    """
    area, variance = auroc(positives, negatives), _delong_variance(positives, negatives)
    if not 0.0 < area < 1.0 or variance <= 0.0:
        return _newcombe(area, len(positives), len(negatives))
    half = Z95 * math.sqrt(variance) / (area * (1.0 - area))
    centre = math.log(area / (1.0 - area))
    return _expit(centre - half), _expit(centre + half)


def tpr_at_fpr(positives: FloatArray, negatives: FloatArray, fpr: float) -> float | None:
    """Return the share of positives flagged at the lowest threshold that keeps within `fpr`.

    Returns:
        None where there are fewer than 1 / `fpr` negatives: they can't show such a rate.
    """
    threshold = _threshold(negatives, fpr)
    return None if threshold is None else float(np.mean(positives > threshold))


def tpr_interval(
    positives: FloatArray, negatives: FloatArray, fpr: float, seed: int = 0
) -> Interval | None:
    """Return the 95 % interval of `tpr_at_fpr`.

    The threshold is itself an estimate, so both sides are drawn anew (percentile bootstrap); the
    Wilson interval at the fixed threshold is the least that is reported, since a bootstrap of
    flawless scores never sees an error.
    """
    threshold = _threshold(negatives, fpr)
    if threshold is None:
        return None
    flagged = int(np.sum(positives > threshold))
    low, high = wilson_interval(flagged, len(positives))
    rng = np.random.default_rng([seed, round(fpr * 1e6)])
    rates = np.empty(RESAMPLES)
    ordered, allowed = np.sort(positives), _allowed(negatives, fpr)
    for draw in range(RESAMPLES):
        limit = _exceeded_by(rng.choice(negatives, len(negatives)), allowed)
        beyond = len(ordered) - int(np.searchsorted(ordered, limit, side="right"))
        rates[draw] = rng.binomial(len(ordered), beyond / len(ordered)) / len(ordered)
    bottom, top = np.quantile(rates, [0.025, 0.975])
    return min(low, float(bottom)), max(high, float(top))


def score_rows(
    system: str,
    route: str,
    group: str,
    positives: FloatArray,
    negatives: FloatArray,
    seed: int = 0,
) -> list[Row]:
    """Return AUROC and the true positive rates at small false positive rates, as report rows."""
    both = len(positives) + len(negatives)
    low, high = auroc_interval(positives, negatives)
    rows = [Row(system, route, "auroc", group, auroc(positives, negatives), low, high, both)]
    for fpr in FPR_POINTS:
        value = tpr_at_fpr(positives, negatives, fpr)
        bottom, top = tpr_interval(positives, negatives, fpr, seed) or (None, None)
        measure = f"tpr_at_fpr_{fpr * 100:g}%"
        rows.append(Row(system, route, measure, group, value, bottom, top, len(positives)))
    return rows


def compare(
    systems: Mapping[str, Scorer],
    positives: Sequence[str],
    negatives: Sequence[str],
    *,
    group: str = "all",
    route: str = "score",
    seed: int = 0,
) -> list[Row]:
    """Score the same texts by several systems.

    Args:
        systems: Scorers by name.
        positives: Texts to flag.
        negatives: Texts to leave alone.
        group: Goes into the rows.
        route: Goes into the rows.
        seed: Of the bootstrap.

    Returns:
        The rows of `score_rows` for each system.
    """
    rows = []
    for name, score in systems.items():
        above, below = score(positives), score(negatives)
        rows += score_rows(name, route, group, above, below, seed)
    return rows


def share_row(system: str, route: str, measure: str, group: str, hits: int, total: int) -> Row:
    """Return a share with its Wilson interval, as a report row."""
    if not total:
        return Row(system, route, measure, group, None, None, None, 0)
    share, (low, high) = hits / total, wilson_interval(hits, total)
    low, high = min(low, share), max(high, share)  # which differ by rounding at 0 and 1
    return Row(system, route, measure, group, share, low, high, total)


def _threshold(negatives: FloatArray, fpr: float) -> float | None:
    """The score that at most `fpr` of the negatives exceed; None if that is less than one."""
    allowed = _allowed(negatives, fpr)
    return None if allowed < 1 else _exceeded_by(negatives, allowed)


def _allowed(negatives: FloatArray, fpr: float) -> int:
    return int(fpr * len(negatives) + 1e-9)


def _exceeded_by(scores: FloatArray, count: int) -> float:
    """The score that at most `count` of them exceed."""
    at = len(scores) - 1 - count
    return -math.inf if at < 0 else float(np.partition(scores, at)[at])


def _placements(scores: FloatArray, others: FloatArray) -> tuple[FloatArray, FloatArray]:
    """For each score how many of the others lie below it, and how many equal it."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, side="left")
    level = np.searchsorted(ordered, scores, side="right") - below
    return below.astype(np.float64), level.astype(np.float64)


def _delong_variance(positives: FloatArray, negatives: FloatArray) -> float:
    if min(len(positives), len(negatives)) < 2:
        return 0.0
    variance = 0.0
    for own, others in ((positives, negatives), (negatives, positives)):
        below, level = _placements(own, others)
        parts = (below + 0.5 * level) / len(others)
        variance += float(np.var(parts, ddof=1)) / len(own)
    return variance


def _newcombe(area: float, positives: int, negatives: int) -> Interval:
    """Solve |area - theta| = z sqrt(V(theta)) for theta on both sides of `area`."""
    mean = (positives + negatives) / 2.0

    def spread(theta: float) -> float:
        inner = 2 * mean - 1 - (3 * mean - 3) / ((2 - theta) * (1 + theta))
        return Z95 * math.sqrt(max(0.0, theta * (1 - theta) * inner) / (positives * negatives))

    def solve(outside: float) -> float:
        inside = area
        for _ in range(60):
            middle = (inside + outside) / 2.0
            if abs(area - middle) <= spread(middle):
                inside = middle
            else:
                outside = middle
        return inside

    return solve(0.0) if area > 0.0 else 0.0, solve(1.0) if area < 1.0 else 1.0


def _expit(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))
