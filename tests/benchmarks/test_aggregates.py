"""The aggregates, by hand and against rows that others published."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.aggregates import (
    aggregate,
    harmonic_mean,
    memorisation_score,
    model_utility,
    privacy_score,
    utility_score,
)
from guard.errors import ShapeError

# TOFU forget10, Llama-3.1-8B-Instruct, as saved with arXiv 2605.31293.
FULL = {"loss": 0.9996, "zlib": 0.9998, "min-k": 0.9996, "min-k++": 0.9988}
RETAINED = {"loss": 0.385, "zlib": 0.313, "min-k": 0.380, "min-k++": 0.477}
ECO = {"loss": 0.075, "zlib": 0.072, "min-k": 0.079, "min-k++": 0.949}
FULL_UTILITY = (0.626, 0.863)


def test_a_harmonic_mean_is_ruled_by_its_least() -> None:
    # 3 / (1 + 2 + 4) = 3/7
    assert harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([1.0, 0.0]) == 0.0
    assert harmonic_mean([1.0, -0.2]) == 0.0
    assert math.isnan(harmonic_mean([0.0, math.nan]))
    with pytest.raises(ShapeError, match="got none"):
        harmonic_mean([])


@given(st.lists(st.floats(min_value=1e-3, max_value=1.0), min_size=1, max_size=9))
def test_a_harmonic_mean_lies_among_its_values(values: list[float]) -> None:
    assert min(values) - 1e-12 <= model_utility(values) <= max(values) + 1e-12
    assert model_utility(values) <= sum(values) / len(values) + 1e-12


@pytest.mark.parametrize(
    ("measured", "published"),
    [
        # ECO: 4 / (1/.905 + 1/.927 + 1/.9956 + 1/.381) = 4 / 5.8129 = .688
        ((0.095, 0.073, 0.0044, 0.619), 0.69),
        # retained: 4 / (1/.935 + 1/.387 + 1/.9621 + 1/.359) = 4 / 7.478 = .535
        ((0.065, 0.613, 0.0379, 0.641), 0.53),
        ((0.979, 0.998, 0.0677, 0.474), 0.01),
        ((0.042, 0.491, 0.0008, 0.0007), 0.80),
    ],
)
def test_memorisation_gives_the_published_rows(
    measured: tuple[float, float, float, float], published: float
) -> None:
    assert memorisation_score(*measured) == pytest.approx(published, abs=0.006)


def test_privacy_gives_the_published_rows() -> None:
    # ECO: 4 / (1/.69 + 1/.759 + 1/.699 + 1/.528) = 4 / 6.0914 = .657
    assert privacy_score(ECO, RETAINED) == pytest.approx(0.66, abs=0.006)
    assert privacy_score(FULL, RETAINED) == pytest.approx(0.38, abs=0.006)
    assert privacy_score(RETAINED, RETAINED) == 1.0


def test_privacy_counts_too_much_and_too_little_alike() -> None:
    above, below = ({name: auc + by for name, auc in RETAINED.items()} for by in (0.2, -0.2))
    assert privacy_score(above, RETAINED) == pytest.approx(0.8)
    assert privacy_score(below, RETAINED) == pytest.approx(0.8)
    assert privacy_score({"loss": 1.0}, {"loss": 0.0}) == 0.0


def test_privacy_needs_the_same_attacks() -> None:
    with pytest.raises(ShapeError, match="got loss and min-k"):
        privacy_score({"loss": 0.5}, {"min-k": 0.5})
    with pytest.raises(ShapeError, match="got none"):
        privacy_score({}, {})


def test_utility_is_relative_to_the_full_model() -> None:
    # ECO: hmean(.618, .354) = .4501; full: hmean(.626, .863) = .7256; .4501 / .7256 = .620
    assert utility_score(0.618, 0.354, *FULL_UTILITY) == pytest.approx(0.62, abs=0.001)
    assert utility_score(0.647, 0.884, *FULL_UTILITY) == pytest.approx(1.03, abs=0.001)
    assert utility_score(0.618, 0.0, *FULL_UTILITY) == 0.0
    with pytest.raises(ValueError, match="full model"):
        utility_score(0.6, 0.9, 0.6, 0.0)


def test_the_aggregate_gives_the_published_row() -> None:
    mem = memorisation_score(0.095, 0.073, 0.0044, 0.619)
    util = utility_score(0.618, 0.354, *FULL_UTILITY)
    # 3 / (1/.688 + 1/.657 + 1/.620) = 3 / 4.588 = .654
    assert aggregate(mem, privacy_score(ECO, RETAINED), util) == pytest.approx(0.65, abs=0.006)
    assert aggregate(0.7, 0.0, 1.0) == 0.0
