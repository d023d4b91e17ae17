"""Thresholds, p-values and soft weights from held-out scores.

A budget of 0.1 % is finer than a few thousand benign texts can show, so the tail of their scores is
modelled: beyond a high quantile the excesses follow a generalised Pareto distribution (Pickands
1975), fitted by probability-weighted moments (Hosking and Wallis 1987). The decision itself is
ECO's simple thresholding (arXiv 2406.07933); the conformal variant can take the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from guard.errors import ArtifactError, DataError, NotFittedError
from guard.types import FloatArray

TAIL_SHARE = 0.05
MIN_TAIL = 20
SHAPE_RANGE = (0.0, 0.25)
"""A negative shape would promise that no benign text ever scores above some bound."""

QUANTILES = 101
RETAIN_BUDGET = 0.05
"""Share of the texts to keep that may be flagged: they were chosen to be as close as can be."""

ONE_SIDED_Z = 1.645

MIN_COUNTED = 3
"""Benign texts beyond a threshold from which they are counted; fewer, and the tail model speaks."""

GAP_QUANTILE, GAP_SHARE = 0.05, 0.5
"""Where forget scores leave a gap above the budget's threshold, it moves this share of the way to
this quantile of theirs: real traffic is more varied than any benign set."""

WEIGHT_FLOOR = 0.5
"""Weight of a request that only just reaches the threshold; 1 at the median of forget scores."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a score of one target means.

    Attributes:
        threshold: Logit from which a request is flagged.
        median_forget: Median logit of held-out forget rows; the soft weight is 1 from there on.
        quantiles: Scores of held-out benign texts at evenly spaced probabilities.
        tail_start: Score beyond which the tail model speaks.
        tail_share: Share of benign texts beyond it.
        tail_scale: Scale of the generalised Pareto distribution.
        tail_shape: Its shape; 0 is an exponential tail.
    """

    threshold: float
    median_forget: float
    quantiles: FloatArray
    tail_start: float
    tail_share: float
    tail_scale: float
    tail_shape: float

    def p_values(self, scores: FloatArray) -> FloatArray:
        """Return the share of benign traffic that scores at least as high, any shape."""
        levels = np.linspace(0.0, 1.0, len(self.quantiles))
        body = 1.0 - np.interp(scores, self.quantiles, levels)
        excess = np.maximum(scores - self.tail_start, 0.0) / self.tail_scale
        if self.tail_shape > 1e-6:
            survival = (1.0 + self.tail_shape * excess) ** (-1.0 / self.tail_shape)
        else:
            survival = np.exp(-excess)
        tail = self.tail_share * survival
        out = np.where(scores >= self.tail_start, tail, np.maximum(body, self.tail_share))
        return np.asarray(np.clip(out, 1e-12, 1.0), np.float32)

    def weights(self, scores: FloatArray) -> FloatArray:
        """Return the `monotone` soft weight: exactly 0 below the threshold, 1 from the median on.

        Paper: O3 (arXiv 2407.10223) has a two-sided weight that is never 0; this one is neither.
        """
        reach = max(self.median_forget - self.threshold, 1e-6)
        slope = WEIGHT_FLOOR + (1.0 - WEIGHT_FLOOR) * (scores - self.threshold) / reach
        out = np.where(scores >= self.threshold, np.clip(slope, WEIGHT_FLOOR, 1.0), 0.0)
        return np.asarray(out, np.float32)

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return the calibration as arrays, for safetensors."""
        scalars = [
            self.threshold,
            self.median_forget,
            self.tail_start,
            self.tail_share,
            self.tail_scale,
            self.tail_shape,
        ]
        return {
            "calibration": np.array(scalars, np.float32),
            "quantiles": np.asarray(self.quantiles, np.float32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> Calibration:
        """Read what `to_arrays` gave.

        Raises:
            ArtifactError: If an array is missing, of the wrong shape or not finite.
        """
        try:
            scalars, quantiles = arrays["calibration"], arrays["quantiles"]
        except KeyError as error:
            raise ArtifactError(f"the detector head lacks the array {error}") from error
        good = scalars.shape == (6,) and quantiles.ndim == 1 and len(quantiles) >= 2
        if not good or not np.isfinite([*scalars, *quantiles]).all():
            raise ArtifactError("the detector head's calibration is damaged; add the target again")
        threshold, median, start, share, scale, shape = (float(value) for value in scalars)
        return cls(threshold, median, quantiles, start, share, scale, shape)


def fit_calibration(
    benign: FloatArray, forget: FloatArray, budget: float, retain: FloatArray | None = None
) -> Calibration:
    """Fit the benign tail and set the threshold to keep a false-positive budget.

    Args:
        benign: Held-out scores of benign requests, the maximum over each text's windows, (n,).
        forget: Held-out scores of forget rows, (m,).
        budget: Share of benign requests that may be flagged, in (0, 1); kept with 95 % confidence.
        retain: Held-out scores of texts to keep, (k,); the threshold rises, if need be, so far
            that at most `max(budget, RETAIN_BUDGET)` of them are flagged.

    Raises:
        DataError: If the budget is not a share or there are fewer than 2 * MIN_TAIL benign scores.
        NotFittedError: If a score is not finite.
    """
    if not 0.0 < budget < 1.0:
        raise DataError(f"the false-positive budget is {budget}; it must lie between 0 and 1")
    if len(benign) < 2 * MIN_TAIL or not len(forget):
        raise DataError(
            f"{len(benign)} benign and {len(forget)} forget texts are left for calibration; at "
            f"least {2 * MIN_TAIL} and 1 are needed: give a larger benign file"
        )
    if not (np.isfinite(benign).all() and np.isfinite(forget).all()):
        raise NotFittedError("the classifier gives scores that are not finite")
    start, share, scale, shape = fit_tail(benign)
    cautious = cautious_budget(budget, len(benign))
    threshold = tail_quantile(benign, cautious, (start, share, scale, shape))
    if retain is not None and len(retain):
        threshold = max(threshold, float(np.quantile(retain, 1.0 - max(budget, RETAIN_BUDGET))))
    room = float(np.quantile(forget, GAP_QUANTILE)) - threshold
    threshold += GAP_SHARE * max(0.0, room)
    quantiles = np.quantile(benign, np.linspace(0.0, 1.0, QUANTILES))
    median = float(np.median(forget))
    return Calibration(threshold, median, quantiles.astype(np.float32), start, share, scale, shape)


def cautious_budget(budget: float, count: int) -> float:
    """Return the share to aim at so that the budget holds with 95 % confidence.

    The largest share whose one-sided Wilson bound over `count` texts stays within the budget
    (Poisson limit: hits + z²/2 + z·sqrt(hits + z²/4) = budget·count), but at least a quarter of it,
    where the tail model speaks rather than the count.
    """
    room = budget * count
    return max(budget / 4.0, (room - ONE_SIDED_Z * math.sqrt(room)) / count)


def fit_tail(scores: FloatArray) -> tuple[float, float, float, float]:
    """Fit a generalised Pareto tail; returns start, share, scale and shape."""
    count = min(max(round(TAIL_SHARE * len(scores)), MIN_TAIL), len(scores) // 2)
    ranked = np.sort(scores.astype(np.float64))
    start = float(ranked[-count - 1])
    excess = ranked[-count:] - start
    mean = float(excess.mean())
    if mean <= 1e-9:
        return start, count / len(scores), 1e-6, 0.0
    places = (np.arange(count, 0, -1) - 0.35) / count
    moment = float((places * excess).mean())
    # With c = -shape: mean = scale / (1 + c), moment = scale / (2 * (2 + c)).
    shape = 2.0 - mean / max(mean - 2.0 * moment, 1e-9)
    shape = float(np.clip(shape, *SHAPE_RANGE))
    return start, count / len(scores), mean * (1.0 - shape), shape


def tail_quantile(
    scores: FloatArray, budget: float, tail: tuple[float, float, float, float]
) -> float:
    """Return the score that a share `budget` of benign texts reaches."""
    start, share, scale, shape = tail
    if budget >= share or budget * len(scores) >= MIN_COUNTED:
        return float(np.quantile(scores, 1.0 - budget))
    ratio = share / budget
    if shape > 1e-6:
        return float(start + scale / shape * (ratio**shape - 1.0))
    return start + scale * math.log(ratio)


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share; (0, 1) without observations."""
    if total <= 0:
        return 0.0, 1.0
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2.0) / (1.0 + spread)
    half = z / (1.0 + spread) * math.sqrt(share * (1.0 - share) / total + spread / total / 4.0)
    return max(0.0, centre - half), min(1.0, centre + half)
