"""Optimisers: ECO's estimator in closed form, nevergrad's on a valley, all of them repeatable."""

from __future__ import annotations

import pytest

from corruptions.search import DEFAULT_OPTIMIZERS, EcoZo, Optimiser, make_optimiser
from corruptions.space import Point
from guard.errors import ConfigError
from tests.corruptions.formula import JOINT, SPACE

NAMES = ["eco-zo", *(f"nevergrad:{n}" for n in ("NGOpt", "CMA", "TBPSA", "OnePlusOne", "SPSA"))]


def loss_of(point: Point) -> float:
    wrong = 0.3 * (point.get("method", "mix-generic") != "mix-generic")
    return min(1.0, abs(float(point["log_strength"]) - 1.62) / 4) + wrong


def run(optimiser: Optimiser, budget: int) -> list[Point]:
    points: list[Point] = []
    while len(points) < budget:
        asked = [optimiser.ask() for _ in range(min(optimiser.room, budget - len(points)))]
        assert asked, "an optimiser that was told everything has room"
        for point in asked:
            optimiser.tell(loss_of(point))
        points += asked
    return points


def test_eco_takes_the_slope_between_two_points() -> None:
    zo = EcoZo(SPACE, {"log_strength": 1.0})
    below, above = (zo.ask()["log_strength"] for _ in range(2))
    assert (below, above) == pytest.approx((1.0 - 0.0999, 1.0 + 0.0999))
    for log in (below, above):
        zo.tell(0.2 * log)
    assert zo.at == pytest.approx(1.0 - EcoZo.RATE * 0.2)


@pytest.mark.parametrize("edge", [-2.0, 6.0])
def test_at_the_clamp_the_real_distance_counts(edge: float) -> None:
    zo = EcoZo(SPACE, {"log_strength": edge})
    inward = -1 if edge > 0 else 1
    points = [zo.ask()["log_strength"] for _ in range(2)]
    assert edge in points
    assert abs(points[1] - points[0]) == pytest.approx(0.0999)
    for log in points:
        zo.tell(-0.2 * inward * log)  # downhill lies inside
    # 2 eps in the denominator, as in the released code, would give half the step.
    assert zo.at == pytest.approx(edge + inward * 0.2)


def test_a_cliff_does_not_throw_it_out() -> None:
    zo = EcoZo(SPACE, {"log_strength": 1.0})
    zo.ask()
    zo.ask()
    with pytest.raises(RuntimeError, match="tell"):
        zo.ask()
    zo.tell(1.0)
    zo.tell(0.0)
    assert zo.at == pytest.approx(1.0 + EcoZo.LONGEST)


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_it_finds_the_valley(name: str, parallel: int) -> None:
    points = run(make_optimiser(name, SPACE, 60, 5, parallel), 60)
    # SPSA steps too far in so wide a space: it has to keep what the scan found.
    assert min(map(loss_of, points)) < (0.11 if "SPSA" in name else 0.06)


@pytest.mark.parametrize("name", NAMES[1:-1])
def test_jointly_too(name: str) -> None:
    points = run(make_optimiser(name, JOINT, 90, 5, 2), 90)
    best = min(points, key=loss_of)
    assert best["method"] == "mix-generic"
    assert loss_of(best) < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(name: str) -> None:
    first, again = (run(make_optimiser(name, SPACE, 24, 7, 2), 24) for _ in range(2))
    assert first == again
    if name not in ("eco-zo",):
        assert run(make_optimiser(name, SPACE, 24, 8, 2), 24) != first


def test_points_are_asked_only_where_there_is_room() -> None:
    optimiser = make_optimiser("nevergrad:CMA", SPACE, 20, 0, 4)
    assert optimiser.room == 4
    asked = [optimiser.ask() for _ in range(4)]
    assert optimiser.room == 0
    optimiser.tell(loss_of(asked[0]))
    assert optimiser.room == 1, "one point of the scan is left"
    sequential = make_optimiser("nevergrad:SPSA", SPACE, 20, 0, 4)
    assert sequential.room == 1


def test_an_unknown_name_is_told_with_others() -> None:
    with pytest.raises(ConfigError, match=r"did you mean nevergrad:TBPSA.*eco-zo.*nevergrad:CMA"):
        make_optimiser("nevergrad:TBSPA", SPACE, 10, 0, 1)
    with pytest.raises(ConfigError, match="eco-zo"):
        make_optimiser("OnePlusOne", SPACE, 10, 0, 1)


def test_what_could_not_be_resumed_is_refused() -> None:
    with pytest.raises(ConfigError, match="thread"):
        make_optimiser("nevergrad:CmaFmin2", SPACE, 10, 0, 1)


def test_eco_has_one_variable() -> None:
    with pytest.raises(ConfigError, match="strength alone"):
        make_optimiser("eco-zo", JOINT, 10, 0, 1)
    assert set(DEFAULT_OPTIMIZERS.values()) <= set(NAMES)
