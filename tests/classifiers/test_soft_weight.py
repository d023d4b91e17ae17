import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.soft_weight import CUTOFFS, WEIGHT_FLOOR, SoftWeight, WeightPolicy
from guard.errors import ArtifactError, DataError, NotFittedError, UnknownComponentError

FLOOR = 1 / (1 + math.exp(2))
TOP = 1 / (1 + math.exp(-8))
POLICIES: tuple[WeightPolicy, ...] = ("o3-paper", "o3-code", "monotone")

numbers = st.floats(-50, 50)
sigmas = st.floats(0.05, 20)
offsets = st.lists(st.floats(-1000, 1000), min_size=1, max_size=30)


@st.composite
def soft_weights(draw: st.DrawFn) -> SoftWeight:
    threshold = draw(numbers)
    median = threshold + draw(st.floats(0, 30))
    return SoftWeight(draw(numbers), draw(sigmas), draw(numbers), draw(sigmas), threshold, median)


@given(soft_weights(), offsets)
def test_every_policy_stays_in_its_range(soft: SoftWeight, values: list[float]) -> None:
    scores = np.array(values, np.float32)
    paper = soft.weights(scores, "o3-paper")
    assert paper.min() >= FLOOR - 1e-6 and paper.max() <= TOP + 1e-6
    for data_set, levels in CUTOFFS.items():
        hard = soft.weights(scores, "o3-code", data_set)
        assert set(hard.tolist()) <= {0.0, *(float(np.float32(value)) for _, value in levels)}
    monotone = soft.weights(scores)
    assert monotone.min() >= 0.0 and monotone.max() <= 1.0


@given(soft_weights(), offsets)
def test_monotone_never_falls_with_closeness(soft: SoftWeight, values: list[float]) -> None:
    weights = soft.weights(np.sort(np.array(values, np.float32)))
    assert (np.diff(weights) >= 0).all()


@given(soft_weights(), offsets)
def test_monotone_is_zero_exactly_where_nothing_is_flagged(
    soft: SoftWeight, values: list[float]
) -> None:
    scores = np.array(values, np.float32)
    weights, flags = soft.weights(scores), soft.flags(scores)
    assert (weights[~flags] == 0.0).all() and (weights[flags] >= WEIGHT_FLOOR).all()
    assert (weights[flags & (scores.astype(np.float64) >= soft.median)] == 1.0).all()


@given(soft_weights(), st.floats(0, 100))
def test_the_paper_weight_is_symmetric_about_the_mid_point(soft: SoftWeight, away: float) -> None:
    sides = np.array([soft.centre - away, soft.centre + away], np.float64)
    left, right = soft.usualness(sides)
    assert left == pytest.approx(right, abs=1e-9)


@given(soft_weights())
def test_the_paper_weight_peaks_at_the_mid_point_and_never_drops_below_its_floor(
    soft: SoftWeight,
) -> None:
    assert soft.usualness(np.array([soft.centre]))[0] == pytest.approx(1.0)
    far = np.array([soft.centre - 1e4, soft.centre + 1e4], np.float32)
    # Two-sided: the closest text of all has the least weight, 0.119.
    assert soft.weights(far, "o3-paper") == pytest.approx([FLOOR, FLOOR], abs=1e-6)
    assert pytest.approx(0.119, abs=5e-4) == FLOOR


@given(soft_weights(), offsets)
def test_the_paper_weight_falls_on_both_sides(soft: SoftWeight, values: list[float]) -> None:
    away = np.sort(np.abs(np.array(values, np.float64)))
    assert (np.diff(soft.usualness(soft.centre + away)) <= 1e-9).all()


