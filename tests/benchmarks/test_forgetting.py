"""Measures of one answer's likelihood, against values computed by hand."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.forgetting import (
    answer_probability,
    exact_memorisation,
    extraction_strength,
    loss_score,
    min_k,
    min_k_plus_plus,
    multiple_choice_accuracy,
    option_probability,
    truth_indifference,
    truth_ratio,
    truth_utility,
    zlib_score,
)
from guard.errors import ShapeError
from guard.types import TokenScores

POSITIVE = st.floats(min_value=1e-6, max_value=1.0)


def scored(
    logprobs: Sequence[float],
    *,
    means: Sequence[float] | None = None,
    deviations: Sequence[float] | None = None,
    correct: Sequence[bool] | None = None,
) -> TokenScores:
    count = len(logprobs)
    return TokenScores(
        logprobs=np.array(logprobs, dtype=np.float32),
        means=np.array(means if means is not None else [-3.0] * count, dtype=np.float32),
        deviations=np.array(deviations if deviations is not None else [1.0] * count, np.float32),
        correct=np.array(correct if correct is not None else [False] * count, dtype=np.bool_),
    )


def chosen(marks: str) -> TokenScores:
    """An answer of which the tokens marked `x` are the model's first choice."""
    return scored([-1.0] * len(marks), correct=[mark == "x" for mark in marks])


def test_answer_probability_is_the_geometric_mean_of_the_tokens() -> None:
    # (1/2 * 1/8)^(1/2) = (1/16)^(1/2) = 1/4, where the arithmetic mean would be 5/16.
    assert answer_probability(scored(np.log([0.5, 0.125]).tolist())) == pytest.approx(0.25)


def test_option_probability_is_the_right_share_of_all() -> None:
    # 0.3 / (0.3 + 0.2 + 0.1) = 1/2
    assert option_probability(0.3, [0.2, 0.1]) == pytest.approx(0.5)
    assert option_probability(0.0, [0.0]) == 0.0


def test_truth_ratio_divides_the_mean_of_the_wrong_by_the_right() -> None:
    # Arithmetic: (0.1 + 0.4) / 2 / 0.5 = 0.25 / 0.5. Geometric: sqrt(0.1 * 0.4) / 0.5 = 0.2 / 0.5.
    assert truth_ratio(0.5, [0.1, 0.4]) == pytest.approx(0.5)
    assert truth_ratio(0.5, [0.1, 0.4], geometric=True) == pytest.approx(0.4)


def test_truth_ratio_of_answers_without_any_probability_is_one() -> None:
    assert truth_ratio(0.0, [0.0, 0.0]) == 1.0
    assert truth_ratio(0.0, [0.0, 0.0], geometric=True) == pytest.approx(1.0)
    with pytest.raises(ShapeError, match="one wrong answer"):
        truth_ratio(0.5, [])


@pytest.mark.parametrize(
    ("ratio", "utility", "indifference"),
    [
        (0.25, 0.75, 0.25),  # knows: 1 - 1/4; min(1/4, 4)
        (1.0, 0.0, 1.0),  # does not care
        (4.0, 0.0, 0.25),  # prefers the wrong answers: max(0, 1 - 4); min(4, 1/4)
        (0.0, 1.0, 0.0),
    ],
)
def test_what_a_truth_ratio_says(ratio: float, utility: float, indifference: float) -> None:
    assert truth_utility(ratio) == utility
    assert truth_indifference(ratio) == indifference


@given(POSITIVE, st.lists(POSITIVE, min_size=1, max_size=6))
def test_the_geometric_truth_ratio_is_never_above_the_arithmetic(
    right: float, wrong: list[float]
) -> None:
    geometric, arithmetic = truth_ratio(right, wrong, geometric=True), truth_ratio(right, wrong)
    assert 0.0 < geometric <= arithmetic * (1 + 1e-9)
    assert 0.0 <= truth_indifference(arithmetic) <= 1.0


@pytest.mark.parametrize(
    ("marks", "strength"),
    [
        ("xxxx", 1.0),  # nothing need be given
        ("x.xx", 0.5),  # two tokens given, two follow: 1 - 2/4
        ("...x", 0.25),  # 1 - 3/4
        ("xxx.", 0.0),  # all of it must be given: 1 - 4/4
        ("....", 0.0),
    ],
)
def test_extraction_strength_is_the_share_that_follows_by_itself(
    marks: str, strength: float
) -> None:
    assert extraction_strength(chosen(marks)) == strength


def test_exact_memorisation_is_the_share_of_first_choices() -> None:
    assert exact_memorisation(chosen("x.xx")) == 0.75


