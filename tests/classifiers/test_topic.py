"""The closed-form topic head against slow and plain ways to say the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.topic import PENALTY, Moments, apply, fit_ridge
from guard.errors import NotFittedError
from guard.types import FloatArray

SIZE = 12


def rows(seed: int, count: int, shift: float = 0.0) -> FloatArray:
    return (np.random.default_rng(seed).normal(shift, 1.0, (count, SIZE))).astype(np.float32)


def brute_force(kinds: list[tuple[FloatArray, FloatArray, float]]) -> FloatArray:
    """Weighted least squares on stacked rows; the penalty as rows of its own.

    Args:
        kinds: Rows, the weight of each, and the wanted score; the first kind is the forget set.
    """
    points, wanted = [], []
    others = len(kinds) - 1
    for number, (mine, weights, label) in enumerate(kinds):
        share = 0.5 if number == 0 else 0.5 / others
        scale = np.sqrt(share * weights / weights.sum())[:, None]
        points.append(scale * np.concatenate([mine, np.ones((len(mine), 1))], axis=1))
        wanted.append(scale[:, 0] * label)
    penalty = np.full(SIZE + 1, PENALTY)
    penalty[-1] = 1e-6
    points.append(np.diag(np.sqrt(penalty)))
    wanted.append(np.zeros(SIZE + 1))
    found = np.linalg.lstsq(np.concatenate(points), np.concatenate(wanted), rcond=None)[0]
    return np.asarray(found, np.float32)


@given(seed=st.integers(0, 1000), counts=st.tuples(*[st.integers(1, 60)] * 3))
def test_the_head_is_weighted_least_squares(seed: int, counts: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    forget, benign, retain = (
        rows(seed + n, count, shift)
        for n, (count, shift) in enumerate(zip(counts, (0.5, 0, 0.2), strict=True))
    )
    weights = rng.uniform(0.1, 2.0, counts[1]).astype(np.float32)
    found = fit_ridge(Moments.of(forget), [Moments.of(benign, weights), Moments.of(retain)])
    wanted = brute_force(
        [
            (forget, np.ones(counts[0], np.float32), 1.0),
            (benign, weights, -1.0),
            (retain, np.ones(counts[2], np.float32), -1.0),
        ]
    )
    np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=5e-3)


def test_each_kind_counts_the_same_whatever_its_size() -> None:
    forget, few, many = rows(1, 20, 1.0), rows(2, 30), rows(3, 50)
    once = fit_ridge(Moments.of(forget), [Moments.of(few), Moments.of(many)])
    often = fit_ridge(
        Moments.of(forget), [Moments.of(few), Moments.of(np.concatenate([many] * 40))]
    )
    np.testing.assert_allclose(once, often, atol=1e-4)


def test_kinds_without_rows_are_left_out() -> None:
    forget, benign, nothing = rows(1, 20, 1.0), rows(2, 30), Moments.of(rows(3, 0))
    with_none = fit_ridge(Moments.of(forget), [Moments.of(benign), nothing])
    np.testing.assert_array_equal(with_none, fit_ridge(Moments.of(forget), [Moments.of(benign)]))


def test_moments_of_parts_add_up() -> None:
    points = rows(4, 90)
    weights = np.linspace(0.1, 1.0, 90, dtype=np.float32)
    whole = Moments.of(points, weights)
    parts = Moments.sum([Moments.of(points[n::3], weights[n::3]) for n in range(3)])
    np.testing.assert_allclose(parts.gram, whole.gram, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(parts.total, whole.total, rtol=1e-4, atol=1e-3)
    assert parts.size == pytest.approx(float(weights.sum()))


def test_the_head_tells_unseen_rows_apart() -> None:
    head = fit_ridge(Moments.of(rows(5, 40, 1.2)), [Moments.of(rows(6, 400))])
    wanted, other = apply(head, rows(7, 500, 1.2)), apply(head, rows(8, 500))
    assert wanted.shape == (500,) and wanted.dtype == np.float32
    assert (wanted > 0).mean() > 0.9 and (other < 0).mean() > 0.9


def test_a_single_forget_row_is_enough() -> None:
    mine = rows(9, 1, 1.0)
    head = fit_ridge(Moments.of(mine), [Moments.of(rows(10, 200))])
    assert np.isfinite(head).all()
    assert apply(head, mine)[0] > apply(head, rows(10, 200)).max()


def test_nothing_to_tell_apart_is_refused() -> None:
    nothing, something = Moments.of(rows(1, 0)), Moments.of(rows(1, 3))
    for positive, negatives in (
        (nothing, [something]),
        (something, []),
        (something, [nothing, nothing]),
    ):
        with pytest.raises(NotFittedError, match="forget texts"):
            fit_ridge(positive, negatives)
