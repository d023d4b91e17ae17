"""TOFU's model utility, and the aggregate of memorisation, privacy and utility.

The aggregate is open-unlearning's (arXiv 2506.12618) as arXiv 2605.31293 computes it, so that its
published rows can be compared with.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from guard.errors import ShapeError


def harmonic_mean(values: Iterable[float]) -> float:
    """Return n / sum(1 / v); 0 if any value is 0 or less, NaN if any is NaN.

    Raises:
        ShapeError: If there is no value.
    """
    found = [float(value) for value in values]
    if not found:
        raise ShapeError("a harmonic mean needs one value or more; got none")
    if any(map(math.isnan, found)):
        return math.nan
    return statistics.harmonic_mean([max(value, 0.0) for value in found])


def model_utility(values: Iterable[float]) -> float:
    """Return the harmonic mean of what is to be kept, in [0, 1].

    TOFU's nine: probability, ROUGE-L recall and `forgetting.truth_utility`, each on retain
    authors, real authors and world facts (for the latter two, `forgetting.option_probability`).
    Paper: TOFU (arXiv 2401.06121).
    """
    return harmonic_mean(values)


def memorisation_score(
    extraction: float, exact: float, paraphrase: float, indifference: float
) -> float:
    """Return Mem = hmean(1 - ES, 1 - EM, 1 - paraphrase probability, 1 - truth ratio), in [0, 1].

    High is forgotten. The last term is kept as published: `forgetting.truth_indifference` is high
    where the model does not know, so it counts *against* forgetting, and *retained* gets .53 in
    arXiv 2605.31293. Compare with *retained*, never with 1.

    Args:
        extraction: Mean `forgetting.extraction_strength` of forget answers.
        exact: Mean `forgetting.exact_memorisation`.
        paraphrase: Mean `forgetting.answer_probability` of paraphrased forget answers.
        indifference: Mean `forgetting.truth_indifference`.
    """
    return harmonic_mean(1.0 - value for value in (extraction, exact, paraphrase, indifference))


def privacy_score(aucs: Mapping[str, float], retained_aucs: Mapping[str, float]) -> float:
    """Return Priv = hmean over attacks of 1 - |AUC - AUC_retained|, each clipped at 0.

    Args:
        aucs: `comparisons.membership_auc` by attack: loss, zlib, min-k and min-k++.
        retained_aucs: *Retained*'s, of the same attacks.

    Raises:
        ShapeError: If the attacks differ, or there is none.
    """
    if aucs.keys() != retained_aucs.keys():
        ours, theirs = ", ".join(sorted(aucs)), ", ".join(sorted(retained_aucs))
        raise ShapeError(f"need the same attacks on both models; got {ours} and {theirs}")
    return harmonic_mean(1.0 - abs(auc - retained_aucs[name]) for name, auc in aucs.items())


def utility_score(
    utility: float, cleanliness: float, full_utility: float, full_cleanliness: float
) -> float:
    """Return Util = hmean(utility, cleanliness) / the same of *full*; it may exceed 1.

    Args:
        utility: `model_utility`.
        cleanliness: Share of clean answers to forget questions.
        full_utility: *Full*'s `model_utility`.
        full_cleanliness: *Full*'s cleanliness.

    Raises:
        ValueError: If *full*'s is 0, which nothing can be measured by.
    """
    full = harmonic_mean([full_utility, full_cleanliness])
    if full == 0.0:
        raise ValueError("the full model has no utility or no clean answer; nothing compares to it")
    return harmonic_mean([utility, cleanliness]) / full


def aggregate(memorisation: float, privacy: float, utility: float) -> float:
    """Return Agg = hmean(Mem, Priv, Util), of the three functions above."""
    return harmonic_mean([memorisation, privacy, utility])
