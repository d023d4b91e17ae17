"""The budget of a whole bundle, its tail model, weights and files; on made-up scores."""

import dataclasses

import numpy as np
import pytest

from classifiers.calibrate import (
    FAR,
    KEPT_SCORES,
    LEAST_SCORE,
    WEIGHT_FLOOR,
    BundleCalibration,
    TargetCalibration,
    cautious_budget,
    fit_bundle,
    fit_tail,
    fit_target,
    tail_quantile,
    wilson_interval,
)
from guard.errors import ArtifactError, DataError, NotFittedError
from guard.types import FloatArray

TEXTS = 5_000
NONE = np.zeros(0, np.float32)


def sample(rng: np.random.Generator, targets: int, texts: int = TEXTS) -> FloatArray:
    """Scores well above LEAST_SCORE, shape (targets, texts); some texts are odd for everybody."""
    shared = rng.exponential(1.0, texts)
    return (6.0 + rng.logistic(0.0, 1.0, (targets, texts)) + 0.5 * shared).astype(np.float32)


def calibrate(scores: FloatArray, forget: float = -50.0) -> list[TargetCalibration]:
    """One calibration a row; forget scores so low that they leave no gap."""
    known = np.full(9, forget, np.float32)
    return [fit_target(row, [], known, NONE, len(row)) for row in scores]


def flagged(found: BundleCalibration, scores: FloatArray) -> float:
    """Share of texts that are flagged for any target."""
    return float((scores >= found.thresholds[:, None]).any(axis=0).mean())


@pytest.mark.parametrize("targets", [1, 20, 1_000])
@pytest.mark.parametrize("budget", [1e-3, 1e-2])
def test_the_bundle_as_a_whole_keeps_the_budget_on_new_texts(targets: int, budget: float) -> None:
    rates = []
    for seed in range(3 if targets == 1_000 else 12):
        rng = np.random.default_rng(seed)
        known = sample(rng, targets)
        found = fit_bundle(calibrate(known), budget)
        assert flagged(found, known) <= budget
        rates.append(flagged(found, sample(rng, targets, 10_000)))
    assert budget / 20 < np.mean(rates) < budget


def test_a_noisy_target_pays_for_itself_and_the_others_keep_their_thresholds() -> None:
    rng = np.random.default_rng(1)
    scores = sample(rng, 21)
    scores[20] = 6.0 + 3.0 * (scores[20] - 6.0)
    found = calibrate(scores)
    without, together = fit_bundle(found[:20], 1e-2), fit_bundle(found, 1e-2)
    assert together.offsets[20] > 5.0
    assert together.offsets[:20].max() < 2.0
    np.testing.assert_allclose(together.thresholds[:20], without.thresholds, atol=1.0)
    assert together.thresholds[20] > together.thresholds[:20].max() + 3.0
    fresh = sample(rng, 21, 20_000)
    fresh[20] = 6.0 + 3.0 * (fresh[20] - 6.0)
    assert flagged(together, fresh) < 1e-2


def test_no_tail_lets_pass_what_is_a_hit_in_any_case_but_retain_texts_may() -> None:
    rng = np.random.default_rng(1)
    scores = sample(rng, 3)
    scores[2] = 6.0 + 3.0 * (scores[2] - 6.0)
    found = calibrate(scores)
    free, held = fit_bundle(found, 1e-2), fit_bundle(found, 1e-2, most=12.0)
    assert free.thresholds[2] > 20.0 > free.thresholds[:2].max()
    assert held.thresholds[2] == 12.0
    np.testing.assert_array_equal(held.thresholds, np.minimum(free.thresholds, 12.0))
    kept = dataclasses.replace(found[2], retain=15.0)
    assert fit_bundle([*found[:2], kept], 1e-2, most=12.0).thresholds[2] == 15.0


def test_another_target_changes_thresholds_and_nothing_else() -> None:
    found = calibrate(sample(np.random.default_rng(2), 3))
    before = [{k: v.tobytes() for k, v in target.to_arrays().items()} for target in found]
    alone, together = fit_bundle(found[:1], 1e-2), fit_bundle(found, 1e-2)
    assert together.thresholds[0] > alone.thresholds[0]
    after = [{k: v.tobytes() for k, v in target.to_arrays().items()} for target in found]
    assert before == after


