"""Models compared over many questions: forget quality, membership AUC, leak@k, differences.

Intervals are 95 % percentile bootstraps over questions, seeded. They take questions as independent;
those of one author are not quite, so the intervals are a little narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.curves import auroc_interval
from guard.errors import ShapeError

Doubles = NDArray[np.float64]
Membership = tuple[ArrayLike, ArrayLike]
"""Scores of members and of non-members, each of shape (answers,); higher: more like a member."""

RESAMPLES: Final = 2000
ENDS: Final = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value: Of the sample.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def farthest(self) -> float:
        """How far from 0 the interval reaches: the bound to hold against a two-sided target."""
        return max(abs(self.low), abs(self.high))


# --- Two models compared -------------------------------------------------------------------------


def forget_quality(ratios: ArrayLike, retained_ratios: ArrayLike) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test, in [0, 1].

    High: the truth ratios can't be told from *retained*'s. Low: too much or too little is gone.
    Paper: TOFU (arXiv 2401.06121).

    Args:
        ratios: R of each forget question (`forgetting.truth_ratio`, raw), shape (questions,).
        retained_ratios: The same for *retained*.

    Raises:
        ShapeError: If either is empty.
    """
    from scipy.stats import ks_2samp

    system, retained = _values(ratios), _values(retained_ratios)
    return float(ks_2samp(system, retained).pvalue)


def paired_difference(
    system: ArrayLike, reference: ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return mean(system - reference), question by question, with its bootstrap interval.

    Where every difference is the same, as when neither model ever leaks, so is every resample,
    and the interval is a point: it says nothing of questions unlike those asked.

    Args:
        system: A value for each question, shape (questions,); truth values count as 0 and 1.
        reference: The other model's, for the same questions in the same order.
        seed: Of the resampling.
        resamples: How many.

    Raises:
        ShapeError: If they are empty or differ in length.
    """
    differences = _paired(system, reference)
    count = len(differences)
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    return _estimate(float(differences.mean()), differences[drawn].mean(axis=1))


def membership_auc(
    member_scores: ArrayLike, nonmember_scores: ArrayLike, seed: int = 0
) -> Estimate:
    """Return the chance that a member scores above a non-member (ROC AUC), ties counting half.

    1 finds every member; 0.5 nothing; below, members look *less* like members than others do.
    Members and non-members are resampled each by themselves. Where the ranking is perfect, every
    resample is too, and Newcombe's interval (`curves.auroc_interval`) takes the place of a point.

    Args:
        member_scores: Of answers that *full* was trained on, shape (answers,); of
            `forgetting.loss_score` and its like.
        nonmember_scores: Of like answers that no model was trained on.
        seed: Of the resampling.

    Raises:
        ShapeError: If either is empty.
    """
    members, others = _values(member_scores), _values(nonmember_scores)
    value = _auc(members, others)
    found = _estimate(value, _resampled_auc([(members, others)], seed)[0])
    if found.low < found.high:
        return found
    _, ranks = np.unique(np.concatenate([members, others]), return_inverse=True)
    above, below = np.split(ranks.astype(np.float32), [len(members)])
    low, high = auroc_interval(above, below)
    return Estimate(value, min(low, value), max(high, value))


def auc_difference(system: Membership, retained: Membership, seed: int = 0) -> Estimate:
    """Return AUC(system) - AUC(retained), resampling the same answers for both.

    Args:
        system: Scores of members and of non-members.
        retained: *Retained*'s, of the same answers in the same order.
        seed: Of the resampling.

    Raises:
        ShapeError: If any is empty, or the two are not of as many answers.
    """
    pairs = [(_values(one), _values(other)) for one, other in (system, retained)]
    if len({(len(one), len(other)) for one, other in pairs}) > 1:
        raise ShapeError("both models must have scored the same members and non-members")
    ours, theirs = _resampled_auc(pairs, seed)
    return _estimate(_auc(*pairs[0]) - _auc(*pairs[1]), ours - theirs)


def _auc(members: Doubles, others: Doubles) -> float:
    from sklearn.metrics import roc_auc_score

    labels = np.repeat([1, 0], [len(members), len(others)])
    return float(roc_auc_score(labels, np.concatenate([members, others])))


def _resampled_auc(pairs: Sequence[tuple[Doubles, Doubles]], seed: int) -> list[Doubles]:
    """AUC of each pair in every resample, shape (RESAMPLES,); all pairs are resampled alike."""
    rng = np.random.default_rng(seed)
    members, others = (
        rng.multinomial(size, np.full(size, 1.0 / size), size=RESAMPLES).astype(np.float64)
        for size in (len(pairs[0][0]), len(pairs[0][1]))
    )
    areas = []
    for ours, theirs in pairs:
        wins = 0.5 * ((ours[:, None] > theirs) + 1.0 - (ours[:, None] < theirs))
        areas.append(((members @ wins) * others).sum(axis=1) / wins.size)
    return areas


# --- Leaks among many samples --------------------------------------------------------------------


def leak_at_k(samples: int, leaks: int, k: int) -> float:
    """Return 1 - C(n-c, k) / C(n, k), in [0, 1]: the chance that one of k samples leaks.

    Unbiased for k of n independent samples of which c leaked; computed as
    1 - prod_{i=n-c+1..n} (1 - k/i) in logarithms, which neither overflows nor cancels.
    Paper: leak@k (arXiv 2511.04934); the estimator is pass@k's (Chen et al. 2021, arXiv
    2107.03374).

    Args:
        samples: n, answers drawn for the question.
        leaks: c, those that hold the fact.
        k: Tries that an attacker has.

    Raises:
        ValueError: If not 0 <= leaks <= samples or not 1 <= k <= samples.
    """
    if not 0 <= leaks <= samples:
        raise ValueError(f"{leaks} of {samples} samples leak; it must be between 0 and all")
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; with {samples} samples it must be between 1 and {samples}")
    if k > samples - leaks:
        return 1.0
    factors = np.arange(samples - leaks + 1, samples + 1, dtype=np.float64)
    return float(-np.expm1(np.log1p(-k / factors).sum()) + 0.0)  # + 0.0: no negative zero


def leaks_at_k(samples: int, leaks: Sequence[int], k: int) -> Doubles:
    """Return `leak_at_k` of each question, shape (questions,); their mean is the benchmark's."""
    return np.array([leak_at_k(samples, count, k) for count in leaks], dtype=np.float64)


