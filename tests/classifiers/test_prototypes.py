import numpy as np
import pytest

from classifiers.prototypes import condense, from_bytes, to_bytes
from classifiers.space import unit
from guard.types import FloatArray

DIMENSIONS = 64


def directions(rows: int, seed: int = 0) -> FloatArray:
    return unit(np.random.default_rng(seed).normal(size=(rows, DIMENSIONS)).astype(np.float32))


def clusters(centres: int, each: int, spread: float) -> FloatArray:
    rng = np.random.default_rng(1)
    middle = np.repeat(directions(centres), each, axis=0)
    noise = rng.normal(size=middle.shape) * spread / np.sqrt(DIMENSIONS)
    return np.asarray((middle + noise)[rng.permutation(len(middle))], np.float32)


def closest(rows: FloatArray, prototypes: FloatArray) -> FloatArray:
    return np.asarray((unit(rows) @ prototypes.T).max(axis=1), np.float32)


def test_few_rows_stay_as_they_are() -> None:
    rows = directions(20)
    assert np.allclose(condense(rows * 7.0, 20), rows, atol=1e-6)
    assert np.allclose(condense(rows, 500), rows, atol=1e-6)


def test_rows_that_are_nearly_the_same_become_one() -> None:
    rows = np.repeat(directions(10), 6, axis=0)
    assert condense(rows, 500).shape == (10, DIMENSIONS)
    assert closest(rows, condense(rows, 500)).min() > 0.995


@pytest.mark.parametrize("limit", [1, 2, 7, 30, 99])
def test_never_more_than_the_limit_and_all_of_length_one(limit: int) -> None:
    made = condense(directions(100), limit)
    assert made.shape == (limit, DIMENSIONS)
    assert np.allclose(np.linalg.norm(made, axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("limit", [12, 20, 60])
def test_every_row_stays_close_to_a_prototype(limit: int) -> None:
    rows = clusters(12, 40, spread=0.4)
    made = condense(rows, limit)
    assert len(made) == limit
    assert closest(rows, made).min() > 0.85
    # Half as many directions as there are clusters can't do that.
    assert closest(rows, condense(rows, 6)).min() < 0.6


def test_prototypes_are_means_and_no_mere_choice_of_rows() -> None:
    rows = clusters(5, 60, spread=0.8)
    made = condense(rows, 5)
    centres = directions(5)
    assert closest(centres, made).min() > 0.97
    assert closest(centres, unit(rows[:5])).min() < 0.97


def test_condensing_is_deterministic() -> None:
    rows = clusters(12, 30, spread=0.6)
    assert np.array_equal(condense(rows, 10), condense(rows, 10))


def test_no_rows_give_no_prototypes() -> None:
    empty = np.zeros((0, DIMENSIONS), np.float32)
    assert condense(empty, 5).shape == (0, DIMENSIONS)
    assert from_bytes(to_bytes(empty)).shape == (0, DIMENSIONS)


def test_eight_bits_keep_the_direction() -> None:
    rows = directions(200, seed=3)
    again = from_bytes(to_bytes(rows))
    assert to_bytes(rows).dtype == np.int8
    assert (rows * again).sum(axis=1).min() > 0.99
    assert np.allclose(np.linalg.norm(again, axis=1), 1.0, atol=1e-5)
    assert (rows @ again.T).argmax(axis=1).tolist() == list(range(200))


def test_the_scale_is_not_kept() -> None:
    rows = directions(3)
    assert np.array_equal(to_bytes(rows), to_bytes(rows * 4.0))
    assert np.abs(to_bytes(rows)).max(axis=1).tolist() == [127] * 3


def test_a_row_of_zeros_stays_one() -> None:
    rows = np.zeros((1, DIMENSIONS), np.float32)
    assert not from_bytes(to_bytes(rows)).any()