def test_the_order_of_targets_does_not_matter() -> None:
    found = calibrate(sample(np.random.default_rng(3), 8))
    forward, backward = fit_bundle(found, 1e-3), fit_bundle(found[::-1], 1e-3)
    np.testing.assert_array_equal(forward.thresholds, backward.thresholds[::-1])
    assert forward.base == backward.base and forward.tail == backward.tail


def test_quiet_traffic_does_not_lower_the_threshold_below_the_least() -> None:
    quiet = np.full((2, 500), -9.0, np.float32)
    assert fit_bundle(calibrate(quiet), 1e-3).thresholds.tolist() == [LEAST_SCORE] * 2


def test_texts_that_name_the_target_are_no_false_alarms() -> None:
    scores = sample(np.random.default_rng(4), 1)[0]
    scores[[7, 8, 9]] = 40.0
    naive = fit_target(scores, [], NONE, NONE, TEXTS)
    known = fit_target(scores, [7, 8, 9], NONE, NONE, TEXTS)
    assert naive.ids[:3].tolist() == [7, 8, 9]
    assert not {7, 8, 9} & set(known.ids.tolist()) and known.scores.max() < 40.0
    assert fit_bundle([known], 1e-3).thresholds[0] < fit_bundle([naive], 1e-3).thresholds[0]
    assert scores[7] == 40.0, "the caller's scores are left as they are"


def test_only_the_highest_scores_are_kept_highest_first() -> None:
    (found,) = calibrate(sample(np.random.default_rng(5), 1))
    assert found.ids.shape == found.scores.shape == (KEPT_SCORES,)
    assert (np.diff(found.scores) <= 0).all() and found.benign == TEXTS


def test_few_texts_call_for_more_caution() -> None:
    shares = [cautious_budget(1e-3, count) for count in (500, 5_000, 50_000, 5_000_000)]
    assert shares == sorted(shares)
    assert shares[0] == 2.5e-4 and shares[-1] == pytest.approx(1e-3, rel=0.05)
    for count, share in ((50_000, shares[2]), (5_000_000, shares[3])):
        hits = share * count
        bound = (hits + 1.35 + 1.645 * (hits + 0.676) ** 0.5) / count
        assert bound == pytest.approx(1e-3, rel=0.02)


# --- Tail ----------------------------------------------------------------------------------------


def pareto(rng: np.random.Generator, shape: float, scale: float, count: int) -> FloatArray:
    uniform = rng.random(count)
    if shape == 0.0:
        return (-scale * np.log(uniform)).astype(np.float32)
    return (scale / shape * (uniform**-shape - 1.0)).astype(np.float32)


@pytest.mark.parametrize("shape", [0.0, 0.05])
def test_the_tail_of_a_known_distribution_is_found(shape: float) -> None:
    scores = pareto(np.random.default_rng(6), shape, 2.0, 400_000)
    start, share, scale, found = fit_tail(scores, 0.05, len(scores))
    assert share == pytest.approx(0.05)
    assert start == pytest.approx(np.quantile(scores, 0.95), rel=1e-3)
    # A generalised Pareto tail beyond u is one with the scale grown by shape · u.
    assert scale == pytest.approx(2.0 + shape * start, rel=0.06)
    assert found == pytest.approx(shape, abs=0.03)
    rare = 1e-7
    true = -2.0 * np.log(rare) if shape == 0.0 else 2.0 / shape * (rare**-shape - 1.0)
    assert tail_quantile(scores, rare, (start, share, scale, found)) == pytest.approx(true, rel=0.2)


def test_neither_a_bound_nor_a_heavy_tail_is_believed() -> None:
    rng = np.random.default_rng(7)
    for shape, wanted in ((-0.5, 0.0), (0.6, 0.1)):
        scores = pareto(rng, shape, 1.0, 20_000)
        assert fit_tail(scores, 0.05, len(scores))[3] == wanted


def test_budget_finer_than_the_sample_gives_a_threshold_beyond_it() -> None:
    scores = sample(np.random.default_rng(8), 1, 500)[0]
    tail = fit_tail(scores, 0.05, 500)
    thresholds = [tail_quantile(scores, budget, tail) for budget in (0.2, 1e-2, 1e-3, 1e-5)]
    assert thresholds == sorted(thresholds)
    assert thresholds[-1] > scores.max()