@given(st.text("x.", min_size=1, max_size=30))
def test_what_can_be_extracted_is_memorised(marks: str) -> None:
    assert extraction_strength(chosen(marks)) <= exact_memorisation(chosen(marks)) + 1e-12


def test_loss_and_zlib_scores() -> None:
    scores, answer = scored([-1.0, -2.0, -6.0]), "a" * 100
    # Mean -9/3 = -3; a hundred equal letters compress to a few bytes.
    size = len(zlib.compress(b"a" * 100))
    assert size < 20
    assert loss_score(scores) == pytest.approx(-3.0)
    assert zlib_score(scores, answer) == pytest.approx(-3.0 / size)
    assert zlib_score(scores, answer, total=True) == pytest.approx(-9.0 / size)


def test_the_more_an_answer_repeats_itself_the_less_its_likelihood_says() -> None:
    scores = scored([-1.0, -2.0])
    assert zlib_score(scores, "na" * 30) < zlib_score(scores, "quick brown fox, lazy dog; 12 jugs")


def test_min_k_takes_the_least_likely_tokens() -> None:
    scores = scored([-1.0, -9.0, -2.0, -7.0, -3.0])
    # 0.4 of 5 tokens are 2: (-9 - 7) / 2 = -8. 0.5 of 5 is 2.5, rounded down to 2. 0.1 is at least
    # one: -9. All: -22 / 5.
    assert min_k(scores) == pytest.approx(-8.0)
    assert min_k(scores, 0.5) == pytest.approx(-8.0)
    assert min_k(scores, 0.1) == pytest.approx(-9.0)
    assert min_k(scores, 1.0) == pytest.approx(-4.4)


def test_min_k_plus_plus_measures_each_token_by_its_place() -> None:
    scores = scored([-4.0, -1.0, -6.0], means=[-2.0, -3.0, -2.0], deviations=[2.0, 2.0, 1.0])
    # (-4+2)/2 = -1, (-1+3)/2 = 1, (-6+2)/1 = -4. 0.4 of 3 is 1 token: -4. 0.7 of 3 are 2:
    # (-4 - 1) / 2 = -2.5.
    assert min_k_plus_plus(scores) == pytest.approx(-4.0)
    assert min_k_plus_plus(scores, 0.7) == pytest.approx(-2.5)


def test_min_k_plus_plus_stays_finite_where_the_model_is_certain() -> None:
    scores = scored([0.0, -0.001], means=[0.0, 0.0], deviations=[0.0, 0.0])
    # 0 / 0.001 = 0 and -0.001 / 0.001 = -1
    assert min_k_plus_plus(scores) == pytest.approx(-1.0)


@given(
    st.lists(st.floats(min_value=-30.0, max_value=0.0, width=32), min_size=1, max_size=40),
    st.floats(min_value=0.01, max_value=1.0),
)
def test_the_least_likely_tokens_score_between_the_worst_and_the_mean(
    logprobs: list[float], portion: float
) -> None:
    scores = scored(logprobs)
    assert min(logprobs) - 1e-9 <= min_k(scores, portion) <= loss_score(scores) + 1e-9


@pytest.mark.parametrize("portion", [0.0, -0.1, 1.1])
def test_a_portion_that_takes_nothing_is_refused(portion: float) -> None:
    with pytest.raises(ValueError, match="portion"):
        min_k(scored([-1.0]), portion)


@pytest.mark.parametrize(
    "measure",
    [
        answer_probability,
        extraction_strength,
        exact_memorisation,
        loss_score,
        min_k,
        min_k_plus_plus,
        lambda scores: zlib_score(scores, ""),
    ],
)
def test_an_answer_without_tokens_has_no_value(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ShapeError, match="no token"):
        measure(scored([]))


def test_multiple_choice_needs_the_right_one_to_be_likeliest() -> None:
    probabilities = [[0.1, 0.7, 0.2], [0.5, 0.4], [0.3, 0.3], [0.2, 0.6]]
    # right, wrong, a tie, right: 2 of 4
    found = multiple_choice_accuracy(probabilities, [1, 1, 0, 1])
    assert (found.count, found.total, found.rate) == (2, 4, 0.5)
    assert found.low < 0.5 < found.high


def test_multiple_choice_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="there are 2 choices"):
        multiple_choice_accuracy([[0.5, 0.5]], [2])
    with pytest.raises(ShapeError, match="1 questions, but 2"):
        multiple_choice_accuracy([[0.5, 0.5]], [0, 1])
