"""Measures of one answer by its likelihood: how well a model still knows it.

Pure functions over numbers. What a model makes of each token of a given answer comes as
`TokenScores`; `benchmarks/answers.py` measures the served text, and comparisons of models and
TOFU's aggregates are made from these values in `comparisons.py` and `aggregates.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.measures import Share, share
from guard.errors import ShapeError
from guard.types import TokenScores

Doubles = NDArray[np.float64]

MIN_K_SHARE: Final = 0.4
"""Share of least likely tokens; open-unlearning's setting for TOFU."""

MIN_DEVIATION: Final = 1e-3
"""Least deviation of a min-k++ score, in nats: open-unlearning keeps the variance above 1e-6."""

_TINY: Final = float(np.finfo(np.float64).tiny)


# --- Likelihood of a given answer ----------------------------------------------------------------


def answer_probability(scores: TokenScores) -> float:
    """Return P(a|q)^(1/|a|) = exp(mean log p), the geometric mean probability per token, in [0, 1].

    Paper: TOFU (arXiv 2401.06121), "Probability".

    Raises:
        ShapeError: If the answer has no token.
    """
    return float(np.exp(np.mean(_logprobs(scores))))


def option_probability(right: float, wrong: Sequence[float]) -> float:
    """Return p_right / (p_right + sum p_wrong), in [0, 1]; 0 if nothing has any probability.

    TOFU's "Probability" for real authors and world facts, where wrong answers are given. Its code
    takes each answer's `answer_probability`, so length does not count.
    """
    total = right + float(np.sum(wrong))
    return right / total if total > 0.0 else 0.0


def truth_ratio(right: float, perturbed: Sequence[float], *, geometric: bool = False) -> float:
    """Return R = mean_i P(wrong_i|q)^(1/|wrong_i|) / P(right|q)^(1/|right|), in [0, inf).

    The higher, the less the model prefers the truth: about 1 says that it knows nothing, near 0
    that it knows. This raw R of each forget question is what `comparisons.forget_quality` compares.
    Paper: TOFU (arXiv 2401.06121), Eq. 1: the mean over wrong answers is arithmetic.
    TOFU's and open-unlearning's code average log probabilities, which is the geometric mean.

    Args:
        right: `answer_probability` of the paraphrased answer; of the answer itself for the real
            authors and world facts, which have no paraphrase.
        perturbed: `answer_probability` of each wrong answer of the same form.
        geometric: As the code does, to compare with published numbers.

    Raises:
        ShapeError: If there is no wrong answer.
    """
    if not len(perturbed):
        raise ShapeError("a truth ratio needs one wrong answer or more; got none")
    wrong = np.maximum(np.asarray(perturbed, dtype=np.float64), _TINY)
    mean = np.exp(np.mean(np.log(wrong))) if geometric else np.mean(wrong)
    return float(mean / max(right, _TINY))


def truth_utility(ratio: float) -> float:
    """Return max(0, 1 - R), in [0, 1]: the truth ratio as a part of `model_utility`.

    For questions to be kept (retain authors, real authors, world facts), where knowing is good.
    Paper: TOFU (arXiv 2401.06121).
    """
    return max(0.0, 1.0 - ratio)


def truth_indifference(ratio: float) -> float:
    """Return min(R, 1/R), in [0, 1]: 1 where right and wrong are alike to the model.

    For forget questions: the "truth ratio" in open-unlearning's tables, and the one in the
    aggregates of arXiv 2605.31293 (see `aggregates.memorisation_score` for what is odd there).
    """
    return min(ratio, 1.0 / ratio) if ratio > 0.0 else 0.0


def extraction_strength(scores: TokenScores) -> float:
    """Return ES = 1 - k*/n, in [0, 1]; 1 is an answer that comes back from the question alone.

    k* is the least number of answer tokens to give such that every later one is the model's first
    choice. Where the last token is none, k* = n and ES = 0; open-unlearning's loop ends there with
    1/n.
    Paper: Carlini et al. 2021 (arXiv 2012.07805) for the idea; open-unlearning (arXiv 2506.12618).

    Raises:
        ShapeError: If the answer has no token.
    """
    misses = np.flatnonzero(~_correct(scores))
    given = int(misses[-1]) + 1 if len(misses) else 0
    return 1.0 - given / len(scores.correct)


