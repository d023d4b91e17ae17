"""Thresholds, p-values and soft weights from held-out scores.

A budget of 0.1 % is finer than a few thousand benign texts can show, so the tail of their scores is
modelled: beyond a high quantile the excesses follow a generalised Pareto distribution (Pickands
1975), fitted by probability-weighted moments (Hosking and Wallis 1987). The decision itself is
ECO's simple thresholding (arXiv 2406.07933); the conformal variant can take the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from guard.errors import ArtifactError, DataError, NotFittedError
from guard.types import FloatArray, IntArray

TAIL_SHARE = 0.05
MIN_TAIL = 20
SHAPE_RANGE = (0.0, 0.1)
"""A negative shape would promise that no benign text ever scores above some bound; a heavy one
would let three odd texts decide what one in a million does."""

KEPT_SCORES = 160
"""Benign scores kept of each target: what can be the highest of a request."""

FAR = 1e6
"""Stands for infinity in files."""

LEAST_SCORE, LEAST_SCORE_KEPT = 4.5, 1.0
"""Log-odds below which no request is flagged, however quiet benign traffic is: the target's
neighbours are not among it. Lower where retain texts tell what they score."""

RETAIN_BUDGET = 0.005
"""Share of held-out retain texts that may be flagged."""

ONE_SIDED_Z = 1.645

MIN_COUNTED = 3
"""Benign texts beyond a threshold from which they are counted; fewer, and the tail model speaks."""

GAP_QUANTILE, GAP_SHARE, GAP_MOST = 0.05, 0.5, 1.0
"""Where forget scores leave a gap above the budget's threshold, it moves this share of the way to
this quantile of theirs, by half of GAP_MOST at most: real traffic is more varied than any set."""

WEIGHT_FLOOR = 0.5
"""Weight of a request that only just reaches the threshold; 1 at the median of forget scores."""


@dataclass(frozen=True, slots=True)
class TargetCalibration:
    """What is known of one target's scores, from held-out texts.

    Attributes:
        ids: Benign texts with the highest scores, by number, shape (kept,).
        scores: Their scores, falling, shape (kept,).
        benign: Number of benign texts.
        retain: Least threshold that keeps the retain texts' budget; -inf without retain texts.
        forget_low: Low quantile of forget scores, -inf if there are none.
        forget_median: Their median.
    """

    ids: IntArray
    scores: FloatArray
    benign: int
    retain: float
    forget_low: float
    forget_median: float

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return the calibration as arrays, for safetensors."""
        finite = [max(value, -FAR) for value in (self.retain, self.forget_low, self.forget_median)]
        return {
            "calibration": np.array([self.benign, *finite], np.float32),
            "benign_ids": self.ids.astype(np.int32),
            "benign_scores": self.scores,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> TargetCalibration:
        """Read what `to_arrays` gave.

        Raises:
            ArtifactError: If an array is missing, of the wrong shape or not finite.
        """
        try:
            numbers, ids, scores = (
                arrays[key] for key in ("calibration", "benign_ids", "benign_scores")
            )
        except KeyError as error:
            raise ArtifactError(f"the target's calibration lacks the array {error}") from error
        fits = numbers.shape == (4,) and ids.shape == scores.shape and ids.ndim == 1
        fits = fits and all(0 <= number < numbers[0] for number in ids.tolist())
        if not fits or not (np.isfinite(numbers).all() and np.isfinite(scores).all()):
            raise ArtifactError("the target's calibration is damaged; add the target again")
        benign, retain, low, median = (float(value) for value in numbers)
        return cls(ids.astype(np.int64), scores, int(benign), retain, low, median)


def fit_target(
    benign: FloatArray,
    naming: Sequence[int],
    forget: FloatArray,
    retain: FloatArray,
    texts: int,
) -> TargetCalibration:
    """Keep what a bundle needs to know of one target's held-out scores.

    Args:
        benign: Score of each benign text, shape (texts,).
        naming: Benign texts that name the target in full: they are no false alarms.
        forget: Scores of held-out forget rows and their variants.
        retain: Scores of retain texts; may be empty.
        texts: Number of benign texts.

    Raises:
        NotFittedError: If a score is not finite.
    """
    if not all(np.isfinite(scores).all() for scores in (benign, forget, retain)):
        raise NotFittedError("the classifier gives scores that are not finite")
    own = benign.copy()
    own[list(naming)] = -FAR
    ids = np.argsort(-own, kind="stable")[:KEPT_SCORES]
    bound = _above(float(np.quantile(retain, 1.0 - RETAIN_BUDGET))) if len(retain) else -FAR
    low = float(np.quantile(forget, GAP_QUANTILE)) if len(forget) else -FAR
    median = float(np.median(forget)) if len(forget) else -FAR
    return TargetCalibration(ids, own[ids].astype(np.float32), texts, bound, low, median)


@dataclass(frozen=True, slots=True)
class BundleCalibration:
    """What the scores of a bundle's targets mean, together.

    Attributes:
        thresholds: Score from which each target is hit, shape (targets,).
        base: Score on the common scale from which a request is flagged.
        offsets: What is taken off each target's score on the common scale, shape (targets,).
        tail: Start, share, scale and shape of the benign requests' tail on the common scale.
        medians: Median forget score of each target, shape (targets,).
    """

    thresholds: FloatArray
    base: float
    offsets: FloatArray
    tail: tuple[float, float, float, float]
    medians: FloatArray

    def raised(self, least: Sequence[float]) -> BundleCalibration:
        """Return the same with no threshold below those given, one for each target."""
        bound = np.asarray(least, np.float32)
        return replace(self, thresholds=np.maximum(self.thresholds, bound))

    def p_value(self, target: int, score: float) -> float:
        """Return the share of benign requests that reach this score for any target."""
        start, share, scale, shape = self.tail
        excess = max(score - float(self.offsets[target]) - start, 0.0) / scale
        if shape > 1e-6:
            survival = (1.0 + shape * excess) ** (-1.0 / shape)
        else:
            survival = math.exp(-min(excess, 700.0))
        return float(np.clip(share * survival, 1e-12, 1.0))

    def weight(self, target: int, score: float) -> float:
        """Return the `monotone` soft weight: 0 below the threshold, 1 from the forget median on."""
        threshold = float(self.thresholds[target])
        if score < threshold:
            return 0.0
        reach = max(float(self.medians[target]) - threshold, 1e-6)
        slope = WEIGHT_FLOOR + (1.0 - WEIGHT_FLOOR) * (score - threshold) / reach
        return float(min(max(slope, WEIGHT_FLOOR), 1.0))


def fit_bundle(
    targets: Sequence[TargetCalibration], budget: float, most: float = FAR
) -> BundleCalibration:
    """Set every target's threshold so that the bundle as a whole keeps the budget.

    A request is flagged if any target is hit, so the scores that count are the maxima over all
    targets. A target whose own benign tail is heavier than others' (its name is a common word)
    gets an offset, so that it does not use up the budget of all. Adding a target changes
    thresholds and nothing else.

    Args:
        targets: The targets of the bundle.
        budget: Share of benign requests that may be flagged, in (0, 1); kept with 95 % confidence.
        most: Score from which a target is hit in any case, unless its retain texts score as high.
            The tail of one target among thousands may lie far beyond all scores ever seen.

    Raises:
        DataError: If the budget is not a share, or the targets were calibrated on different sets.
    """
    if not 0.0 < budget < 1.0:
        raise DataError(f"the false-positive budget is {budget}; it must lie between 0 and 1")
    if not targets:
        empty = np.zeros(0, np.float32)
        return BundleCalibration(empty, 0.0, empty, (0.0, TAIL_SHARE, 1.0, 0.0), empty)
    texts = targets[0].benign
    if any(target.benign != texts for target in targets):
        raise DataError("the targets were calibrated on benign sets of different sizes")
    own = cautious_budget(budget, texts) / math.sqrt(len(targets))
    needed = np.array([_tail_score(target, own) for target in targets], np.float32)
    offsets = np.maximum(needed - np.median(needed), 0.0)
    best = np.full(texts, -FAR, np.float32)
    for target, offset in zip(targets, offsets, strict=True):
        np.maximum.at(best, target.ids, target.scores - offset)
    seen = best[best > -FAR]
    tail = fit_tail(seen, min(TAIL_SHARE, KEPT_SCORES / texts), texts)
    base = max(tail_quantile(best, cautious_budget(budget, texts), tail), LEAST_SCORE_KEPT)
    thresholds = base + offsets
    for number, target in enumerate(targets):
        room = target.forget_low - float(thresholds[number])
        thresholds[number] += GAP_SHARE * min(max(0.0, room), GAP_MOST)
        thresholds[number] = min(float(thresholds[number]), most)
        # Without retain texts nothing is known of the neighbours: be careful.
        least = target.retain if target.retain > -FAR else LEAST_SCORE
        thresholds[number] = max(float(thresholds[number]), least)
    medians = np.array([target.forget_median for target in targets], np.float32)
    return BundleCalibration(
        thresholds.astype(np.float32), float(base), offsets.astype(np.float32), tail, medians
    )


def _tail_score(target: TargetCalibration, share: float) -> float:
    """Return the score that a share of benign texts reaches for one target."""
    known = target.scores[target.scores > -FAR]
    if len(known) < MIN_COUNTED:
        return float(known.max()) if len(known) else LEAST_SCORE
    tail = fit_tail(known, TAIL_SHARE, target.benign)
    return tail_quantile(known, share, tail, target.benign)


def cautious_budget(budget: float, count: int) -> float:
    """Return the share to aim at so that the budget holds with 95 % confidence.

    The largest share whose one-sided Wilson bound over `count` texts stays within the budget
    (Poisson limit: hits + z²/2 + z·sqrt(hits + z²/4) = budget·count), but at least a quarter of it,
    where the tail model speaks rather than the count.
    """
    room = budget * count
    return max(budget / 4.0, (room - ONE_SIDED_Z * math.sqrt(room)) / count)


def fit_tail(scores: FloatArray, share: float, texts: int) -> tuple[float, float, float, float]:
    """Fit a generalised Pareto tail to the highest scores; returns start, share, scale, shape.

    Args:
        scores: The highest scores at least, in any order.
        share: Share of the texts that make up the tail.
        texts: Number of texts that were scored.
    """
    ranked = np.sort(scores.astype(np.float64))
    count = min(max(round(share * texts), MIN_TAIL), max(1, len(ranked) - 1))
    start = float(ranked[-count - 1]) if len(ranked) > count else float(ranked[0])
    excess = ranked[-count:] - start
    mean = float(excess.mean())
    if mean <= 1e-9:
        return start, count / texts, 1e-6, 0.0
    places = (np.arange(count, 0, -1) - 0.35) / count
    moment = float((places * excess).mean())
    # With c = -shape: mean = scale / (1 + c), moment = scale / (2 * (2 + c)).
    shape = 2.0 - mean / max(mean - 2.0 * moment, 1e-9)
    shape = float(np.clip(shape, *SHAPE_RANGE))
    return start, count / texts, mean * (1.0 - shape), shape


def tail_quantile(
    scores: FloatArray,
    share: float,
    tail: tuple[float, float, float, float],
    texts: int | None = None,
) -> float:
    """Return the score that a share of benign texts reaches.

    Args:
        scores: Scores of the texts; the highest at least.
        share: The share.
        tail: What `fit_tail` returned.
        texts: Number of texts that were scored, if `scores` holds the highest only.
    """
    start, held, scale, shape = tail
    total = len(scores) if texts is None else texts
    if share * total >= MIN_COUNTED:
        ranked = np.sort(scores)[::-1]
        place = min(int(share * total), len(ranked) - 1)
        # Above this one, not at it: a request that ties with it is one too many.
        return _above(ranked[place])
    ratio = held / share
    if ratio <= 1.0:
        return start
    if shape > 1e-6:
        return float(start + scale / shape * (ratio**shape - 1.0))
    return start + scale * math.log(ratio)


def _above(score: float) -> float:
    """Return the least 32-bit number beyond a score."""
    return float(np.nextafter(np.float32(score), np.float32(np.inf)))


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share; (0, 1) without observations."""
    if total <= 0:
        return 0.0, 1.0
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2.0) / (1.0 + spread)
    half = z / (1.0 + spread) * math.sqrt(share * (1.0 - share) / total + spread / total / 4.0)
    return max(0.0, centre - half), min(1.0, centre + half)
