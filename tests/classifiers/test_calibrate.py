import numpy as np
import pytest

from classifiers.calibrate import (
    WEIGHT_FLOOR,
    Calibration,
    cautious_budget,
    fit_calibration,
    fit_tail,
    tail_quantile,
    wilson_interval,
)
from guard.errors import ArtifactError, DataError, NotFittedError


def sample(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.logistic(-4.0, 1.0, count).astype(np.float32)


def test_threshold_keeps_the_budget_on_new_data() -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(20):
        found = fit_calibration(sample(rng, 4000), np.full(50, 2.5, np.float32), 1e-3)
        rates.append(float((sample(rng, 100_000) >= found.threshold).mean()))
    assert 5e-5 < np.mean(rates) < 1e-3


def test_few_texts_call_for_more_caution() -> None:
    shares = [cautious_budget(1e-3, count) for count in (500, 5_000, 50_000, 5_000_000)]
    assert shares == sorted(shares)
    assert shares[0] == 2.5e-4 and shares[-1] == pytest.approx(1e-3, rel=0.05)
    for count, share in ((50_000, shares[2]), (5_000_000, shares[3])):
        hits = share * count
        bound = (hits + 1.35 + 1.645 * (hits + 0.676) ** 0.5) / count
        assert bound == pytest.approx(1e-3, rel=0.02)


def test_budget_finer_than_the_sample_gives_a_threshold_beyond_it() -> None:
    scores = sample(np.random.default_rng(1), 500)
    tail = fit_tail(scores)
    thresholds = [tail_quantile(scores, budget, tail) for budget in (0.2, 1e-2, 1e-3, 1e-5)]
    assert thresholds == sorted(thresholds)
    assert thresholds[-1] > scores.max()


def test_a_gap_raises_the_threshold_but_keeps_the_forget_rows() -> None:
    benign = sample(np.random.default_rng(2), 2000)
    close = fit_calibration(benign, np.full(40, 1.0, np.float32), 1e-3)
    far = fit_calibration(benign, np.full(40, 30.0, np.float32), 1e-3)
    assert close.threshold < far.threshold < 30.0


def test_retain_scores_raise_the_threshold() -> None:
    rng = np.random.default_rng(3)
    benign, forget = sample(rng, 2000), np.full(40, 9.0, np.float32)
    plain = fit_calibration(benign, forget, 1e-3)
    retain = rng.normal(6.0, 0.5, 400).astype(np.float32)
    kept = fit_calibration(benign, forget, 1e-3, retain)
    assert kept.threshold > plain.threshold
    assert (retain >= kept.threshold).mean() <= 0.05


def test_p_values_fall_with_the_score_and_agree_with_the_sample() -> None:
    benign = sample(np.random.default_rng(4), 4000)
    found = fit_calibration(benign, np.full(40, 5.0, np.float32), 1e-3)
    grid = np.linspace(-12, 40, 400).astype(np.float32)
    values = found.p_values(grid)
    assert (np.diff(values) <= 1e-6).all()
    assert values.min() > 0.0 and values.max() <= 1.0
    for share in (0.5, 0.1, 0.01):
        at = np.array([np.quantile(benign, 1 - share)], np.float32)
        assert found.p_values(at)[0] == pytest.approx(share, rel=0.35)


def test_weights_are_zero_below_the_threshold_and_one_from_the_median_on() -> None:
    found = fit_calibration(
        sample(np.random.default_rng(5), 1000), np.linspace(6, 12, 41).astype(np.float32), 1e-3
    )
    just_below = np.nextafter(np.float32(found.threshold), np.float32(-np.inf))
    scores = np.array([-50, just_below, found.threshold + 1e-4, 9.0, 99.0], np.float32)
    weights = found.weights(scores)
    assert weights[0] == weights[1] == 0.0
    assert weights[2] == pytest.approx(WEIGHT_FLOOR, abs=1e-3)
    assert weights[3] == weights[4] == 1.0
    grid = found.weights(np.linspace(found.threshold + 0.01, 12, 50).astype(np.float32))
    assert (np.diff(grid) >= 0).all()


def test_wilson_interval() -> None:
    low, high = wilson_interval(98, 100)
    assert low == pytest.approx(0.930, abs=1e-3) and high == pytest.approx(0.994, abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 50)[0] == 0.0


def test_bad_input_is_refused() -> None:
    benign, forget = np.zeros(100, np.float32), np.ones(10, np.float32)
    for budget in (0.0, 1.0, -1.0):
        with pytest.raises(DataError, match="budget"):
            fit_calibration(benign, forget, budget)
    with pytest.raises(DataError, match="benign"):
        fit_calibration(benign[:5], forget, 1e-3)
    with pytest.raises(NotFittedError):
        fit_calibration(benign, np.full(10, -np.inf, np.float32), 1e-3)


def test_equal_scores_still_give_a_finite_calibration() -> None:
    found = fit_calibration(np.zeros(100, np.float32), np.ones(10, np.float32), 1e-3)
    assert np.isfinite(found.p_values(np.array([-1.0, 0.0, 1.0], np.float32))).all()


def test_arrays_round_trip_and_damage_is_refused() -> None:
    found = fit_calibration(
        sample(np.random.default_rng(6), 500), np.full(9, 4.0, np.float32), 1e-3
    )
    again = Calibration.from_arrays(found.to_arrays())
    scores = np.linspace(-9, 9, 30).astype(np.float32)
    np.testing.assert_allclose(again.p_values(scores), found.p_values(scores), rtol=1e-4)
    np.testing.assert_allclose(again.weights(scores), found.weights(scores), atol=1e-5)
    broken = found.to_arrays()
    broken["calibration"] = broken["calibration"][:3]
    with pytest.raises(ArtifactError):
        Calibration.from_arrays(broken)
    with pytest.raises(ArtifactError, match="quantiles"):
        Calibration.from_arrays({"calibration": found.to_arrays()["calibration"]})
