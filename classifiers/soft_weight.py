"""O3's soft weight: how strongly an adapter acts, from how usual a score is for forget texts.

Two Gaussians are fitted to in-distribution scores, those of the texts that the detector was fitted
on ("used") and those of held-out forget texts ("rest"); half-half they make a mixture with the
distribution function P. With x' the mirror point of x about the mid-point x0,

    p = 1 - max(P(x), P(x')) + min(P(x), P(x')),    w = sigmoid(10 p - 2).

As written this is two-sided (a text closer to the forget set than x0 loses weight again) and never
below sigmoid(-2) = 0.119, so that the adapter always acts; hence three named policies.
Paper: Gao et al. 2025, arXiv 2407.10223. Differs from the reference code: see `CUTOFFS`; and none
of the parameters here is fitted on test data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from guard.errors import ArtifactError, DataError, NotFittedError, UnknownComponentError
from guard.types import FloatArray, WeightPolicy

STEEPNESS, SHIFT = 10.0, -2.0
"""The paper's zeta, and the offset inside its sigmoid."""

WEIGHT_FLOOR = 0.5
"""`monotone` weight of a text that only just reaches the threshold."""

MIN_SIGMA = 1e-6

CUTOFFS: Final[Mapping[str, tuple[tuple[float, float], ...]]] = MappingProxyType(
    {"tofu": ((0.32, 1.0),), "sciqa": ((0.9, 1.2),)}
)
"""`o3-code`: per data set, (soft weight from which, hard weight). Released code; below, 0."""

Doubles = NDArray[np.float64]

_cdf = np.frompyfunc(lambda z: 0.5 * math.erfc(-z / math.sqrt(2.0)), 1, 1)