def exact_memorisation(scores: TokenScores) -> float:
    """Return EM, the share of answer tokens that are the model's first choice, in [0, 1].

    Paper: Tirumala et al. 2022 (arXiv 2205.10770); open-unlearning (arXiv 2506.12618).

    Raises:
        ShapeError: If the answer has no token.
    """
    return float(np.mean(_correct(scores)))


def multiple_choice_accuracy(
    probabilities: Sequence[Sequence[float]], right: Sequence[int]
) -> Share:
    """Return how often the right choice is likelier than every other; a tie at the top is wrong.

    Args:
        probabilities: Of each question's choices, as `answer_probability`.
        right: Index of each question's right choice.

    Raises:
        ShapeError: If the lengths differ, or an index points at no choice.
    """
    if len(probabilities) != len(right):
        raise ShapeError(f"{len(probabilities)} questions, but {len(right)} right choices")
    hits = 0
    for choices, index in zip(probabilities, right, strict=True):
        if not 0 <= index < len(choices):
            raise ShapeError(f"the right choice is {index}, but there are {len(choices)} choices")
        others = [*choices[:index], *choices[index + 1 :]]
        hits += all(choices[index] > other for other in others)
    return share(hits, len(right))


# --- Membership scores: the higher, the likelier that the model was trained on the answer --------


def loss_score(scores: TokenScores) -> float:
    """Return the mean log probability per token, in nats (<= 0): LOSS, its sign turned.

    Paper: Yeom et al. 2018 (arXiv 1709.01604).

    Raises:
        ShapeError: If the answer has no token.
    """
    return float(np.mean(_logprobs(scores)))


def zlib_score(scores: TokenScores, answer: str, *, total: bool = False) -> float:
    """Return mean log probability / bytes of the zlib-compressed answer, in nats per byte (<= 0).

    Paper: Carlini et al. 2021 (arXiv 2012.07805), whose likelihood is that per token.

    Args:
        scores: Of the answer's tokens.
        answer: Its text, compressed as UTF-8.
        total: Take the sum of log probabilities in place of the mean. The published tables and
            open-unlearning take the mean, so that long answers score higher.

    Raises:
        ShapeError: If the answer has no token.
    """
    logprobs = _logprobs(scores)
    likelihood = np.sum(logprobs) if total else np.mean(logprobs)
    return float(likelihood) / len(zlib.compress(answer.encode()))


def min_k(scores: TokenScores, portion: float = MIN_K_SHARE) -> float:
    """Return the mean log probability of the least likely tokens, in nats (<= 0).

    Paper: Shi et al. 2024 (arXiv 2310.16789), "Min-K% Prob".

    Args:
        scores: Of the answer's tokens.
        portion: Share of the tokens that is taken, in (0, 1]; rounded down, one at least.

    Raises:
        ShapeError: If the answer has no token.
    """
    return _mean_of_lowest(_logprobs(scores), portion)


def min_k_plus_plus(scores: TokenScores, portion: float = MIN_K_SHARE) -> float:
    """Return the mean of the lowest (log p - mean) / deviation, in deviations.

    Mean and deviation are those of the vocabulary's log probabilities at each token, weighted by
    probability: how likely a token is among those that could stand there.
    Paper: Zhang et al. 2025 (arXiv 2404.02936), "Min-K%++".

    Args:
        scores: Of the answer's tokens.
        portion: As in `min_k`.

    Raises:
        ShapeError: If the answer has no token.
    """
    deviations = np.maximum(scores.deviations.astype(np.float64), MIN_DEVIATION)
    return _mean_of_lowest((_logprobs(scores) - scores.means) / deviations, portion)


def _mean_of_lowest(values: Doubles, portion: float) -> float:
    if not 0.0 < portion <= 1.0:
        raise ValueError(f"portion is {portion}; it must lie above 0 and be 1 at most")
    count = max(1, int(len(values) * portion))
    return float(np.mean(np.sort(values)[:count]))


def _logprobs(scores: TokenScores) -> Doubles:
    if not len(scores.logprobs):
        raise ShapeError("the answer has no token to measure")
    return scores.logprobs.astype(np.float64)


def _correct(scores: TokenScores) -> NDArray[np.bool_]:
    if not len(scores.correct):
        raise ShapeError("the answer has no token to measure")
    return scores.correct