def mean_leak_at_k(samples: int, leaks: Sequence[int], k: int) -> float:
    """Return the mean of `leak_at_k` over questions.

    Raises:
        ShapeError: If there is no question.
    """
    return float(_values(leaks_at_k(samples, leaks, k)).mean())


def leak_difference(
    samples: int, system_leaks: Sequence[int], reference_leaks: Sequence[int], k: int, seed: int = 0
) -> Estimate:
    """Return the paired difference of leak@k between two models (`paired_difference`).

    Args:
        samples: Answers drawn for each question, from each model.
        system_leaks: Leaking answers of each question.
        reference_leaks: The other model's, for the same questions.
        k: As in `leak_at_k`.
        seed: Of the resampling.
    """
    ours, theirs = (leaks_at_k(samples, leaks, k) for leaks in (system_leaks, reference_leaks))
    return paired_difference(ours, theirs, seed)


def _values(values: ArrayLike) -> Doubles:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ShapeError(f"need a list of one value or more, got shape {found.shape}")
    return found


def _paired(system: ArrayLike, reference: ArrayLike) -> Doubles:
    ours, theirs = _values(system), _values(reference)
    if len(ours) != len(theirs):
        raise ShapeError(f"need the same questions for both, got {len(ours)} and {len(theirs)}")
    return ours - theirs


def _estimate(value: float, resampled: Doubles) -> Estimate:
    low, high = np.quantile(resampled, ENDS)
    return Estimate(value, float(low), float(high))
