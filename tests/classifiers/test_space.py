import numpy as np
import pytest

from classifiers.space import FLOOR, FeatureSpace, fit_space, unit
from guard.errors import ArtifactError, ShapeError
from guard.types import FloatArray

WIDTH, KEPT = 12, 12


def correlated(rows: int = 3_000, width: int = WIDTH, seed: int = 0) -> FloatArray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(width, width)) + 6.0 * np.eye(width)
    return np.asarray(rng.normal(size=(rows, width)) @ mixing + 5.0, np.float32)


@pytest.fixture(scope="module")
def space() -> FeatureSpace:
    return fit_space(correlated(), KEPT)


def test_before_whitening_the_data_are_correlated() -> None:
    covariance = np.cov(correlated().T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 0.5


def test_its_own_data_are_white_but_for_the_floor(space: FeatureSpace) -> None:
    features = correlated()
    rows = space.project(features).astype(np.float64)
    assert np.allclose(rows.mean(axis=0), 0.0, atol=1e-4)
    covariance = rows.T @ rows / len(rows)
    # Theory: a component of variance v comes out at v / (v + floor).
    values = np.linalg.eigvalsh(np.corrcoef(features.T.astype(np.float64)))[::-1][:KEPT]
    expected = values / (values + FLOOR * values.mean())
    assert np.allclose(covariance, np.diag(expected), atol=0.01)
    assert 0.6 < np.diag(covariance).min() <= np.diag(covariance).max() < 1.0


def test_components_of_no_variance_are_not_blown_up() -> None:
    features = correlated()
    features[:, 3] = 2.5
    rows = fit_space(features, KEPT).project(features)
    assert np.isfinite(rows).all() and rows.var(axis=0).max() < 1.01
    assert rows[:, -1].var() < 1e-3


def test_the_first_components_hold_the_most_variance(space: FeatureSpace) -> None:
    few = fit_space(correlated(), 3)
    assert few.dimensions == 3
    here, there = few.project(correlated()), space.project(correlated())[:, :3]
    for one, other in zip(here.T, there.T, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.999


def test_the_same_data_give_the_same_space(space: FeatureSpace) -> None:
    again = fit_space(correlated(), KEPT)
    assert np.array_equal(again.mean, space.mean) and np.array_equal(again.matrix, space.matrix)
    other = fit_space(correlated(seed=1), KEPT)
    assert not np.allclose(other.matrix, space.matrix, atol=1e-3)


def test_the_heaviest_entry_of_every_component_is_positive(space: FeatureSpace) -> None:
    vectors = space.matrix * correlated().std(axis=0)[:, None]
    heaviest = vectors[np.abs(vectors).argmax(axis=0), np.arange(KEPT)]
    assert (heaviest > 0).all()


def test_signs_do_not_depend_on_the_order_of_the_rows(space: FeatureSpace) -> None:
    turned = fit_space(correlated()[::-1].copy(), KEPT)
    assert np.allclose(turned.matrix, space.matrix, atol=1e-3)


@pytest.mark.parametrize(("rows", "kept"), [(1, 1), (2, 1), (5, 4), (400, KEPT)])
def test_few_rows_give_few_components(rows: int, kept: int) -> None:
    space = fit_space(correlated(rows))
    assert space.dimensions == kept
    assert np.isfinite(space.project(correlated(9, seed=2))).all()


def test_projection_is_affine_and_single_precision(space: FeatureSpace) -> None:
    one, other = correlated(2)
    middle = space.project(((one + other) / 2)[None])
    assert np.allclose(middle, space.project(np.stack([one, other])).mean(axis=0), atol=1e-4)
    assert space.project(np.stack([one, other])).dtype == np.float32
    assert space.project(np.zeros((0, WIDTH), np.float32)).shape == (0, KEPT)


@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH - 1), (1, 2, WIDTH)])
def test_other_shapes_are_refused(space: FeatureSpace, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=str(WIDTH)):
        space.project(np.zeros(shape, np.float32))


def test_arrays_round_trip(space: FeatureSpace) -> None:
    again = FeatureSpace.from_arrays(space.to_arrays())
    features = correlated(20, seed=3)
    assert np.array_equal(again.project(features), space.project(features))


@pytest.mark.parametrize(
    "change",
    [
        {"space_mean": np.zeros(WIDTH - 1, np.float32)},
        {"space_mean": np.zeros((WIDTH, 1), np.float32)},
        {"space_mean": np.full(WIDTH, np.nan, np.float32)},
        {"space_matrix": np.zeros((WIDTH - 1, KEPT), np.float32)},
        {"space_matrix": np.zeros(WIDTH, np.float32)},
        {"space_matrix": np.full((WIDTH, KEPT), np.inf, np.float32)},
    ],
)
def test_damaged_arrays_are_refused(space: FeatureSpace, change: dict[str, FloatArray]) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        FeatureSpace.from_arrays({**space.to_arrays(), **change})


@pytest.mark.parametrize("name", ["space_mean", "space_matrix"])
def test_missing_arrays_are_named(space: FeatureSpace, name: str) -> None:
    arrays = space.to_arrays()
    del arrays[name]
    with pytest.raises(ArtifactError, match=name):
        FeatureSpace.from_arrays(arrays)


def test_unit_rows_have_length_one_and_nothing_stays_nothing() -> None:
    rows = unit(np.array([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]], np.float32))
    assert rows.tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0], [-1.0, 0.0]]
