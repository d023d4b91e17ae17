"""Models compared over many questions, against values computed by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.comparisons import (
    Estimate,
    auc_difference,
    forget_quality,
    leak_at_k,
    leak_difference,
    mean_leak_at_k,
    membership_auc,
    paired_difference,
)
from benchmarks.curves import auroc_interval
from guard.errors import ShapeError

MANY = np.random.default_rng(7)
MEMBERS, OTHERS = MANY.normal(0.5, 1.0, 200), MANY.normal(0.0, 1.0, 200)


def test_forget_quality_of_two_values_apart() -> None:
    # All of one lie below all of the other: D = 1, which 2 of the C(6, 3) = 20 orders show.
    assert forget_quality([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]) == pytest.approx(2 / 20)


def test_forget_quality_of_the_same_values_is_one_and_counts_both_directions() -> None:
    ratios = MANY.uniform(0.2, 1.5, 200)
    assert forget_quality(ratios, ratios) == 1.0
    assert forget_quality(ratios * 0.5, ratios) < 1e-6
    assert forget_quality(ratios * 2.0, ratios) < 1e-6
    with pytest.raises(ShapeError):
        forget_quality([], ratios)


def test_membership_auc_counts_pairs_that_are_in_order() -> None:
    # 3 > 2, 3 > 0, 1 < 2, 1 > 0: 3 of 4 pairs. With a tie: 2 = 2 counts half, so (0.5 + 1) / 2.
    assert membership_auc([3.0, 1.0], [2.0, 0.0]).value == pytest.approx(0.75)
    assert membership_auc([2.0], [2.0, 0.0]).value == pytest.approx(0.75)


def test_the_interval_of_an_auc_holds_it_and_agrees_with_theory() -> None:
    found = membership_auc(MEMBERS, OTHERS)
    assert found.low < found.value < found.high
    theory = auroc_interval(MEMBERS.astype(np.float32), OTHERS.astype(np.float32))
    assert (found.low, found.high) == pytest.approx(theory, abs=0.02)
    assert found == membership_auc(MEMBERS, OTHERS)


def test_a_perfect_ranking_is_not_reported_as_certain() -> None:
    found = membership_auc([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])
    assert found.value == found.high == 1.0
    assert 0.2 < found.low < 0.9


def test_turning_the_scores_round_turns_the_auc_round() -> None:
    forth, back = membership_auc(MEMBERS, OTHERS).value, membership_auc(-MEMBERS, -OTHERS).value
    assert forth + back == pytest.approx(1.0)


def test_the_difference_of_two_aucs_is_paired() -> None:
    system, retained = (MEMBERS + 0.01, OTHERS), (MEMBERS, OTHERS)
    found = auc_difference(system, retained)
    alone = membership_auc(MEMBERS, OTHERS)
    assert 0.0 <= found.low <= found.value <= found.high
    assert found.high - found.low < (alone.high - alone.low) / 5
    # (3 of 4) - (1 of 4)
    assert auc_difference(([3, 1], [2, 0]), ([0, 1], [2, 0.5])).value == pytest.approx(0.5)
    with pytest.raises(ShapeError, match="same members"):
        auc_difference(system, (MEMBERS[:5], OTHERS))


def test_the_difference_of_two_models_is_taken_question_by_question() -> None:
    # (0.1 + 0.3 - 0.1) / 3 = 0.1
    found = paired_difference([0.6, 0.8, 0.2], [0.5, 0.5, 0.3])
    assert found.value == pytest.approx(0.1)
    # The means of three draws from {0.1, 0.3, -0.1} lie between -0.1 and 0.3; the outermost have a
    # chance of 1/27 = 3.7 % each, more than the 2.5 % that are cut off.
    assert (found.low, found.high) == pytest.approx((-0.1, 0.3))
    assert found.farthest == pytest.approx(0.3)


def test_a_constant_difference_leaves_no_doubt_and_a_common_part_none_either() -> None:
    hard = MANY.uniform(0.0, 1.0, 50)
    found = paired_difference(hard + 0.05, hard)
    assert (found.low, found.value, found.high) == pytest.approx((0.05, 0.05, 0.05))


def test_the_interval_of_a_difference_agrees_with_theory() -> None:
    differences = MANY.normal(0.1, 1.0, 400)
    found = paired_difference(differences, np.zeros(400))
    half = 1.96 * differences.std() / 20.0  # the standard error of a mean of 400
    mean = differences.mean()
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=0.02)


def test_truth_values_can_be_compared_and_the_seed_decides() -> None:
    ours, theirs = [True, True, False, True] * 5, [True, False, False, False] * 5
    found = paired_difference(ours, theirs, seed=3)
    assert found.value == 0.5
    assert found == paired_difference(ours, theirs, seed=3)
    wider = [paired_difference(MEMBERS, OTHERS, seed=seed) for seed in (0, 1)]
    assert wider[0] != wider[1]


def test_differences_of_unlike_lists_are_refused() -> None:
    with pytest.raises(ShapeError, match="got 2 and 1"):
        paired_difference([0.1, 0.2], [0.1])
    with pytest.raises(ShapeError, match="one value or more"):
        paired_difference([], [])


def test_the_far_end_of_an_interval_counts_both_directions() -> None:
    assert Estimate(0.0, -0.07, 0.02).farthest == pytest.approx(0.07)
    assert Estimate(0.0, -0.01, 0.02).farthest == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("samples", "leaks", "k", "chance"),
    [
        (5, 2, 1, 2 / 5),  # one draw: the share itself
        (5, 2, 2, 7 / 10),  # 1 - C(3,2)/C(5,2) = 1 - 3/10
        (20, 1, 10, 1 / 2),  # 1 - C(19,10)/C(20,10) = 1 - 10/20
        (5, 4, 2, 1.0),  # two draws, one clean sample
        (5, 0, 5, 0.0),
        (100, 100, 1, 1.0),
    ],
)
def test_leak_at_k(samples: int, leaks: int, k: int, chance: float) -> None:
    assert leak_at_k(samples, leaks, k) == pytest.approx(chance)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_leak_at_k_is_the_share_of_draws_that_hold_a_leak(
    drawn: tuple[int, int], data: st.DataObject
) -> None:
    samples, leaks = drawn
    k = data.draw(st.integers(1, samples))
    draws = list(combinations(range(samples), k))
    leaking = sum(min(draw) < leaks for draw in draws)
    assert leak_at_k(samples, leaks, k) == pytest.approx(leaking / len(draws), abs=1e-12)


def test_leak_at_k_neither_overflows_nor_cancels() -> None:
    # With one leak the chance is k / n exactly; C(100000, 50000) has thirty thousand digits.
    assert leak_at_k(100_000, 1, 50_000) == pytest.approx(0.5, rel=1e-9)
    assert leak_at_k(10**9, 1, 1) == pytest.approx(1e-9, rel=1e-9)


@pytest.mark.parametrize(("samples", "leaks", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)])
def test_leaks_that_cannot_be_are_refused(samples: int, leaks: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be between"):
        leak_at_k(samples, leaks, k)


def test_leaks_of_two_models_are_compared_question_by_question() -> None:
    # leak@2 of 5: c = 2, 0, 1 give 7/10, 0, 1 - C(4,2)/10 = 4/10; the other's 0, 0, 4/10.
    assert mean_leak_at_k(5, [2, 0, 1], 2) == pytest.approx(1.1 / 3)
    found = leak_difference(5, [2, 0, 1], [0, 0, 1], 2)
    assert found.value == pytest.approx(0.7 / 3)
    assert found.low == pytest.approx(0.0)
    with pytest.raises(ShapeError):
        mean_leak_at_k(5, [], 2)
