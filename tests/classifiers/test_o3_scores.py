import numpy as np
import pytest
from sklearn.covariance import OAS, LedoitWolf

from classifiers.o3_scores import (
    GlocalScores,
    LayerReference,
    ScoreVariant,
    ShrinkageMethod,
    distances_to_others,
    layer_score,
    shrink,
    unit,
)
from guard.errors import ArtifactError, DataError, ShapeError
from guard.types import FloatArray

METHODS: tuple[ShrinkageMethod, ...] = ("ledoit-wolf", "oas")


def draw(rows: int, width: int, seed: int = 0) -> FloatArray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + 3.0
    return np.asarray(mixed, np.float32)


@pytest.mark.parametrize("rows", [6, 40, 400])
@pytest.mark.parametrize("method", METHODS)
def test_shrinkage_equals_scikit_learns(method: ShrinkageMethod, rows: int) -> None:
    data = draw(rows, 24)
    wanted = {"ledoit-wolf": LedoitWolf, "oas": OAS}[method]().fit(data.astype(np.float64))
    found = shrink(data, method)
    assert found.amount == pytest.approx(wanted.shrinkage_, rel=1e-6)
    assert found.matrix() == pytest.approx(wanted.covariance_, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_mahalanobis_equals_the_formula_with_fewer_rows_than_dimensions(
    method: ShrinkageMethod,
) -> None:
    data, other = draw(10, 24), draw(5, 24, seed=1)
    found = shrink(data, method)
    precision = np.linalg.inv(found.matrix())
    wanted = [float((x - found.mean) @ precision @ (x - found.mean)) for x in other]
    assert LayerReference.fit(data, method).distances(other) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("rows", [4, 12, 60])
@pytest.mark.parametrize("method", METHODS)
def test_leaving_one_out_equals_fitting_without_it(method: ShrinkageMethod, rows: int) -> None:
    data = draw(rows, 16)
    full = shrink(data, method)
    fast = distances_to_others(data, method)
    for at in range(rows):
        others = np.delete(data, at, axis=0).astype(np.float64)
        mean = others.mean(axis=0)
        scatter = (others - mean).T @ (others - mean) / len(others)
        matrix = (1 - full.amount) * scatter + full.amount * full.level * np.eye(16)
        offset = data[at].astype(np.float64) - mean
        assert fast[at] == pytest.approx(float(offset @ np.linalg.solve(matrix, offset)), rel=1e-5)


def test_a_left_out_row_is_farther_than_one_compared_with_itself() -> None:
    data = draw(20, 16)
    assert (distances_to_others(data) > LayerReference.fit(data).distances(data)).all()


def test_maximum_cosine_equals_numpys() -> None:
    data, other = draw(30, 16), draw(50, 16, seed=2)
    wanted = (unit(other) @ unit(data).T).max(axis=1)
    assert LayerReference.fit(data).cosines(other) == pytest.approx(wanted, abs=1e-5)
    own = LayerReference.fit(data).cosines(data)
    assert own == pytest.approx(np.ones(30), abs=1e-5)


def test_cosine_to_others_leaves_out_all_windows_of_the_text() -> None:
    data = draw(12, 16)
    data[1] = 2.0 * data[0]
    owners = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 7])
    table = unit(data) @ unit(data).T
    wanted = np.where(owners[:, None] == owners[None], -np.inf, table).max(axis=1)
    found = LayerReference.fit(data).cosines_to_others(owners)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert found[0] < 0.999
    with pytest.raises(DataError, match="one text"):
        LayerReference.fit(data).cosines_to_others(np.zeros(12, np.int64))


def test_terms_work_together_in_o3_and_against_each_other_in_the_published_code() -> None:
    near, far = np.array([10.0, 0.99]), np.array([90.0, 0.50])
    distances, cosines = np.stack([near, far], axis=1)
    ours = layer_score(distances, cosines)
    assert ours.tolist() == [5.0 - 990.0, 45.0 - 500.0]
    code = layer_score(distances, cosines, "o3-code")
    assert code.tolist() == [-5.0 - 990.0, -45.0 - 500.0]
    farther = layer_score(distances + 100.0, cosines)
    assert (farther > ours).all()
    assert (layer_score(distances + 100.0, cosines, "o3-code") < code).all()


@pytest.mark.parametrize("variant", ["o3", "o3-code"])
def test_layers_are_scored_each_by_its_own_reference(variant: ScoreVariant) -> None:
    states = np.stack([draw(20, 8), draw(20, 8, seed=3)], axis=1)
    other = np.stack([draw(7, 8, seed=4), draw(7, 8, seed=5)], axis=1)
    found = GlocalScores.fit(states, variant, gamma=10.0).score(other)
    for at in range(2):
        layer = LayerReference.fit(states[:, at])
        wanted = layer_score(
            layer.distances(other[:, at]), layer.cosines(other[:, at]), variant, 10.0
        )
        assert found[:, at] == pytest.approx(wanted)


def test_only_o3_leaves_a_training_text_out() -> None:
    states, owners = draw(20, 8)[:, None], np.arange(20)
    code = GlocalScores.fit(states, "o3-code")
    assert code.score_own(states, owners) == pytest.approx(code.score(states))
    ours = GlocalScores.fit(states)
    assert (ours.score_own(states, owners) > ours.score(states)).all()


def test_more_rows_move_no_text_away() -> None:
    glocal = GlocalScores.fit(draw(20, 8)[:, None])
    other, more = draw(30, 8, seed=8)[:, None], draw(9, 8, seed=9)[:, None]
    wider = glocal.with_rows(more)
    assert (wider.score(other) <= glocal.score(other)).all()
    assert (wider.score(other) < glocal.score(other)).any()
    assert wider.layers[0].cosines(more[:, 0]) == pytest.approx(np.ones(9), abs=1e-5)
    assert (wider.layers[0].distances(more[:, 0]) == glocal.layers[0].distances(more[:, 0])).all()


def test_references_survive_and_damage_is_told() -> None:
    glocal = GlocalScores.fit(np.stack([draw(9, 8), draw(9, 8, seed=6)], axis=1))
    other = np.stack([draw(3, 8, seed=7)] * 2, axis=1)
    arrays = glocal.to_arrays()
    again = GlocalScores.from_arrays(arrays, "o3", 1000.0)
    assert (again.score(other) == glocal.score(other)).all()
    without = {k: v for k, v in arrays.items() if k != "1.rows"} | {"2.mean": arrays["1.mean"]}
    for broken in (
        {},
        without,
        {**arrays, "0.mean": arrays["0.mean"][:-1]},
        {**arrays, "0.rows": arrays["0.rows"] * np.nan},
    ):
        with pytest.raises(ArtifactError):
            GlocalScores.from_arrays(broken, "o3", 1000.0)
    with pytest.raises(ShapeError):
        glocal.score(other[:, :1])


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError):
        shrink(draw(1, 8))
    with pytest.raises(DataError):
        distances_to_others(draw(2, 8))


def test_equal_rows_still_give_distances() -> None:
    same = np.ones((5, 8), np.float32)
    layer = LayerReference.fit(same)
    assert layer.distances(same) == pytest.approx(np.zeros(5))
    assert np.isfinite(layer.distances(same + 1.0)).all()
    assert np.isfinite(distances_to_others(same)).all()