def test_the_highest_scores_say_as_much_as_all() -> None:
    scores = sample(np.random.default_rng(9), 1)[0]
    highest = np.sort(scores)[-200:]
    assert fit_tail(highest, 0.02, TEXTS) == fit_tail(scores, 0.02, TEXTS)
    tail = fit_tail(scores, 0.02, TEXTS)
    for share in (1e-2, 1e-3, 1e-6):
        assert tail_quantile(highest, share, tail, TEXTS) == tail_quantile(scores, share, tail)


def test_a_counted_threshold_flags_no_more_than_its_share_even_of_equal_scores() -> None:
    scores = np.repeat(np.arange(100, dtype=np.float32), 10)
    for share in (0.01, 0.03, 0.1):
        threshold = tail_quantile(scores, share, fit_tail(scores, 0.05, 1000))
        assert (scores >= threshold).mean() <= share


# --- Thresholds, p-values, weights ---------------------------------------------------------------


def test_a_gap_raises_the_threshold_but_keeps_the_forget_rows() -> None:
    benign = sample(np.random.default_rng(10), 1)[0]
    close, far = (
        fit_bundle([fit_target(benign, [], np.full(40, at, np.float32), NONE, TEXTS)], 1e-3)
        for at in (7.0, 90.0)
    )
    assert close.thresholds[0] == pytest.approx(close.base)
    assert far.base < far.thresholds[0] <= far.base + 1.0


def test_retain_scores_raise_the_threshold() -> None:
    rng = np.random.default_rng(11)
    benign, forget = sample(rng, 1)[0] - 9.0, np.full(40, 9.0, np.float32)
    plain = fit_bundle([fit_target(benign, [], forget, NONE, TEXTS)], 1e-3)
    retain = rng.normal(8.0, 0.5, 400).astype(np.float32)
    kept = fit_bundle([fit_target(benign, [], forget, retain, TEXTS)], 1e-3)
    assert kept.thresholds[0] > plain.thresholds[0]
    assert (retain >= kept.thresholds[0]).mean() <= 0.005


def test_a_single_retain_text_is_kept() -> None:
    benign = sample(np.random.default_rng(12), 1)[0] - 9.0
    retain = np.array([7.25], np.float32)
    found = fit_target(benign, [], NONE, retain, TEXTS)
    again = TargetCalibration.from_arrays(found.to_arrays())
    for calibration in (found, again):
        assert fit_bundle([calibration], 1e-3).thresholds[0] > 7.25


def test_p_values_fall_with_the_score_and_agree_with_the_sample() -> None:
    rng = np.random.default_rng(13)
    found = fit_bundle(calibrate(sample(rng, 20)), 1e-2)
    grid = [found.p_value(3, float(score)) for score in np.linspace(-12, 60, 500)]
    assert (np.diff(grid) <= 0).all()
    assert min(grid) > 0.0 and max(grid) <= 1.0
    best = (sample(rng, 20, 40_000) - found.offsets[:, None]).max(axis=0)
    for share in (0.02, 0.005, 0.001):
        at = float(np.quantile(best, 1 - share)) + float(found.offsets[3])
        assert found.p_value(3, at) == pytest.approx(share, rel=0.5)


def test_p_values_below_the_threshold_of_the_budget_exceed_those_above() -> None:
    found = fit_bundle(calibrate(sample(np.random.default_rng(14), 20)), 1e-2)
    for target in range(20):
        assert found.p_value(target, float(found.thresholds[target])) <= 1.2e-2


def test_weights_are_zero_below_the_threshold_and_one_from_the_median_on() -> None:
    benign = sample(np.random.default_rng(15), 1)[0]
    forget = np.linspace(20, 40, 41).astype(np.float32)
    found = fit_bundle([fit_target(benign, [], forget, NONE, TEXTS)], 1e-3)
    threshold = float(found.thresholds[0])
    assert threshold < 30.0
    below = float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))
    assert found.weight(0, -50.0) == found.weight(0, below) == 0.0
    assert found.weight(0, threshold) == pytest.approx(WEIGHT_FLOOR)
    assert found.weight(0, (threshold + 30.0) / 2) == pytest.approx((WEIGHT_FLOOR + 1.0) / 2)
    assert found.weight(0, 30.0) == found.weight(0, 99.0) == 1.0