def test_the_paper_weight_equals_the_formula() -> None:
    soft = SoftWeight(1.0, 2.0, 4.0, 0.5, 0.0, 4.0)
    used, rest = NormalDist(1.0, 2.0), NormalDist(4.0, 0.5)
    for x in (-3.0, 1.0, 2.5, 3.7, 9.0):
        here = (used.cdf(x) + rest.cdf(x)) / 2
        there = (used.cdf(5.0 - x) + rest.cdf(5.0 - x)) / 2
        p = 1 - max(here, there) + min(here, there)
        wanted = 1 / (1 + math.exp(-(10 * p - 2)))
        got = soft.weights(np.array([x], np.float32), "o3-paper")[0]
        assert got == pytest.approx(wanted, abs=1e-6)


def test_the_code_policy_uses_the_held_out_sigma_for_both() -> None:
    narrow = SoftWeight(0.0, 0.01, 2.0, 3.0, 0.0, 2.0)
    scores = np.linspace(-8, 10, 200, dtype=np.float32)
    wide = replace(narrow, used_sigma=3.0)
    assert (narrow.weights(scores, "o3-code") == wide.weights(scores, "o3-code")).all()
    assert (narrow.weights(scores, "o3-paper") != wide.weights(scores, "o3-paper")).any()


def test_the_code_policy_cuts_hard_and_goes_up_to_1_2() -> None:
    soft = SoftWeight(0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    scores = np.array([0.0, 1.0, 6.0], np.float32)
    assert soft.weights(scores, "o3-code", "sciqa") == pytest.approx([1.2, 0.0, 0.0])
    assert soft.weights(scores, "o3-code", "tofu").tolist() == [1.0, 1.0, 0.0]


def test_the_threshold_misses_the_promised_share_of_held_out_texts() -> None:
    rest = np.arange(100, dtype=np.float32)
    for share in (0.0, 0.05, 0.2):
        soft = SoftWeight.fit(np.array([200.0, 201.0], np.float32), rest, share)
        assert float((~soft.flags(rest)).mean()) <= share
    assert soft.used_mean == 200.5 and soft.rest_mean == 49.5 and soft.median == 49.5


def test_the_soft_weight_survives_json() -> None:
    soft = SoftWeight(1.0, 2.0, 4.0, 0.5, 0.25, 4.0)
    assert SoftWeight.from_dict(soft.to_dict()) == soft
    broken: tuple[dict[str, float], ...]
    broken = ({}, {**soft.to_dict(), "rest_sigma": 0.0}, {**soft.to_dict(), "median": math.nan})
    for values in broken:
        with pytest.raises(ArtifactError):
            SoftWeight.from_dict(values)


def test_what_cannot_be_fitted_or_named_is_refused() -> None:
    one, soft = np.ones(3, np.float32), SoftWeight(0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    with pytest.raises(DataError, match="0 held-out"):
        SoftWeight.fit(one, one[:0], 0.1)
    with pytest.raises(NotFittedError):
        SoftWeight.fit(one, one * np.nan, 0.1)
    with pytest.raises(UnknownComponentError, match="monotone"):
        soft.weights(one, "steep")  # type: ignore[arg-type]
    with pytest.raises(UnknownComponentError, match="sciqa"):
        soft.weights(one, "o3-code", "wmdp")


def test_flags_and_weights_agree_on_a_score_at_the_threshold() -> None:
    # 0.9 lies between two numbers of single precision.
    soft = SoftWeight(0.0, 1.0, 0.0, 1.0, 0.9, 0.9)
    below, above = np.float32(0.9), np.nextafter(np.float32(0.9), np.float32(1))
    scores = np.array([below, above], np.float32)
    assert soft.flags(scores).tolist() == [False, True]
    assert soft.weights(scores).tolist() == [0.0, 1.0]


def test_an_equal_score_for_all_still_gives_weights() -> None:
    soft = SoftWeight.fit(np.full(4, 3.0, np.float32), np.full(4, 3.0, np.float32), 0.05)
    for policy in POLICIES:
        assert np.isfinite(soft.weights(np.array([2.0, 3.0, 4.0], np.float32), policy)).all()
    assert soft.weights(np.array([2.0, 3.0, 4.0], np.float32)).tolist() == [0.0, 1.0, 1.0]