@dataclass(frozen=True, slots=True)
class SoftWeight:
    """Turns scores (higher = closer to the forget set) into adapter weights.

    Attributes:
        used_mean: Mean score of the texts that the detector was fitted on.
        used_sigma: Their standard deviation, > 0.
        rest_mean: Mean score of held-out forget texts.
        rest_sigma: Their standard deviation, > 0.
        threshold: Score from which a text is flagged.
        median: Median score of held-out forget texts.
    """

    used_mean: float
    used_sigma: float
    rest_mean: float
    rest_sigma: float
    threshold: float
    median: float

    @classmethod
    def fit(cls, used: FloatArray, rest: FloatArray, miss_share: float) -> SoftWeight:
        """Fit both Gaussians and the threshold; forget texts alone are looked at.

        Args:
            used: Scores of the texts that the detector was fitted on, shape (n,).
            rest: Scores of held-out forget texts, shape (m,).
            miss_share: Share of held-out forget texts that the threshold leaves unflagged.

        Raises:
            DataError: If there is no score, or the share is not in [0, 1).
            NotFittedError: If a score is not finite.
        """
        if not len(used) or not len(rest) or not 0.0 <= miss_share < 1.0:
            raise DataError(
                f"{len(used)} fitted and {len(rest)} held-out forget scores with a miss share of "
                f"{miss_share}; at least one of each and a share in [0, 1) are needed"
            )
        if not (np.isfinite(used).all() and np.isfinite(rest).all()):
            raise NotFittedError("the O3 detector gives scores that are not finite")
        return cls(
            float(np.mean(used, dtype=np.float64)),
            max(float(np.std(used, dtype=np.float64)), MIN_SIGMA),
            float(np.mean(rest, dtype=np.float64)),
            max(float(np.std(rest, dtype=np.float64)), MIN_SIGMA),
            # "lower": a score that occurs, so that exactly the promised share lies below.
            float(np.quantile(rest, miss_share, method="lower")),
            float(np.median(rest)),
        )

    @property
    def centre(self) -> float:
        """The mid-point x0 of the two means."""
        return 0.5 * (self.used_mean + self.rest_mean)

    def flags(self, scores: FloatArray) -> NDArray[np.bool_]:
        """True where a text is flagged; any shape."""
        # In double precision, as the weights are: or a flagged text could weigh nothing.
        return np.asarray(np.asarray(scores, np.float64) >= self.threshold, np.bool_)

    def mixture_cdf(self, scores: FloatArray | Doubles, *, shared_sigma: bool = False) -> Doubles:
        """Return P at each score, in [0, 1].

        Args:
            scores: Any shape.
            shared_sigma: Give both Gaussians the held-out sigma, as the released code does.
        """
        used_sigma = self.rest_sigma if shared_sigma else self.used_sigma
        x = np.asarray(scores, np.float64)
        used = _cdf((x - self.used_mean) / used_sigma)
        rest = _cdf((x - self.rest_mean) / self.rest_sigma)
        return np.asarray(0.5 * (used + rest), np.float64)

    def usualness(self, scores: FloatArray | Doubles, *, shared_sigma: bool = False) -> Doubles:
        """Return p: 1 at the mid-point x0, falling towards 0 on both sides alike."""
        x = np.asarray(scores, np.float64)
        here = self.mixture_cdf(x, shared_sigma=shared_sigma)
        mirrored = self.mixture_cdf(2.0 * self.centre - x, shared_sigma=shared_sigma)
        return 1.0 - np.maximum(here, mirrored) + np.minimum(here, mirrored)

    def weights(
        self, scores: FloatArray, policy: WeightPolicy = "monotone", cutoffs: str = "tofu"
    ) -> FloatArray:
        """Return each score's weight, same shape.

        Args:
            scores: Higher = closer to the forget set.
            policy: `monotone` (exactly 0 if unflagged, WEIGHT_FLOOR at the threshold, rising to 1
                at the median of held-out forget scores and staying there), `o3-paper` (as
                written, in [0.119, 1)) or `o3-code` (one of the data set's hard weights, or 0).
            cutoffs: `o3-code` only: the data set whose cut-offs are used, a key of `CUTOFFS`.

        Raises:
            UnknownComponentError: If there is no such policy or data set.
        """
        if policy == "o3-code":
            return self._hard(scores, cutoffs)
        try:
            found = _POLICIES[policy](self, scores)
        except KeyError:
            known = sorted([*_POLICIES, "o3-code"])
            raise UnknownComponentError("weight policy", policy, known, None) from None
        return np.asarray(found, np.float32)

    def _paper(self, scores: FloatArray) -> Doubles:
        return soft(self.usualness(scores))

    def _hard(self, scores: FloatArray, cutoffs: str) -> FloatArray:
        if cutoffs not in CUTOFFS:
            raise UnknownComponentError("O3 cut-offs", cutoffs, sorted(CUTOFFS), None)
        weight = soft(self.usualness(scores, shared_sigma=True))
        out = np.zeros(weight.shape, np.float32)
        for level, value in CUTOFFS[cutoffs]:
            out[weight >= level] = value
        return out

    def _monotone(self, scores: FloatArray) -> Doubles:
        x = np.asarray(scores, np.float64)
        reach = max(self.median - self.threshold, MIN_SIGMA)
        rise = WEIGHT_FLOOR + (1.0 - WEIGHT_FLOOR) * (x - self.threshold) / reach
        rise = np.where(x >= self.median, 1.0, np.clip(rise, WEIGHT_FLOOR, 1.0))
        return np.where(self.flags(scores), rise, 0.0)

    def to_dict(self) -> dict[str, float]:
        """Return the parameters, for JSON."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> SoftWeight:
        """Read what `to_dict` gave.

        Raises:
            ArtifactError: If a parameter is missing, not finite, or a sigma is not positive.
        """
        try:
            found = cls(**{name: float(values[name]) for name in _FIELDS})
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the O3 detector's soft weight is damaged: {error}") from error
        finite = all(math.isfinite(getattr(found, name)) for name in _FIELDS)
        if not finite or min(found.used_sigma, found.rest_sigma) <= 0:
            raise ArtifactError("the O3 detector's soft weight holds impossible numbers")
        return found


def soft(usualness: Doubles) -> Doubles:
    """Return sigmoid(10 p - 2) of p in [0, 1]: from 0.119 to 0.9997."""
    return np.asarray(1.0 / (1.0 + np.exp(-(STEEPNESS * usualness + SHIFT))), np.float64)


_FIELDS: Final = ("used_mean", "used_sigma", "rest_mean", "rest_sigma", "threshold", "median")
_POLICIES: Final[Mapping[str, Callable[[SoftWeight, FloatArray], Doubles]]] = MappingProxyType(
    {"o3-paper": SoftWeight._paper, "monotone": SoftWeight._monotone}
)