def test_weights_stay_in_range_where_the_median_lies_below_the_threshold() -> None:
    found = fit_bundle(calibrate(sample(np.random.default_rng(16), 1)), 1e-3)
    threshold = float(found.thresholds[0])
    assert found.medians[0] < threshold
    weights = [found.weight(0, threshold + step) for step in (0.0, 1e-3, 1.0, 50.0)]
    assert weights[0] == WEIGHT_FLOOR and weights == sorted(weights) and weights[-1] == 1.0


# --- Edges ---------------------------------------------------------------------------------------


def test_a_bundle_without_targets_has_no_thresholds() -> None:
    assert fit_bundle([], 1e-3).thresholds.shape == (0,)


def test_bad_input_is_refused() -> None:
    found = calibrate(sample(np.random.default_rng(17), 1, 500))
    for budget in (0.0, 1.0, -1.0):
        with pytest.raises(DataError, match="budget"):
            fit_bundle(found, budget)
    other = calibrate(sample(np.random.default_rng(18), 1, 400))
    with pytest.raises(DataError, match="different sizes"):
        fit_bundle([*found, *other], 1e-3)
    for broken in ("benign", "forget", "retain"):
        scores = {name: np.zeros(400, np.float32) for name in ("benign", "forget", "retain")}
        scores[broken][3] = np.nan
        with pytest.raises(NotFittedError):
            fit_target(scores["benign"], [], scores["forget"], scores["retain"], 400)


def test_equal_scores_still_give_a_finite_calibration() -> None:
    found = fit_bundle(calibrate(np.full((3, 300), 6.0, np.float32)), 1e-3)
    assert np.isfinite(found.thresholds).all() and (found.thresholds >= 6.0).all()
    assert all(np.isfinite(found.p_value(1, score)) for score in (-1.0, 6.0, 9.0))


def test_arrays_round_trip() -> None:
    rng = np.random.default_rng(19)
    found = fit_target(
        sample(rng, 1)[0], [3], np.full(9, 8.0, np.float32), np.full(30, 1.0, np.float32), TEXTS
    )
    bare = dataclasses.replace(found, retain=-FAR, forget_low=-np.inf, forget_median=-np.inf)
    for calibration in (found, bare):
        again = TargetCalibration.from_arrays(calibration.to_arrays())
        ours, theirs = fit_bundle([calibration], 1e-3), fit_bundle([again], 1e-3)
        np.testing.assert_allclose(ours.thresholds, theirs.thresholds, rtol=1e-6)
        np.testing.assert_array_equal(calibration.ids, again.ids)


def test_damaged_arrays_are_refused() -> None:
    (found,) = calibrate(sample(np.random.default_rng(20), 1))
    arrays = found.to_arrays()
    for name, value in (
        ("calibration", arrays["calibration"][:3]),
        ("calibration", np.full(4, np.nan, np.float32)),
        ("benign_ids", arrays["benign_ids"][:-1]),
        ("benign_ids", arrays["benign_ids"] + np.int32(TEXTS)),
        ("benign_ids", arrays["benign_ids"] - np.int32(TEXTS)),
        ("benign_scores", np.full(KEPT_SCORES, np.inf, np.float32)),
    ):
        with pytest.raises(ArtifactError, match="damaged"):
            TargetCalibration.from_arrays({**arrays, name: value})
    with pytest.raises(ArtifactError, match="benign_ids"):
        TargetCalibration.from_arrays({k: v for k, v in arrays.items() if k != "benign_ids"})


def test_wilson_interval() -> None:
    low, high = wilson_interval(98, 100)
    assert low == pytest.approx(0.930, abs=1e-3) and high == pytest.approx(0.994, abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 50)[0] == 0.0


def test_thresholds_are_held_where_they_were_when_a_target_goes() -> None:
    found = calibrate(sample(np.random.default_rng(2), 3))
    alone, together = fit_bundle(found[:1], 1e-2), fit_bundle(found, 1e-2)
    held = alone.raised([float(together.thresholds[0])])
    score = float(together.thresholds[0]) - 0.01
    assert alone.weight(0, score) > 0.0
    assert held.weight(0, score) == together.weight(0, score) == 0.0
    assert held.weight(0, score + 1.0) == together.weight(0, score + 1.0) > 0.0
    np.testing.assert_array_equal(together.raised([-50.0] * 3).thresholds, together.thresholds)
