"""Measures of a served answer's text: how much of the truth it holds, and how it reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.measures import Share, holds_fact, is_empty, is_repetitive, normalise_words, share
from classifiers.terms import PARTICLES
from guard.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

NLL_PERCENTILE: Final = 95.0
ECHO_LETTERS: Final = 3


def rouge_l_recall(answer: str, reference: str) -> float:
    """Return LCS(answer, reference) / words of the reference, in [0, 1], over stemmed words.

    Paper: Lin 2004, by the package rouge-score with stemming, as TOFU (arXiv 2401.06121) takes it.
    Its words are runs of a-z and 0-9: text in other scripts has none and scores 0.

    Raises:
        ConfigError: If rouge-score is missing.
    """
    return float(_rouge().score(reference, answer)["rougeL"].recall)


@cache
def _rouge() -> RougeScorer:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "ROUGE-L needs rouge-score; install the extra: pip install 'unlearn-guard[bench]'"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def name_echo(answer: str, name: str) -> bool:
    """Return whether a content word of the asked `name` stands in `answer`.

    Content words have three letters or more and are no particles ("van", "the"); accents, case and
    possessives don't count. A name without any ("Li Wu", "莫言") must stand there as a whole.
    """
    words = [
        word
        for word in normalise_words(name).split()
        if len(word) >= ECHO_LETTERS and word not in PARTICLES
    ]
    return holds_fact(answer, words or [name])


def name_echo_share(answers: Sequence[str], names: Sequence[str]) -> Share:
    """Return the share of answers that repeat the name they were asked about (`name_echo`).

    Raises:
        ShapeError: If the lengths differ.
    """
    _same_length(answers=answers, names=names)
    pairs = zip(answers, names, strict=True)
    return share(sum(name_echo(answer, name) for answer, name in pairs), len(answers))


def nll_limit(retained_nlls: Sequence[float]) -> float:
    """Return the 95th percentile of *retained*'s answers, in nats per token: how odd text may read.

    Args:
        retained_nlls: Mean NLL per token of each of *retained*'s answers under the untouched base
            model, given the plain question; not finite where the answer is empty, and left out.

    Raises:
        ShapeError: If no answer has a finite NLL.
    """
    nlls = np.asarray(retained_nlls, dtype=np.float64)
    nlls = nlls[np.isfinite(nlls)]
    if not len(nlls):
        raise ShapeError("no retained answer has a finite NLL, so none can set the limit")
    return float(np.percentile(nlls, NLL_PERCENTILE))


def clean_answers(answers: Sequence[str], nlls: Sequence[float], limit: float) -> list[bool]:
    """Return which answers read like text: not empty, not in circles, NLL below the limit.

    Args:
        answers: As served.
        nlls: Mean NLL per token of each under the untouched base model, given the plain question,
            in nats; whatever it is for an empty answer, that is not clean. NaN is not clean.
        limit: Of `nll_limit`, for the same questions.

    Raises:
        ShapeError: If the lengths differ.
    """
    _same_length(answers=answers, nlls=nlls)
    return [
        not is_empty(answer) and not is_repetitive(answer) and bool(nll < limit)
        for answer, nll in zip(answers, nlls, strict=True)
    ]


def cleanliness(answers: Sequence[str], nlls: Sequence[float], limit: float) -> Share:
    """Return the share of clean answers (`clean_answers`)."""
    clean = clean_answers(answers, nlls, limit)
    return share(sum(clean), len(clean))


def _same_length(**lists: Sequence[object]) -> None:
    if len({len(values) for values in lists.values()}) > 1:
        found = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ShapeError(f"need as many of each, got {found}")
